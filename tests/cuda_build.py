"""The CUDA library for sm_80, built by CMake as it is for users, with what nvcc made on the way. One build serves the
tests that load it, those that count its registers and those that execute its PTX; it stays in build/ and is brought up
to date by what has changed."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pybind11
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "cuda_sm80"
KEPT = FOLDER / "kept"  # norm.ptx, norm.cubin, ... as nvcc hands them on
REPORT = FOLDER / "ptxas.txt"  # what ptxas said of each kernel, the last word counts
ARCHITECTURE = 80


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    return shutil.which("nvcc") or next((p for h in homes if (p := shutil.which("nvcc", path=f"{h}/bin"))), None)


NVCC = find_nvcc()


def tool(name: str) -> str:
    """cmake, ninja: those of the environment that runs the tests."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or name


def configure(source: Path, folder: Path, *options: str) -> str:
    """CMake for the CUDA library, whatever torch was built for; what it said."""
    command = [
        tool("cmake"), "-S", source, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DHANDTUNED_TORCH_DIR={Path(torch.__file__).parent}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'lib'}",
        "-DHANDTUNED_CUDA=on", *options,
    ]  # fmt: skip
    return _said(*command)


def _said(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@functools.cache
def configured() -> str:
    KEPT.mkdir(parents=True, exist_ok=True)
    with _alone():
        return configure(
            ROOT, FOLDER, f"-DCMAKE_CUDA_ARCHITECTURES={ARCHITECTURE}-real",
            f"-DCMAKE_CUDA_FLAGS=-Xptxas=-v --keep --keep-dir={KEPT}",
        )  # fmt: skip


@contextmanager
def _alone() -> Iterator[None]:
    """No other process of a test run builds here."""
    with (FOLDER / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(*targets: str) -> None:
    configured()
    with _alone():
        said = _said(tool("ninja"), "-C", FOLDER, *targets)
        with REPORT.open("a") as file:
            file.write(said)


@functools.cache
def made(*names: str) -> None:
    """Brings the files in KEPT of these sources up to date: "norm", "attention", ..."""
    _build(*(f"CMakeFiles/handtuned_cuda.dir/csrc/cuda/{name}.cu.o" for name in names))


@functools.cache
def library() -> Path:
    _build("handtuned_cuda")
    return FOLDER / "lib" / "libhandtuned_cuda.so"
