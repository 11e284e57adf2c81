"""Recurrent layers in Triton: what forward and backward know of a call, and the weights as the kernels read them."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from handtuned.ops.cells import CELLS, RATES, Cell
from handtuned.ops.rnn import packed_bytes

from . import common
from .rnn_forward import drop_kernel
from .rnn_tile import Places, Rows, Sizes, Weights, Widths

HEADER_BYTES = 64
ALIGNMENT = 16  # bytes, of each tensor in `packed`
Rates = list[float] | None
DROPOUT, RECURRENT_DROPOUT, WEIGHT_DROPOUT = 0, 3, 4  # kinds of masks
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # packed weights that are known to be of these kernels


# ---- weights ---------------------------------------------------------------------------------------------------------


def weight_shapes(
    cell: Cell, inputs: int, hidden: int, width: int, layers: int, directions: int
) -> list[list[tuple[int, ...]]]:
    """Of each layer, all directions of a tensor together."""
    rows = cell.gates * hidden
    rest: list[tuple[int, ...]] = [(directions, width, hidden)] if width != hidden else []
    rest += [(directions, cell.peephole_gates * hidden)] if cell.peepholes else []
    return [
        [
            (directions, rows, directions * width if layer else inputs),
            (directions, rows, width),
            *[(directions, rows)] * 2,
            *rest,
        ]
        for layer in range(layers)
    ]


def views_of(packed: Tensor, dtype: torch.dtype, shapes: list[list[tuple[int, ...]]], cell: Cell) -> list[Weights]:
    _check_origin(packed)
    offset, found = HEADER_BYTES, []
    for layer in shapes:
        tensors: list[Tensor] = []
        for shape in layer:
            count = torch.Size(shape).numel() * dtype.itemsize
            tensors.append(packed[offset : offset + count].view(dtype).view(shape))
            offset += triton.cdiv(count, ALIGNMENT) * ALIGNMENT
        peepholes = tensors.pop() if cell.peepholes else None
        w_ih, w_hh, b_ih, b_hh, *w_hr = tensors
        found.append(Weights(w_ih, w_hh, b_ih, b_hh, w_hr[0] if w_hr else None, peepholes))
    return found


def _check_origin(packed: Tensor) -> None:
    """Weights that rnn_pack did not make here (moved from elsewhere, loaded) are looked at once, which waits for them.
    Its header is of zeros, those of other kernels are not."""
    if packed in _known:
        return
    if bool(packed[:HEADER_BYTES].any()):
        raise RuntimeError(
            "handtuned.rnn: packed is of the CPU kernels, the Triton kernels have an order of their own; pack on "
            f"{packed.device}, on the CPU under handtuned.backend('triton')"
        )
    _known[packed] = True


def rnn_pack(
    weights: list[Tensor], mode: str, bidirectional: bool, bias: bool, weight_dropout: float, seed: Tensor | None
) -> Tensor:
    cell, first = CELLS[mode], weights[0]
    hidden, width = weights[1].shape[0] // cell.gates, weights[1].shape[1]
    each, directions = cell.weights(bias, width != hidden), 1 + bidirectional
    layers = len(weights) // each // directions
    packed = first.new_zeros(packed_bytes(weights, mode, bidirectional, bias), dtype=torch.uint8)
    _known[packed] = True
    shapes = weight_shapes(cell, first.shape[1], hidden, width, layers, directions)
    for layer, views in enumerate(views_of(packed, first.dtype, shapes, cell)):
        there = [t for t in (views.w_ih, views.w_hh, views.w_hr, views.peepholes) if t is not None]
        there[2:2] = [views.b_ih, views.b_hh] if bias else []
        for d in range(directions):
            k = layer * directions + d
            for target, weight in zip(there, weights[k * each : (k + 1) * each], strict=True):
                target[d].copy_(weight.detach())
            if weight_dropout > 0:
                drop(views.w_hh[d], views.w_hh[d], WEIGHT_DROPOUT, k * cell.gates * hidden, weight_dropout, seed)
    return packed


def drop(source: Tensor, target: Tensor, kind: int, first: int, p: float, seed: Tensor | None) -> Tensor:
    """target, which may be the source: the source with a dropout's mask. Contiguous rows."""
    width = source.shape[-1]
    rows = source.numel() // max(width, 1)
    if source.numel() == 0:
        return target
    with common.on_device(source):
        drop_kernel[(triton.cdiv(rows, 8), triton.cdiv(width, 128))](
            *(source, target, seed, rows, width, first, *common.dropout_constants(p)),
            KIND=kind,
            BLOCK_ROWS=8,
            BLOCK_COLUMNS=128,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return target


# ---- a call ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What forward and backward know of a call."""

    cell: Cell
    input: Tensor
    seed: Tensor | None
    places: Places
    running: Tensor | None  # [T, B, 1], of padded input
    rates: dict[str, float]
    steps: int
    batch: int
    rows: int
    directions: int
    hidden: int
    width: int

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.input.dtype == torch.float64 else torch.float32

    @property
    def projected(self) -> bool:
        return self.width != self.hidden

    @property
    def kept(self) -> int:
        return self.cell.kept(self.rates["zoneout"])

    def sizes(self, layer: int) -> Sizes:
        changing = (self.steps, self.batch, self.rows, layer * self.directions)
        return Sizes._make([*map(common.hidden, changing), self.directions])

    @property
    def widths(self) -> Widths:
        return Widths(self.hidden, self.width)

    def numbers(self) -> list[float]:
        """Threshold and scale of zoneout, zoneout of cells and dropout of states; without a seed the expectation."""
        found: list[float] = []
        for name in ("zoneout", "cell_zoneout", "recurrent_dropout"):
            threshold, scale = common.dropout_constants(self.rates[name])
            found += [threshold, scale if self.seed is not None else 1.0 - self.rates[name]]
        return found

    def form(self, part: str) -> dict[str, Any]:
        """Constexpr arguments."""
        return {
            "NAME": self.cell.name,
            "GATES": self.cell.gates,
            "HARD": self.cell.hardsigmoid,
            "HARD_TANH": self.cell.hardtanh,
            "ZONEOUT": self.rates["zoneout"] > 0,
            "CELL_ZONEOUT": self.rates["cell_zoneout"] > 0,
            "STATE_DROPOUT": self.rates["recurrent_dropout"] > 0,
            "PART": part,
        }

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return common.empty(shape, self.input, dtype)

    def of_rows(self, tensor: Tensor | None) -> Rows:
        """A tensor of the input's rows, where they are."""
        if tensor is None:
            return Rows(None)
        tensor = tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()
        step = 0 if tensor.dim() == 2 else tensor.stride(0)
        return Rows(tensor, *common.hidden_strides(step, tensor.stride(-2)))

    def first(self, state: Tensor | None, layer: int, width: int) -> Tensor:
        """A layer's first states, wide and contiguous."""
        found = self.empty(self.directions, self.batch, width, dtype=self.wide)
        begin = layer * self.directions
        return found.zero_() if state is None else found.copy_(state[begin : begin + self.directions])

    def shaped(self, width: int) -> Tensor:
        """A result of the input's rows, a batch entry's together where the input's are."""
        return empty_like(self.input, (*self.input.shape[:-1], width))


def empty_like(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 3 and tensor.stride(0) < tensor.stride(1):
        return common.empty((shape[1], shape[0], shape[2]), tensor).transpose(0, 1)
    return common.empty(shape, tensor)


def plan_of(
    op: str, input: Tensor, lengths: Tensor | None, mode: str, hidden: int, width: int, directions: int, rates: Rates,
    seed: Tensor | None,
) -> Plan:  # fmt: skip
    named = dict(zip(RATES, rates or (0.0,) * len(RATES), strict=True))
    starts = running = None
    if input.dim() == 2:
        assert lengths is not None
        counts = lengths.cpu()
        steps, batch = int(counts.max()) if counts.numel() else 0, counts.numel()
        of_step = (counts > torch.arange(steps)[:, None]).sum(1)
        right = int(of_step.sum()) == input.shape[0] and bool((counts.diff() <= 0).all())
        if not right:
            raise RuntimeError(
                f"handtuned.{op}: lengths do not fall or add up to {int(of_step.sum())}, input has {input.shape[0]} "
                "rows; pass those of the packed rows"
            )
        starts = torch.cat([of_step.new_zeros(1), of_step.cumsum(0)]).to(input.device)
    else:
        steps, batch = input.shape[:2]
    if lengths is not None:
        lengths = lengths.to(input.device).contiguous()
        if input.dim() == 3:
            running = (torch.arange(steps, device=input.device)[:, None] < lengths)[..., None]
    rows = input.shape[:-1].numel()
    places = Places(lengths, starts)
    return Plan(CELLS[mode], input, seed, places, running, named, steps, batch, rows, directions, hidden, width)
