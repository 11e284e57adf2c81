"""quantize(model): linear layers become Int8Linear, in place, and a report says which, and what it costs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch

from . import nn
from .nn.fusing import plain
from .replace import Left, as_text

SERVED = (torch.float32, torch.bfloat16, torch.float16)
READS_ITSELF = (torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer)


@dataclass(frozen=True)
class Quantized:
    """error: root mean square of the weight's rounding errors over that of the weight."""

    name: str
    in_features: int
    out_features: int
    bytes_before: int
    bytes_after: int
    error: float


@dataclass
class QuantizeReport:
    """What quantize() did; sizes are of all parameters and buffers of the model. Prints as a table."""

    quantized: list[Quantized] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0

    def __rich__(self) -> Any:
        from rich.table import Table

        title = (
            f"handtuned.quantize: {len(self.quantized)} quantized, "
            f"the model has {self.bytes_before / 2**20:.1f} → {self.bytes_after / 2**20:.1f} MiB"
        )
        table = Table("module", "in × out", "KiB", "error of the weight", "why left", title=title)
        for row in self.quantized:
            size = f"{row.bytes_before / 1024:.0f} → {row.bytes_after / 1024:.0f}"
            table.add_row(row.name, f"{row.in_features} × {row.out_features}", size, f"{row.error:.2%}", "")
        for left in self.left:
            table.add_row(left.name, "", "", "", left.why)
        return table

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__


def quantize(model: torch.nn.Module, *, quantize_input: bool = False, skip: Collection[str] = ()) -> QuantizeReport:
    """Puts nn.Int8Linear in the place of every torch.nn.Linear and nn.Linear inside model, for inference.

    The float weights are gone afterwards, unless something else refers to them (a tied embedding). Layers whose weight
    their parent reads itself, subclasses, and layers with hooks are left.

    Args:
        model: any module that is not a linear layer itself; call replace() before, not after.
        quantize_input: round the layers' inputs to 8 bits too: faster with many rows, less exact.
        skip: full names of layers to leave, such as "lm_head".

    Returns:
        QuantizeReport with .quantized, .left and sizes; prints as a table.
    """
    if isinstance(model, torch.nn.Linear):
        raise ValueError(
            "handtuned.quantize: model is itself a linear layer, which cannot be exchanged in place; "
            "use handtuned.nn.Int8Linear.from_linear"
        )
    report = QuantizeReport(bytes_before=_size(model))
    made: dict[torch.nn.Module, torch.nn.Module] = {}
    for name, linear in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(linear, torch.nn.Linear):
            continue
        prefix, _, child = name.rpartition(".")
        parent = model.get_submodule(prefix)
        why = "skipped" if name in skip else _why_left(parent, linear)
        if why:
            report.left.append(Left(name, type(linear).__name__, why))
            continue
        if linear not in made:
            made[linear] = _quantize(name, linear, quantize_input, report)
        setattr(parent, child, made[linear])
    report.bytes_after = _size(model)
    return report


def _why_left(parent: torch.nn.Module, linear: torch.nn.Linear) -> str | None:
    if isinstance(parent, READS_ITSELF) and (
        type(parent) in READS_ITSELF or isinstance(parent, torch.nn.MultiheadAttention)
    ):
        return f"{type(parent).__name__} reads its weight itself"
    if type(linear) not in (torch.nn.Linear, nn.Linear):
        return "a subclass of torch.nn.Linear may compute something else"
    if not plain(linear, type(linear)):
        return "it has hooks or a forward of its own"
    if linear.weight.device.type != "cpu" or linear.weight.dtype not in SERVED:
        return f"its weight is {linear.weight.dtype} on {linear.weight.device}, int8 serves 16 and 32 bits on CPU"
    return None


def _quantize(name: str, linear: torch.nn.Linear, quantize_input: bool, report: QuantizeReport) -> nn.Int8Linear:
    made = nn.Int8Linear.from_linear(linear, quantize_input=quantize_input)
    weight = linear.weight.detach().float()
    norm = weight.norm().item()
    error = (made.dequantize() - weight).norm().item() / norm if norm else 0.0
    sizes = (linear.in_features, linear.out_features, _size(linear), _size(made))
    report.quantized.append(Quantized(name, *sizes, error))
    return made


def _size(module: torch.nn.Module) -> int:
    tensors = {t.data_ptr(): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
