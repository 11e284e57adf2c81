"""What nvcc makes of the CUDA kernels, for each architecture: registers, spills, occupancy, instruction mix.

A budget is committed in cuda_budgets.json; a kernel that takes more fails. After a wanted change:
HANDTUNED_EVERY_MUTANT=1 HANDTUNED_WRITE_BUDGETS=1 pytest tests/test_cuda_budgets.py, and read the difference. The
kernels of attention and of recurrent layers are compiled for one architecture in make test, for all in make
test-gpu-full.
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import attention_cases
import cases
import cuda_build
import ptx_tools
import pytest
import simt_tools
import torch

BUDGETS = Path(__file__).parent / "cuda_budgets.json"
ARCHITECTURES = (80, 90, 100)
EVERY = "1" in (os.environ.get("HANDTUNED_EVERY_MUTANT"), os.environ.get("HANDTUNED_WRITE_BUDGETS"))
SOURCES = {"norm": 24, "attention": 16, "attention_backward": 32, "rnn": 29, "rnn_backward": 50}  # kernels of each


def architectures(source: str) -> tuple[int, ...]:
    """What a source is compiled for: nvcc takes its time, so the larger ones for all in make test-gpu-full alone."""
    return ARCHITECTURES if EVERY or source == "norm" else ARCHITECTURES[:1]


NVCC = ptx_tools.NVCC
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc: registers and instructions are what it decides")


@dataclass(frozen=True)
class Kernel:
    registers: int  # of a thread
    stack: int  # bytes; where spilled registers go
    spills: int  # bytes stored and loaded
    mix: collections.Counter[str]


def demangled(names: list[str]) -> list[str]:
    """norm_forward_kernel<float, true> for each."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    lines = (line.replace("(handtuned::cuda::Units)", "units ") for line in done.stdout.splitlines())
    return [re.sub(r"^void |handtuned::(cuda::)?|\(.*$", "", line) for line in lines]


def compiled(architecture: int, source: str, folder: Path) -> dict[str, Kernel]:
    if architecture == cuda_build.ARCHITECTURE:
        cubin, said = cuda_build.KEPT / f"{source}.cubin", cuda_build.REPORT.read_text()
    else:
        ptx, cubin = (folder / f"{source}_{architecture}.{kind}" for kind in ("ptx", "cubin"))
        ptx.write_text(ptx_tools.compile_cuda(f"{source}.cu", architecture=architecture))
        done = subprocess.run(
            [str(NVCC), "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", str(ptx), "-o", str(cubin)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said = done.stderr
    report = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    mixes, code = mixes_of(cubin), cubin.read_bytes()
    found = {name: numbers for name, *numbers in report.findall(said) if f".text.{name}\0".encode() in code}
    return {
        name: Kernel(int(registers), int(stack), int(stores) + int(loads), mixes.get(raw, collections.Counter()))
        for name, (raw, (stack, stores, loads, registers)) in zip(demangled(list(found)), found.items(), strict=True)
    }


def mixes_of(cubin: Path) -> dict[str, collections.Counter[str]]:
    """Kernel -> opcodes of its SASS; empty without the disassembler, which Triton's wheel brings along."""
    try:
        import triton_tools

        sass = triton_tools.nvidia_tool("nvdisasm", "-c", str(cubin))
    except (ImportError, OSError):
        return {}
    mixes: dict[str, collections.Counter[str]] = {}
    for line in sass.splitlines():
        if start := re.match(r"\.text\.(\w+):", line):
            mix = mixes.setdefault(start[1], collections.Counter())
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            mix[found[2]] += (found[1] or "").strip() != "@!PT"  # never executed
    return mixes


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Kernel]]:
    folder = tmp_path_factory.mktemp("cubins")
    found: dict[int, dict[str, Kernel]] = {a: {} for a in ARCHITECTURES}
    jobs = [(architecture, source) for source in SOURCES for architecture in architectures(source)]
    cuda_build.made(*SOURCES)
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda job: compiled(job[0], job[1], folder), jobs)
        for (architecture, source), kernels in zip(jobs, done, strict=True):
            assert len(kernels) == SOURCES[source], sorted(kernels)
            found[architecture] |= kernels
    return found


# ---- occupancy, by the formula of the CUDA programming guide ---------------------------------------------------------

SHARED_OF_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # bytes
REGISTERS_OF_SM, WARPS_OF_SM, BLOCKS_OF_SM = 65536, 64, 32


def occupancy(architecture: int, threads: int, registers: int, shared: int) -> int:
    """Warps that a multiprocessor holds at once, of 64."""
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // 256) * 256  # handed out by 256
    by_registers = REGISTERS_OF_SM // of_warp // 4 * 4 // warps  # in four parts
    by_shared = SHARED_OF_SM[architecture] // (-(-(shared + 1024) // 128) * 128)  # a block's own 1 KiB on top
    return min(BLOCKS_OF_SM, WARPS_OF_SM // warps, by_registers, by_shared) * warps


# ---- the tests -------------------------------------------------------------------------------------------------------

LAUNCHES = [(cols, dtype) for cols in (768, 1024, 4096, 8192) for dtype in (torch.bfloat16, torch.float32)]
TYPES = {torch.bfloat16: "bf16", torch.float32: "float"}
RNN_THREADS = 256  # of a block


def launched(cols: int, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """Kernel -> (threads of a block, bytes of shared memory), as the launchers choose them."""
    case = cases.FORMS[0].with_(shape=(1, cols), dtype=dtype)
    t = cases.tensors(case)
    import handtuned

    with simt_tools.emulated() as emulator:
        _, stats = handtuned.ops.layer_norm(t.input, 1, t.weight, t.bias, 1e-5)
        forward = emulator.counts
        emulator.reset()
        handtuned.ops.layer_norm_backward(t.grad_output, t.input, 1, stats, t.weight, True, False, False)
        threads = emulator.counts.threads // emulator.counts.blocks
        handtuned.ops.layer_norm_backward(t.grad_output, t.input, 1, stats, t.weight, True, True, True)
        backward = emulator.counts
    return {
        f"norm_forward_kernel<{TYPES[dtype]}, true>": (forward.threads // forward.blocks, forward.most_shared_bytes),
        f"norm_backward_rows_kernel<{TYPES[dtype]}, true>": (threads, backward.most_shared_bytes),
    }


WIDTHS = (64, 128, 256)


def launched_attention(width: int, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """The same of attention."""
    case = attention_cases.Case((1, 1, 64, 64, width), dtype=dtype)
    t, on_cores = attention_cases.tensors(case), dtype == torch.bfloat16
    with simt_tools.emulated() as emulator:
        attention_cases.run(case, t)
        counts = emulator.counts
        emulator.reset()
        attention_cases.results(case, t)
        most = emulator.counts.most_shared_bytes  # of the backward: it needs more
    threads = counts.threads // counts.blocks
    if not on_cores:
        return {f"attention_forward_general_kernel<{TYPES[dtype]}>": (threads, counts.most_shared_bytes)}
    kernels = {"forward": counts.most_shared_bytes, "grad_query": most, "grad_key": most}
    return {f"attention_{name}_kernel<{TYPES[dtype]}, {width}>": (threads, shared) for name, shared in kernels.items()}


# What makes the tensor cores' kernels what they are: products, copies that nobody waits for, operands by ldmatrix.
TENSOR_OPCODES = ("HMMA", "LDGSTS", "LDSM")


def on_tensor_cores(name: str) -> bool:
    return re.match(r"attention_(forward|grad_query|grad_key)_kernel", name) is not None


def test_no_spills(cubins: dict[int, dict[str, Kernel]]) -> None:
    for architecture, found in cubins.items():
        spilling = {name: k for name, k in found.items() if k.spills}
        assert not spilling, f"sm_{architecture}: {spilling}"


def test_registers_and_occupancy_stay_within_budget(cubins: dict[int, dict[str, Kernel]]) -> None:
    """Registers by the 8 in which hardware hands them out; warps of a multiprocessor for common widths."""
    registers = {
        name: {f"sm{a}": -(-k.registers // 8) * 8 for a in ARCHITECTURES if (k := cubins[a].get(name))}
        for name in sorted(cubins[80])
    }
    warps = {
        f"{name} {kept} bytes": {
            f"sm{a}": occupancy(a, RNN_THREADS, k.registers, kept) for a in ARCHITECTURES if (k := cubins[a].get(name))
        }
        for name, kept in (("rnn_steps_kernel<float, true>", 57 << 10), ("rnn_steps_kernel<float, false>", 140 << 10))
    }
    warps |= {
        f"{name} {cols}": {
            f"sm{a}": occupancy(a, threads, k.registers, shared) for a in ARCHITECTURES if (k := cubins[a].get(name))
        }
        for cols, dtype in LAUNCHES
        for name, (threads, shared) in launched(cols, dtype).items()
    }
    warps |= {
        f"{name} {width}": {
            f"sm{a}": occupancy(a, threads, k.registers, shared) for a in ARCHITECTURES if (k := cubins[a].get(name))
        }
        for width in WIDTHS
        for dtype in TYPES
        for name, (threads, shared) in launched_attention(width, dtype).items()
    }
    found = {"registers": registers, "warps": warps, "instructions": instructions(cubins)}
    if os.environ.get("HANDTUNED_WRITE_BUDGETS") == "1":
        BUDGETS.write_text(json.dumps(found, indent=1) + "\n")
    budget = json.loads(BUDGETS.read_text())
    for part, sign in (("registers", 1), ("warps", -1), ("instructions", 1)):
        if part == "instructions" and not found[part]:
            continue  # no disassembler: it comes with triton
        assert found[part].keys() == budget[part].keys()
        for name, used in found[part].items():
            beyond = {a: n for a, n in used.items() if sign * n > sign * budget[part][name][a]}
            assert not beyond, f"{name}: {part} {used}, budget {budget[part][name]}"


def instructions(cubins: dict[int, dict[str, Kernel]]) -> dict[str, dict[str, int]]:
    """How many of TENSOR_OPCODES each kernel on tensor cores has; more of them is work done twice."""
    return {
        f"{name} {opcode}": {
            f"sm{a}": sum(n for o, n in k.mix.items() if o.startswith(opcode))
            for a in ARCHITECTURES
            if (k := cubins[a].get(name))
        }
        for name in sorted(filter(on_tensor_cores, cubins[80]))
        for opcode in TENSOR_OPCODES
        if cubins[80][name].mix
    }


def test_instruction_mix(cubins: dict[int, dict[str, Kernel]]) -> None:
    """Rows move by 16 bytes; nothing goes through local memory; nothing is added atomically but the count of blocks at
    a barrier."""
    for architecture, found in cubins.items():
        for name, kernel in found.items():
            if not kernel.mix:
                pytest.skip("no disassembler: it comes with triton")
            steps = "rnn_steps" in name
            for opcode in kernel.mix:
                assert not opcode.startswith(("LDL", "STL", "ATOM")), f"sm_{architecture} {name}: {opcode}"
                assert steps or not opcode.startswith("RED."), f"sm_{architecture} {name}: {opcode}"
            if steps and "double" not in name:
                assert sum(n for o, n in kernel.mix.items() if o.startswith("LDG.E.128")) >= 8, name
            if on_tensor_cores(name):
                assert all(any(o.startswith(opcode) for o in kernel.mix) for opcode in TENSOR_OPCODES), name
            if not name.startswith("norm"):
                continue
            if "partials" not in name:
                assert any(o.startswith("LDG.E.128") for o in kernel.mix), f"sm_{architecture} {name}"
            if "norm" in name and ("rows" in name or "forward" in name):
                assert any(o.startswith("STG.E.128") for o in kernel.mix), f"sm_{architecture} {name}"
