"""Triton without a GPU: a repaired interpreter, guard bands around buffers, ahead-of-time compilation and its cost.

Three independent tools:

* `mend_bfloat16()` gives the interpreter bfloat16 arithmetic. It keeps bfloat16 as uint16 and, left alone, computes
  with the bit patterns, and it truncates where hardware rounds to nearest even.
* `guarded(module)` and `fenced(tensor)` make accesses outside a buffer visible, which the interpreter performs in
  silence: outputs and scratch lie between NaN bands that must stay untouched, inputs between NaNs that spoil a result.
* `ahead_of_time(cases)` compiles, in a process of its own without the interpreter, exactly what launchers launch: their
  calls are recorded instead of run, so argument types, alignment and options are those of a real launch. It returns
  registers, spills, shared memory and the instruction mix. Run as a script, this file is that process.
"""

import collections
import contextlib
import dataclasses
import importlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

# ---- interpreter -----------------------------------------------------------------------------------------------------


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 rounded to nearest even, as the upper 16 bits; a NaN stays a NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16).reshape(np.shape(values))


def bfloat16_values(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def mend_bfloat16() -> None:
    """Patch the interpreter once: bfloat16 operands become float32, a bfloat16 result is rounded to nearest even."""
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if hasattr(builder, "bfloat16_mended"):
        return
    builder.bfloat16_mended = True

    def is_bfloat16(operand: Any) -> bool:
        return isinstance(operand, handle) and operand.dtype.scalar == tl.bfloat16

    def widen(operand: Any) -> Any:
        return handle(bfloat16_values(operand.data), tl.float32) if is_bfloat16(operand) else operand

    def narrow(result: Any) -> Any:
        return handle(bfloat16_bits(result.data), tl.bfloat16)

    def mend(name: str) -> None:
        original = getattr(builder, name)

        def arithmetic(self: Any, *operands: Any) -> Any:
            if not any(is_bfloat16(operand) for operand in operands):
                return original(self, *operands)
            result = original(self, *map(widen, operands))
            comparison = result.data.dtype == np.bool_
            mixed = any(isinstance(o, handle) and o.dtype.scalar == tl.float32 for o in operands)  # dot's accumulator
            return result if comparison or mixed else narrow(result)

        setattr(builder, name, arithmetic)

    for name in ("binary_op", "unary_op", "create_rsqrt", "create_fma", "create_clampf", "create_dot"):
        mend(name)
    cast_impl, fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16:
            return narrow(cast_impl(self, widen(source), tl.float32) if source.dtype.scalar != tl.float32 else source)
        return cast_impl(self, widen(source), target)

    def cast_rounding(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        eight_bit = min(source.dtype.scalar.primitive_bitwidth, target.scalar.primitive_bitwidth) == 8
        if eight_bit or tl.bfloat16 not in (source.dtype.scalar, target.scalar):
            return fp_to_fp(self, source, target, rounding)
        return cast(self, source, target)

    builder.cast_impl, builder.create_fp_to_fp = cast, cast_rounding


@contextlib.contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """The programs of a launch one after the other in random order."""
    from triton.runtime import interpreter

    original = interpreter.interpreter_builder.set_grid_idx
    dim = interpreter.interpreter_builder.set_grid_dim
    generator = random.Random(seed)
    order: list[tuple[int, int, int]] = []

    def set_dim(*grid: int) -> None:
        dim(*grid)
        order[:] = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        generator.shuffle(order)

    def set_idx(x: int, y: int, z: int) -> None:
        original(*order.pop())

    builder: Any = interpreter.interpreter_builder
    builder.set_grid_dim, builder.set_grid_idx = set_dim, set_idx
    try:
        yield
    finally:
        del builder.set_grid_dim, builder.set_grid_idx
    assert not order


# ---- guard bands -----------------------------------------------------------------------------------------------------

BAND = 256  # elements, a multiple of any alignment the launchers may count on


def fenced(tensor: torch.Tensor) -> torch.Tensor:
    """The same values and strides inside a buffer of NaNs: what is read beside the tensor spoils the result."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    buffer = torch.full((span + 2 * BAND,), float("nan"), dtype=tensor.dtype)
    inside = buffer.as_strided(tensor.shape, tensor.stride(), BAND)
    return inside.copy_(tensor)


def filling(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else 77


@contextlib.contextmanager
def guarded(module: Any) -> Iterator[None]:
    """Every `module.empty()` starts as NaN (integers as 77) and lies between two such bands, whose bits are compared at
    the end."""
    original = module.empty
    buffers: list[torch.Tensor] = []

    def empty(shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        size = int(np.prod(shape))
        buffer = torch.full((size + 2 * BAND,), filling(dtype or like.dtype), dtype=dtype or like.dtype)
        buffers.append(buffer)
        return buffer[BAND : BAND + size].view(shape)

    module.empty = empty
    try:
        yield
    finally:
        module.empty = original
    for buffer in buffers:
        band = torch.full((BAND,), filling(buffer.dtype), dtype=buffer.dtype).view(torch.uint8)
        for side, part in (("before", buffer[:BAND]), ("after", buffer[-BAND:])):
            size = buffer.numel() - 2 * BAND
            assert torch.equal(part.view(torch.uint8), band), f"a store went {side} a buffer of {size} elements"


# ---- ahead-of-time compilation ---------------------------------------------------------------------------------------

ARCHITECTURES = {
    "sm80": ("cuda", 80, 32),
    "sm90": ("cuda", 90, 32),
    "sm100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclasses.dataclass
class Resources:
    kernel: str
    registers: int  # per thread; VGPRs on AMD
    spills: int  # bytes of stack, where spilled registers go; spilled VGPRs on AMD
    shared: int  # bytes
    mix: dict[str, int]  # opcodes


def bound_call(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], arch: str) -> tuple[Any, ...]:
    """(target, backend, arguments, what of them is compiled in, options) of kernel[grid](*args, **options)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import jit

    target = GPUTarget(*ARCHITECTURES[arch])
    backend = make_backend(target)
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    return target, backend, *bind(*args, **options)


def compile_call(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], arch: str) -> Any:
    """Compile kernel[grid](*args, **options) as it would be compiled on a device of this architecture."""
    from triton.compiler import ASTSource

    target, backend, bound, specialization, rest = bound_call(kernel, args, options, arch)
    rest["debug"] = False
    parsed, signature, constants, attributes = kernel._pack_args(backend, rest, bound, specialization, rest)
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=parsed.__dict__)


def resources(compiled: Any, disassemble: bool) -> Resources:
    """The mix is of SASS if disassembled, which takes half a second, else of PTX; on AMD of the assembly."""
    name = compiled.metadata.name
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        count = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
        mix = collections.Counter(re.findall(r"^\s+([a-z]+_[a-z0-9_]+)\b", text, re.M))
        return Resources(name, count["vgpr_count"], count["vgpr_spill_count"], compiled.metadata.shared, dict(mix))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = nvidia_tool("cuobjdump", "-res-usage", file.name)
        sass = nvidia_tool("nvdisasm", "-c", file.name) if disassemble else ""
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    if disassemble:  # "@!PT" marks instructions that never execute
        code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+)?\s*([A-Z][A-Z0-9_.]*)", sass)
        mix = collections.Counter(opcode for predicate, opcode in code if predicate != "@!PT")
    else:
        mix = collections.Counter(re.findall(r"^\s+(?:@\S+\s+)?([a-z][a-z0-9_]*\.[\w.:]+)", compiled.asm["ptx"], re.M))
    return Resources(name, registers, stack, compiled.metadata.shared, dict(mix))


def nvidia_tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Kernel launches inside the block are noted as (kernel, arguments, options) and do not happen."""
    from triton.runtime import jit

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    original = jit.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append((self, args, options))

    jit.JITFunction.run = run
    try:
        yield launches
    finally:
        jit.JITFunction.run = original


def compile_case(
    launch: Callable[..., None], arch: str, case: dict[str, Any], disassemble: bool, only: str | None
) -> list[Resources]:
    with recorded_launches() as launches:
        launch(arch=arch, **case)
    calls = [
        compile_call(kernel, args, options, arch)
        for kernel, args, options in launches
        if only in (None, kernel.fn.__name__)
    ]
    return [resources(compiled, disassemble) for compiled in {compiled.hash: compiled for compiled in calls}.values()]


def keys_of_case(launch: Callable[..., None], arch: str, case: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, form, cache key) of every launch. The form is what options decide: constants, absent tensors."""

    def absent(value: Any) -> Any:
        return [absent(part) for part in value] if isinstance(value, tuple) else value is None

    found = []
    with recorded_launches() as launches:
        launch(arch=arch, **case)
    for kernel, args, options in launches:
        _target, _backend, _bound, specialization, rest = bound_call(kernel, args, options, arch)
        constants = [value for kind, value in specialization if kind == "constexpr"]
        found.append((kernel.fn.__name__, str((absent(args), constants, rest)), str((specialization, rest))))
    return found


def ahead_of_time(launch: str, cases: list[dict[str, Any]], timeout: float = 600.0) -> list[list[Resources]]:
    """For each case, the resources of every kernel that `launch`, "module:function", launches for it.

    A case holds "arch", optionally "disassemble" and "only", the name of one kernel, and the other keyword arguments of
    the function.
    """
    found = in_a_process(launch, cases, timeout, compiled=True)
    return [[Resources(**kernel) for kernel in case] for case in found]


def cache_keys(launch: str, cases: list[dict[str, Any]]) -> list[list[tuple[str, str, str]]]:
    """For each case keys_of_case(): what Triton would look for among what it has compiled."""
    return [[tuple(key) for key in case] for case in in_a_process(launch, cases, 600.0, compiled=False)]


def in_a_process(launch: str, cases: list[dict[str, Any]], timeout: float, compiled: bool) -> Any:
    """One without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"  # only silences a warning, launches name the option
    request = json.dumps({"launch": launch, "cases": cases, "compiled": compiled})
    done = subprocess.run(
        [sys.executable, __file__],
        input=request,
        env=environment,
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"ahead-of-time compilation failed:\n{done.stderr[-6000:]}"
    return json.loads(done.stdout)


def main() -> None:
    request = json.load(sys.stdin)
    module, function = request["launch"].split(":")
    launch = getattr(importlib.import_module(module), function)
    found: list[Any] = []
    for case in request["cases"]:
        arch, disassemble = case.pop("arch"), case.pop("disassemble", False)
        if not request["compiled"]:
            found.append(keys_of_case(launch, arch, case))
            continue
        kernels = compile_case(launch, arch, case, disassemble, case.pop("only", None))
        found.append([dataclasses.asdict(kernel) for kernel in kernels])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
