"""The PTX simulator from Python: single kernels on tensors, and whole ops whose launchers run the PTX that nvcc emits.

The library is part of the test build (HANDTUNED_EMULATE=1, which `make test` asks for) and of no wheel.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cuda_build
import pytest
import simt_tools
from cuda_build import NVCC
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = simt_tools.FOLDER / "libhandtuned_ptx.so"


class Counts(ctypes.Structure):
    """What launches executed since the last reset; the fields of ptx::Counts."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "launches",
            "blocks",
            "instructions",
            "products",
            "bytes_loaded",
            "bytes_stored",
            "arithmetic",
            "memory",
            "exchanges",
        )
    )
    launches: int
    blocks: int
    instructions: int  # of warps
    products: int  # mma
    bytes_loaded: int  # from global memory
    bytes_stored: int
    arithmetic: int  # floating point
    memory: int  # loads and stores, but of parameters
    exchanges: int  # shuffles, votes


@functools.cache
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(str(simt_tools.require(LIBRARY)))
    found.ptx_load.restype = ctypes.c_void_p
    found.ptx_error.restype = ctypes.c_char_p
    found.ptx_counts.restype, found.ptx_counts.argtypes = Counts, (ctypes.c_char_p,)
    found.ptx_unload.argtypes = found.ptx_choose.argtypes = (ctypes.c_void_p,)
    found.ptx_configure.argtypes = (ctypes.c_ulonglong, ctypes.c_int)
    found.ptx_unmap.argtypes = (ctypes.c_void_p,)
    found.ptx_map.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found.ptx_parameters.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int))
    found.ptx_launch.argtypes = (
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int,
        ctypes.c_void_p,
    )  # fmt: skip
    return found


class PtxError(RuntimeError):
    """What the simulator reports: an instruction it does not know, or something a kernel must not do."""


def configure(seed: int = 0, junk: bool = False) -> None:
    """seed: 0 for warps in order, else any order. junk: report loads of what `poison` fills fresh memory with."""
    library().ptx_configure(seed, junk)


def counts(kernel: str = "") -> Counts:
    """Of all kernels, or of those in whose mangled names this occurs."""
    found: Counts = library().ptx_counts(kernel.encode())
    return found


def reset_counts() -> None:
    library().ptx_reset_counts()


Argument = Tensor | int | float | None


class Module:
    """PTX, read. Lives as long as the process."""

    def __init__(self, text: str) -> None:
        self.handle = library().ptx_load(text.encode())
        if not self.handle:
            raise PtxError(library().ptx_error().decode())

    def launch(
        self,
        kernel: str,
        *arguments: Argument,
        grid: Sequence[int] = (1,),
        block: Sequence[int] = (32,),
        shared: int = 0,
        cooperative: bool = False,
        unwritten: Sequence[Tensor] = (),
    ) -> None:
        """Run one kernel. Tensors are all that it may touch; those in `unwritten` must be written before they are read.

        An int is passed as 64 bits, of which the kernel takes as many as it declares; a float as float64 if it is one
        of the kernel's, else as float32: pass torch scalars' bits as int where that matters.
        """
        native = library()
        native.ptx_forget()
        for argument in arguments:
            if isinstance(argument, Tensor):
                map_tensor(argument, not any(argument is other for other in unwritten))
        self.start(kernel, [word(a) for a in arguments], grid, block, shared, cooperative)
        native.ptx_forget()

    def start(
        self,
        kernel: str,
        words: Sequence[int],
        grid: Sequence[int],
        block: Sequence[int],
        shared: int = 0,
        cooperative: bool = False,
    ) -> None:
        """As launch(), arguments as bits, memory as it was mapped before."""
        wanted = ctypes.c_int()
        if library().ptx_parameters(self.handle, kernel.encode(), ctypes.byref(wanted)):
            raise PtxError(library().ptx_error().decode())
        assert wanted.value == len(words), f"{kernel} takes {wanted.value} arguments, not {len(words)}"
        values = (ctypes.c_uint64 * len(words))(*(w & 0xFFFFFFFFFFFFFFFF for w in words))
        step = ctypes.sizeof(ctypes.c_uint64)
        pointers = (ctypes.c_void_p * len(words))(*(ctypes.addressof(values) + step * i for i in range(len(words))))
        triples = [(ctypes.c_uint * 3)(*size, *[1] * (3 - len(size))) for size in (grid, block)]
        if library().ptx_launch(self.handle, kernel.encode(), *triples, shared, cooperative, pointers):
            raise PtxError(library().ptx_error().decode())


def word(argument: Argument) -> int:
    """The bits of an argument; a float as float32."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        return int.from_bytes(bytes(ctypes.c_float(argument)), "little")
    return argument or 0


def map_tensor(tensor: Tensor, written: bool) -> None:
    """From now on, until ptx_forget(), this tensor and others so mapped are all that kernels may touch."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    library().ptx_map(tensor.data_ptr(), span * tensor.element_size() if tensor.numel() else 0, written)


# ---- nvcc ------------------------------------------------------------------------------------------------------------


needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc: the PTX that it emits is what is tested")


def compile_cuda(source: str, *flags: str, architecture: int = 80) -> str:
    """The PTX of a source of csrc/cuda: of the library itself, or with other flags. Made once for all tests."""
    return _compiled(source, flags, architecture)


@functools.cache
def _compiled(source: str, flags: tuple[str, ...], architecture: int) -> str:
    if not flags and architecture == cuda_build.ARCHITECTURE:
        stem = Path(source).stem
        cuda_build.made(stem)
        return (cuda_build.KEPT / f"{stem}.ptx").read_text()
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        command = [str(NVCC), "-std=c++17", "-O3", f"-arch=sm_{architecture}", f"-I{ROOT}/csrc/cuda", *flags, "-ptx"]
        done = subprocess.run(
            [*command, str(ROOT / "csrc/cuda" / source), "-o", file.name], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return Path(file.name).read_text()


@functools.cache
def cuda_module(sources: str | tuple[str, ...], *flags: str) -> Module:
    """The kernels of one source, or of several."""
    names = (sources,) if isinstance(sources, str) else sources
    return Module("\n".join(compile_cuda(name, *flags) for name in names))


@contextmanager
def simulated(module: Module, seed: int = 0, junk: bool = False, device: tuple[int, int] = (0, 0)) -> Iterator[None]:
    """Inside, ops with a CUDA kernel run its PTX on CPU tensors. The launchers are those of the emulator's library."""
    serve = ctypes.cast(library().ptx_serve, ctypes.c_void_p)
    with simt_tools.emulated(device=device) as emulator:
        emulator.library.simt_execute_elsewhere.argtypes = (ctypes.c_void_p,)
        emulator.library.simt_execute_elsewhere(serve)
        library().ptx_choose(module.handle)
        configure(seed, junk)
        reset_counts()
        try:
            yield
        finally:
            emulator.library.simt_execute_elsewhere(None)
            configure()
