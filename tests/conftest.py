"""Fixtures of every test: the kernels a test runs on, poisoned memory, fixed seeds, threads put back.

A test that takes `kernels` runs once per instruction set that the library was built for, on the CUDA kernels in the
emulator ("simt"), on the Triton kernels and on the reference formula; `isa` runs it on the CPU kernels only. With
``@pytest.mark.cases(list)`` it also takes `case`; the emulator, Triton's interpreter and the formula get the small
ones, Triton only those in ``triton=list`` where that is given, and the kernels in ``thinned=names`` every third, the
emulator every seventh (all of them in make test-gpu-full).
``@pytest.mark.no_triton`` leaves both kinds of GPU kernels out, for ops that have none; ``@pytest.mark.cuda_alone``
leaves Triton's out, for ops that have CUDA kernels alone.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is first imported

import handtuned
from handtuned import _C

ISAS = {row["name"]: row for row in _C.isa_table()}
EACH_OF_THINNED = {"simt": 1 if os.environ.get("HANDTUNED_EVERY_MUTANT") == "1" else 7}
# The largest cases of the slow kernels: Triton's interpreter needs about half a second, the others 0.1 s.
MOST_ELEMENTS = {"simt": 20_000, "triton": 4200, "reference": 120_000}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cases(list, triton=list, thinned=names): what `case` goes through")
    config.addinivalue_line("markers", "no_triton: the op has no kernel for GPUs")
    config.addinivalue_line("markers", "cuda_alone: the op has CUDA kernels and none in Triton")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sets = {"kernels": [*ISAS, "simt", "triton", "reference"], "isa": list(ISAS)}
    fixture = next((name for name in sets if name in metafunc.fixturenames), None)
    marker = metafunc.definition.get_closest_marker("cases")
    if fixture is None:
        return
    if metafunc.definition.get_closest_marker("no_triton"):
        sets["kernels"] = [*ISAS, "reference"]
    if metafunc.definition.get_closest_marker("cuda_alone"):
        sets["kernels"] = [*ISAS, "simt", "reference"]
    if marker is None:
        metafunc.parametrize(fixture, sets[fixture], indirect=True)
        return
    pairs = [
        pytest.param(kernels, case, id=f"{kernels}-{case.name}")
        for number, case in enumerate(marker.args[0])
        for kernels in sets[fixture]
        if case.elements <= MOST_ELEMENTS.get(kernels, case.elements)
        and (kernels != "triton" or case in marker.kwargs.get("triton", marker.args[0]))
        and (kernels not in marker.kwargs.get("thinned", ()) or number % EACH_OF_THINNED.get(kernels, 3) == 0)
    ]
    metafunc.parametrize((fixture, "case"), pairs, indirect=[fixture])


def _instruction_set(name: str) -> Iterator[str]:
    if not ISAS[name]["built"]:
        pytest.skip(f"{name} is not part of this build, which needs {ISAS[name]['needs']}")
    if not ISAS[name]["supported"]:
        pytest.skip(f"this CPU lacks {ISAS[name]['needs']}")
    with handtuned.testing.isa(name), handtuned.strict():
        yield name


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU kernels of one instruction set, forced."""
    yield from _instruction_set(request.param)


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """One set of kernels, forced; its name."""
    if request.param in ISAS:
        yield from _instruction_set(request.param)
        return
    if request.param == "simt":
        import simt_tools

        with simt_tools.emulated("random", seed=1), handtuned.strict():
            yield request.param
        return
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed: pip install triton")
        if torch.cuda.is_available():
            pytest.skip("with a CUDA device Triton is not interpreted; test_triton_norm.py runs it there")
        import triton_tools

        triton_tools.mend_bfloat16()
    with handtuned.backend(request.param):
        yield request.param


@pytest.fixture
def poison() -> Iterator[None]:
    """Fresh CPU memory is junk, also inside the ops, so that what a kernel leaves unwritten shows.

    The switch is torch's own, in its CPU allocator (torch.utils.deterministic.fill_uninitialized_memory does not reach
    tensors made through the stable ABI). The pattern is 0x7fedbeef: NaN in float32, NaN in every other element and
    -0.5 or -1.7 in between in 16 bits, 1.7e308 in float64. test_norm.py proves that an op's allocation sees it.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    switch = ctypes.c_bool.in_dll(library, "FLAGS_caffe2_cpu_allocator_do_junk_fill")
    switch.value = True
    yield
    switch.value = False


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test starts from the same random state, with the same threads and no fall-back said before."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    handtuned.backends._warned.clear()
    yield
    torch.set_num_threads(threads)
