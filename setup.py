"""Drives the one build, CMakeLists.txt. Metadata is in pyproject.toml.

Environment: HANDTUNED_CUDA=auto|on|off, HANDTUNED_EMULATE=1 (test builds), CMAKE_ARGS, MAX_JOBS.
"""

import importlib.util
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_MINIMUM = (2, 10)


def find_torch() -> Path:
    """The torch the user has: also from inside pip's build isolation, which hides the environment it installs into."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    folders.append(sysconfig.get_path("purelib", vars={"base": sys.base_prefix}))  # a venv with system site packages
    candidates += [Path(folder) / "torch" for folder in folders]
    for torch in candidates:
        if (torch / "version.py").exists():
            return torch
    sys.exit(
        "handtuned is built against your own torch and found none: run `pip install torch`, then this again "
        "(with --no-build-isolation where the installer builds in a separate environment)."
    )


def torch_version(torch: Path) -> str:
    facts: dict[str, str] = {}
    exec((torch / "version.py").read_text(), facts)
    version = facts["__version__"]
    if tuple(int(part) for part in version.split(".")[:2]) < TORCH_MINIMUM:
        sys.exit(f"handtuned needs torch >= 2.10 and found {version}: run `pip install 'torch>=2.10'`.")
    return version


def tool(name: str) -> str:
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    return path or sys.exit(f"handtuned needs {name} to build: run `pip install {name}`.")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        started = time.time()
        torch = find_torch()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cmake, ninja = tool("cmake"), tool("ninja")
        subprocess.run(
            [
                cmake,
                "-S",
                str(ROOT),
                "-B",
                str(build),
                "-G",
                "Ninja",
                f"-DCMAKE_MAKE_PROGRAM={ninja}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
                f"-DHANDTUNED_TORCH_DIR={torch}",
                f"-DHANDTUNED_TORCH_VERSION={torch_version(torch)}",
                f"-DHANDTUNED_CUDA={os.environ.get('HANDTUNED_CUDA', 'auto')}",
                f"-DHANDTUNED_EMULATE={os.environ.get('HANDTUNED_EMULATE', '0')}",
                *os.environ.get("CMAKE_ARGS", "").split(),
            ],
            check=True,
        )
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([cmake, "--build", str(build), *(["--parallel", jobs] if jobs else [])], check=True)
        print(f"handtuned: kernels built in {time.time() - started:.0f} s")


if {"dist_info", "bdist_wheel", "editable_wheel"} & set(sys.argv):
    torch_version(find_torch())  # say so before pip resolves, and downloads, the dependencies

setup(ext_modules=[Extension("handtuned._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
