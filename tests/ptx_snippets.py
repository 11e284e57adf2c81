"""Kernels of a few instructions for the PTX simulator: what they share around their bodies, and how they are run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ptx_tools
import torch
from torch import Tensor

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"
REGISTERS = """
    .reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %r<64>; .reg .b64 %d<32>; .reg .f32 %f<16>; .reg .f64 %g<8>;
    ld.param.u64 %d0, [in]; ld.param.u64 %d1, [out];
    mov.u32 %r0, %tid.x; mov.u32 %r1, %laneid;
"""
I32, I64, F32, F64 = torch.int32, torch.int64, torch.float32, torch.float64
NARROW = {"f16": torch.float16, "bf16": torch.bfloat16}
FLOATS = torch.tensor([0.0, -0.0, 1.0, -1.5, 3.0e38, 1e-38, 1e-42, math.inf, -math.inf, math.nan, 0.1, 2.5])
OTHERS = torch.tensor([1.0, 2.0, 3.0, 0.75, 3.0e38, 1e-3, 1.0, -math.inf, 2.0, 1.0, 0.7, math.nan])


def kernel(body: str, variables: str = "") -> str:
    """k(in, out) whose registers are declared; %d0 and %d1 hold the addresses, %r0 the thread."""
    return f"{HEAD}{variables}\n.visible .entry k(.param .u64 in, .param .u64 out)\n{{\n{REGISTERS}{body}\n ret;\n}}\n"


def run(
    body: str,
    values: Tensor,
    out: Tensor,
    *,
    threads: int = 32,
    blocks: int = 1,
    shared: int = 0,
    cooperative: bool = False,
    variables: str = "",
) -> Tensor:
    ptx_tools.Module(kernel(body, variables)).launch(
        "k", values, out, grid=(blocks,), block=(threads,), shared=shared, cooperative=cooperative, unwritten=(out,)
    )
    return out


def each_thread(opcode: str, operands: Sequence[Tensor], result: torch.dtype) -> Tensor:
    """The opcode on row t of the operands, 8 bytes each, in thread t."""
    count = len(operands)
    rows = torch.zeros(len(operands[0]), count, dtype=I64)
    for i, operand in enumerate(operands):
        rows.view(torch.uint8).view(*rows.shape, 8)[:, i, : operand.element_size()] = operand.view(torch.uint8).view(
            len(operand), -1
        )
    size = {2: "h", 4: "r", 8: "d"}
    source, target = size[operands[0].element_size()], size[result.itemsize]
    registers = [f"%{source}{10 + i}" for i in range(count)]
    moves = "".join(
        f"ld.global.b{8 * operands[0].element_size()} {register}, [%d2+{8 * i}];"
        for i, register in enumerate(registers)
    )
    body = f"""
    mad.wide.u32 %d2, %r0, {8 * count}, %d0; mad.wide.u32 %d3, %r0, {result.itemsize}, %d1;
    {moves}
    {opcode} %{target}4, {", ".join(registers)};
    st.global.b{8 * result.itemsize} [%d3], %{target}4;"""
    return run(body, rows, torch.zeros(len(rows), dtype=result), threads=len(rows))


def same(found: Tensor, wanted: Tensor) -> bool:
    return torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
