"""Measures the error table of docs/numerics.md and writes it between the markers there.

    python docs/error_table.py            rewrites the table
    python docs/error_table.py --check    measures again and fails where the page is off by more than 1.5x

Every figure is the largest error of a tensor against the same formula in float64, divided by the largest value of that
tensor in float64. Inputs are rounded to the dtype first, so their own rounding is not counted. Both libraries run on
their AVX2 kernels, so that the figures are the same on every x86 machine; the seeds are fixed.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if platform.machine() in ("x86_64", "AMD64"):  # both are read when torch and handtuned are imported
    os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
    os.environ["HANDTUNED_ISA"] = "avx2"

import torch
from torch import Tensor

from handtuned import reference
from handtuned.nn import functional as F

PAGE = Path(__file__).parent / "numerics.md"
BEGIN, END = "<!-- error table: docs/error_table.py -->", "<!-- /error table -->"
ROWS, COLS, EPS = 512, 768, 1e-5
STEPS, BATCH, HIDDEN = 32, 16, 256
ALLOWED = 1.5

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "add_layer_norm, dropout 0.1", "linear, gelu")
CELLS = {"lstm": 4, "gru": 3, "rnn, tanh": 1}  # gates of each
TENSORS = ("output", "grad of input", "grad of weight", "grad of bias")

Result = dict[str, Tensor]
Errors = dict[tuple[str, str], dict[str, tuple[float, float]]]  # (op, dtype) -> tensor -> (torch, handtuned)


# ---- the three that are compared ------------------------------------------------------------------------------------


# `second` is what is added in the add forms and W_ih of a recurrent layer, whose w and b are W_hh and b_hh.


def torch_form(op: str, x: Tensor, second: Tensor, w: Tensor, b: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
    """What one writes without handtuned; also the float64 formula when the tensors are float64."""
    if op in CELLS:
        layer = {"lstm": torch._VF.lstm, "gru": torch._VF.gru, "rnn, tanh": torch._VF.rnn_tanh}[op]
        zero = x.new_zeros(1, BATCH, HIDDEN)
        weights = [second, w, torch.zeros_like(b), b]
        return (layer(x, (zero, zero) if op == "lstm" else zero, weights, True, 1, 0.0, False, False, False)[0],)
    if "linear" in op:
        return (torch.nn.functional.gelu(torch.nn.functional.linear(x, w, b)),)
    if "dropout" in op:
        x = x * factor.to(x.dtype)
    h = x + second if op.startswith("add") else x
    if "rms" in op:
        return (torch.nn.functional.rms_norm(h, (COLS,), w, EPS),)
    return (torch.nn.functional.layer_norm(h, (COLS,), w, b, EPS),)


def handtuned_form(op: str, x: Tensor, second: Tensor, w: Tensor, b: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(0)  # the dropout's seed, as `factor` was made
    p = 0.1 if "dropout" in op else 0.0
    if op in CELLS:
        layer = {"lstm": F.lstm, "gru": F.gru, "rnn, tanh": F.rnn}[op]
        return (layer(x, None, (second, w, torch.zeros_like(b), b))[0],)
    if "linear" in op:
        return (F.linear(x, w, b, activation="gelu"),)
    if op == "layer_norm":
        return (F.layer_norm(x, (COLS,), w, b, EPS),)
    if op == "rms_norm":
        return (F.rms_norm(x, (COLS,), w, EPS),)
    if op == "add_rms_norm":
        return F.add_rms_norm(x, second, (COLS,), w, EPS, p)
    return F.add_layer_norm(x, second, (COLS,), w, b, EPS, p)


def run(form: Callable[..., tuple[Tensor, ...]], op: str, inputs: list[Tensor], factor: Tensor, dy: Tensor) -> Result:
    x, second, w, b = (t.detach().clone().requires_grad_() for t in inputs)
    output = form(op, x, second, w, b, factor)[0]
    output.backward(dy)
    found = {"output": output.detach(), "grad of input": x.grad, "grad of weight": w.grad, "grad of bias": b.grad}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


# ---- the table ------------------------------------------------------------------------------------------------------


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


def measure() -> Errors:
    torch.set_num_threads(2)  # torch sums by thread
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    exact_inputs = [draw(ROWS, COLS) + 0.5, draw(ROWS, COLS), 1 + 0.2 * draw(COLS), 0.2 * draw(COLS)]
    exact_dy = draw(ROWS, COLS)
    linear_weight = draw(COLS, COLS) / COLS**0.5
    torch.manual_seed(0)
    seed = torch.randint(2**63 - 1, (1,))
    factor = reference.dropout_factor(torch.Size((ROWS, COLS)), 1, 0.1, seed, torch.float64)

    cases = {op: ([*exact_inputs], exact_dy) for op in OPS}
    cases["linear, gelu"][0][2] = linear_weight
    for op, gates in CELLS.items():
        x, scale = draw(STEPS, BATCH, HIDDEN), HIDDEN**-0.5
        w_ih, w_hh, b_hh = (
            scale * (2 * torch.rand(gates * HIDDEN, n, generator=generator, dtype=x.dtype) - 1)
            for n in (HIDDEN, HIDDEN, 1)
        )
        cases[op] = [x, w_ih, w_hh, b_hh[:, 0]], draw(STEPS, BATCH, HIDDEN)

    errors: Errors = {}
    for op, (tensors, incoming) in cases.items():
        for dtype in DTYPES:
            inputs, dy = [t.to(dtype) for t in tensors], incoming.to(dtype)
            exact = run(torch_form, op, [t.double() for t in inputs], factor, dy.double())
            by_torch = run(torch_form, op, inputs, factor, dy)
            by_handtuned = run(handtuned_form, op, inputs, factor, dy)
            errors[op, str(dtype).removeprefix("torch.")] = {
                name: (relative_error(by_torch[name], exact[name]), relative_error(by_handtuned[name], exact[name]))
                for name in exact
            }
    return errors


def as_markdown(errors: Errors) -> str:
    lines = ["| op | dtype | " + " | ".join(TENSORS) + " |", "|---" * (2 + len(TENSORS)) + "|"]
    for (op, dtype), row in errors.items():
        cells = ["{:.1e} / {:.1e}".format(*row[name]) if name in row else "" for name in TENSORS]
        lines.append(f"| {op} | {dtype} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_errors(page: str) -> Errors:
    """The figures that the page states."""
    errors: Errors = {}
    for line in page.split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]:
        op, dtype, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        pairs = {name: cell.split(" / ") for name, cell in zip(TENSORS, cells, strict=True) if cell}
        errors[op, dtype] = {name: (float(a), float(b)) for name, (a, b) in pairs.items()}
    return errors


def differences(page: Errors, measured: Errors) -> Iterator[str]:
    """One line for each figure of the page that is not what was measured."""
    if page.keys() != measured.keys():
        yield f"rows on the page {sorted(page)}, measured {sorted(measured)}"
        return
    for key, row in measured.items():
        for name, figures in row.items():
            for library, stated, found in zip(
                ("torch", "handtuned"), page[key].get(name, (0.0, 0.0)), figures, strict=True
            ):
                if not found / ALLOWED <= stated <= found * ALLOWED:
                    yield f"{' '.join(key)}, {name}, {library}: the page says {stated:.1e}, measured {found:.1e}"


def broken_contract(errors: Errors) -> Iterator[str]:
    """One line for each tensor whose error is more than 1.5 times torch's."""
    for key, row in errors.items():
        for name, (by_torch, by_handtuned) in row.items():
            if by_handtuned > ALLOWED * by_torch:
                yield f"{' '.join(key)}, {name}: torch {by_torch:.1e}, handtuned {by_handtuned:.1e}"


def main() -> int:
    measured, page = measure(), PAGE.read_text()
    wrong, check = list(broken_contract(measured)), "--check" in sys.argv
    if check:
        wrong += list(differences(as_errors(page), measured))
    else:
        table = f"{BEGIN}\n{as_markdown(measured)}\n{END}"
        PAGE.write_text(re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: table, page, flags=re.DOTALL))
    bound = "the page" if check else "torch"
    print("\n".join(wrong) or f"{len(measured)} rows, all within {ALLOWED}x of {bound}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
