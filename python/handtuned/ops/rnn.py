"""The recurrent ops: handles, checks in the same words as csrc/rnn.cpp, and fake kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cells import CELLS, MODES, RATES, Cell
from .common import Arguments, by_name, namespace, register, wide_dtype

rnn_pack = namespace.rnn_pack.default
rnn = namespace.rnn.default
rnn_inference = namespace.rnn_inference.default
rnn_cell = namespace.rnn_cell.default
rnn_backward = namespace.rnn_backward.default

RNN_OPS = by_name(rnn_pack, rnn, rnn_inference, rnn_cell, rnn_backward)
HEADER_BYTES = 64
MOST_HIDDEN, MOST_LAYERS = 1 << 20, 1 << 12  # so that no number of bytes overflows


def _round_up(n: int, to: int) -> int:
    return (n + to - 1) // to * to


class RnnArguments(Arguments):
    """A stack of layers: sizes given by number (rnn) or by the weights (rnn_pack, rnn_backward)."""

    cell: Cell
    hidden: int
    state: int  # width of h: proj_size, or hidden_size
    layers: int
    inputs: int

    def __init__(self, op: Any, args: tuple[Any, ...]) -> None:
        super().__init__(op, args)
        self.weights: list[Tensor] | None = self["weights"]
        if "input" in self.named:
            self.main, self.main_name = self["input"], "input"
        else:
            self.require(
                len(self["weights"]) > 0, "weights is empty, the least is one layer; pass torch's flat weights"
            )
            self.main, self.main_name = self["weights"][0], "weights[0]"
        self.directions = 2 if self["bidirectional"] else 1

    # ---- checks: in the order of the skin. What the numbers in lengths say, and which instruction set packed the
    # weights, is checked there alone.

    def check(self) -> None:
        self.check_dtype()
        mode = self.mode = self["mode"]
        self.require(mode in CELLS, f"mode is '{mode}', {MODES}")
        self.cell = CELLS[mode]
        if self.weights is not None:
            self._check_weights(self.weights)
        else:
            self._take_sizes()
        if self.main_name == "input":
            self._check_input()
        if self["packed"] is not None:
            self._check_packed(self["packed"])
        if "dropout_p" in self.named:
            self.check_dropout()
            self._check_rates(self["rates"])
        if "weight_dropout" in self.named:
            self.check_dropout("weight_dropout")
        self.require(
            self.cell.is_lstm or not self["need_cells"],
            f"need_cells is given but mode is {mode}; only the LSTM has a cell state",
        )
        if "saved" in self.named:
            self._check_saved()

    @property
    def rates(self) -> dict[str, float]:
        return dict(zip(RATES, self["rates"] or (0.0,) * len(RATES), strict=True))

    def _check_rates(self, rates: list[float] | None) -> None:
        if rates is None:
            return
        names = f"{', '.join(RATES[:-1])} and {RATES[-1]}"
        self.require(len(rates) == len(RATES), f"rates has {len(rates)} numbers, expected {len(RATES)}; pass {names}")
        for name, rate in self.rates.items():
            self.check_dropout(name, rate, needs_seed=self["seed"] is not None or "zoneout" not in name)
        self.require(
            rates[1] == 0 or self.cell.is_lstm,
            f"cell_zoneout is {rates[1]} but mode is {self['mode']}; only the LSTM has a cell state",
        )

    def _take_sizes(self) -> None:
        hidden, proj, layers = self["hidden_size"], self["proj_size"], self["num_layers"]
        self.require(1 <= hidden <= MOST_HIDDEN, f"hidden_size is {hidden}, the limits are 1 and {MOST_HIDDEN}")
        self.require(
            proj == 0 or (self.cell.is_lstm and 0 < proj < hidden),
            f"proj_size is {proj}, allowed are 0 and, for the LSTM, less than hidden_size, {hidden}",
        )
        self.require(1 <= layers <= MOST_LAYERS, f"num_layers is {layers}, the limits are 1 and {MOST_LAYERS}")
        self.hidden, self.state, self.layers = hidden, proj or hidden, layers

    def _check_weights(self, weights: list[Tensor]) -> None:
        gates, w_hh = self.cell.gates, weights[1] if len(weights) > 1 else weights[0]
        for i in range(min(2, len(weights))):
            self.require(
                weights[i].dim() == 2 and weights[i].shape[0] >= gates and weights[i].shape[0] % gates == 0,
                f"weights[{i}] has shape {list(weights[i].shape)}, expected [{gates} * hidden_size, width]; "
                "pass torch's flat weights",
            )
        self.hidden, self.state = w_hh.shape[0] // gates, w_hh.shape[1]
        projected = self.state != self.hidden
        self.require(
            not projected or (self.cell.is_lstm and 0 < self.state < self.hidden),
            f"weights[1] has shape {list(w_hh.shape)}, expected [{w_hh.shape[0]}, {self.hidden}], or fewer columns for "
            "an LSTM with a projection",
        )
        each = self.cell.weights(bool(self["bias"]), projected)
        self.require(
            len(weights) % (each * self.directions) == 0,
            f"weights has {len(weights)} tensors, expected a multiple of {each * self.directions}: {each} for each "
            "layer and direction; pass torch's flat weights",
        )
        self.layers = len(weights) // (each * self.directions)
        self.inputs = weights[0].shape[1]
        for i, weight in enumerate(weights):
            shape = self._weight_shape(i // each // self.directions, i % each)
            name, main = f"weights[{i}]", self.main
            self.check_device(name, weight)
            self.require(
                tuple(weight.shape) == shape,
                f"{name} has shape {list(weight.shape)}, expected {list(shape)}; pass torch's flat weights",
            )
            self.require(
                weight.dtype == main.dtype,
                f"{name} is {weight.dtype}, {self.main_name} is {main.dtype}; convert one with .to()",
            )

    def _weight_shape(self, layer: int, place: int) -> tuple[int, ...]:
        rows = self.cell.gates * self.hidden
        inputs = self.directions * self.state if layer else self.inputs
        biases = [(rows,), (rows,)] if self["bias"] else []
        projection = [(self.state, self.hidden)] if self.state != self.hidden else []
        peepholes = (self.cell.peephole_gates * self.hidden,)
        gains = [(rows,), (rows,), (self.hidden,), (self.hidden,)] if self.cell.layernorm else []
        first = [(rows, inputs), (rows, self.state), *biases, *projection]
        return [*first, *([peepholes] if self.cell.peepholes else []), *gains][place]

    @property
    def is_packed(self) -> bool:
        return self.main.dim() == 2

    @property
    def batch(self) -> int:
        return self["lengths"].numel() if self.is_packed else self.main.shape[1]

    @property
    def rows(self) -> int:
        return self.main.shape[0] if self.is_packed else self.main.shape[0] * self.main.shape[1]

    def _state_shape(self, width: int) -> tuple[int, ...]:
        return (self.layers * self.directions, self.batch, width)

    def _check_input(self) -> None:
        given, lengths = self.main, self["lengths"]
        self.require(
            given.dim() == 3 or (given.dim() == 2 and lengths is not None),
            f"input has shape {list(given.shape)}, expected [steps, batch, width], or packed [rows, width] beside "
            "lengths; unsqueeze or reshape it",
        )
        if self.weights is None:
            self.inputs = given.shape[-1]
        self.require(
            given.shape[-1] == self.inputs,
            f"input has width {given.shape[-1]}, weights[0] has {self.inputs} columns; they must be equal",
        )
        if lengths is not None:
            self.require(
                lengths.device.type in ("cpu", "meta"),
                f"lengths is on {lengths.device}, expected on the CPU, where the steps are planned; move it with "
                ".cpu()",
            )
            self.require(lengths.dtype == torch.int64, f"lengths is {lengths.dtype}, expected int64; convert it")
            self.require(
                lengths.dim() == 1 and lengths.numel() == self.batch,
                f"lengths has shape {list(lengths.shape)}, expected [{self.batch}]; pass one for each batch entry",
            )
        self._check_states("one state for each layer and direction")

    def _check_states(self, remedy: str) -> None:
        mode = self["mode"]
        for name, width in (("h0", self.state), ("c0", self.hidden)):
            if self[name] is None:
                continue
            self.require(
                name == "h0" or self.cell.is_lstm, f"c0 is given but mode is {mode}; only the LSTM has a cell state"
            )
            self._check_like(name, self._state_shape(width), self.main.dtype, remedy)

    def _check_like(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, remedy: str) -> None:
        tensor = self[name]
        self.check_device(name, tensor)
        self.require(
            tuple(tensor.shape) == shape,
            f"{name} has shape {list(tensor.shape)}, expected {list(shape)}; pass {remedy}",
        )
        self.require(tensor.dtype == dtype, f"{name} is {tensor.dtype}, expected {dtype}; convert it with .to()")

    def _packed_bytes(self) -> int:
        gates, wide = self.cell.gates, wide_dtype(self.main.dtype).itemsize

        def columns(gates: int, out: int) -> int:
            return gates * _round_up(out, 64 if gates == 1 else 16)

        def matrix(gates: int, out: int, width: int) -> int:
            return _round_up(width, 2) * columns(gates, out) * self.main.dtype.itemsize

        total = HEADER_BYTES
        for layer in range(self.layers):
            inputs = self.directions * self.state if layer else self.inputs
            one = matrix(gates, self.hidden, inputs) + matrix(gates, self.hidden, self.state)
            one += matrix(1, self.state, self.hidden) if self.state != self.hidden else 0
            one += self.cell.peephole_gates * _round_up(self.hidden, 64) * wide
            if self.cell.layernorm:
                one += 4 * columns(gates, self.hidden) * wide
                one += 2 * _round_up(self.hidden, 64) * wide if self.cell.is_lstm else 0
            total += self.directions * (one + 2 * columns(gates, self.hidden) * wide)
        return total

    def _check_packed(self, packed: Tensor) -> None:
        self.check_device("packed", packed)
        expected = self._packed_bytes()
        self.require(
            packed.dtype == torch.uint8 and packed.dim() == 1 and packed.numel() == expected and packed.is_contiguous(),
            f"packed is {packed.dtype} of shape {list(packed.shape)}, expected uint8 of shape [{expected}]; pass what "
            "rnn_pack made of this stack's weights",
        )

    def _saved_numbers(self) -> int:
        each = self.state + self.cell.kept(self.rates["zoneout"]) * self.hidden + self.cell.normed(self.hidden)
        return self.layers * self.rows * self.directions * each

    def _check_saved(self) -> None:
        shapes = {
            "grad_output": self._output_shape(self.state),
            "grad_hn": self._state_shape(self.state),
            "grad_cn": self._state_shape(self.hidden),
            "grad_cells": self._output_shape(self.hidden),
            "saved": (self._saved_numbers(),),
        }
        for name, shape in shapes.items():
            if self[name] is not None:
                dtype = wide_dtype(self.main.dtype) if name == "saved" else self.main.dtype
                self._check_like(name, shape, dtype, "what the forward returned, with need_saved")

    def _output_shape(self, width: int) -> tuple[int, ...]:
        return (*self.main.shape[:-1], self.directions * width)

    # ---- fakes

    def copies(self) -> list[str]:
        given = {name: self[name] for name in ("input", "grad_output", "grad_cells") if self[name] is not None}
        return [
            f"{name} is copied once: its last stride is {tensor.stride(-1)}, not 1"
            for name, tensor in given.items()
            if tensor.numel() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1
        ]

    def fake(self) -> Tensor | tuple[Tensor, ...]:
        main = self.main
        if self.op == "rnn_pack":
            return main.new_empty(self._packed_bytes(), dtype=torch.uint8)
        if self.op == "rnn_inference":
            return _empty_like(main, self._output_shape(self.state)), *self._fake_states()
        if self.op == "rnn":
            saved = self._saved_numbers() if self["need_saved"] else 0
            cells = self._output_shape(self.hidden)
            return (
                _empty_like(main, self._output_shape(self.state)),
                *self._fake_states(),
                _empty_like(main, cells) if self["need_cells"] else main.new_empty(0),
                main.new_empty(saved, dtype=wide_dtype(main.dtype)),
            )
        assert self.weights is not None
        wanted = (
            ("need_h0", self._state_shape(self.state)),
            ("need_c0", self._state_shape(self.hidden)),
            ("need_weights", (sum(weight.numel() for weight in self.weights),)),
        )
        return (
            _empty_like(main, tuple(main.shape)) if self["need_input"] else main.new_empty(0),
            *(main.new_empty(shape if self[name] else 0) for name, shape in wanted),
        )

    def _fake_states(self) -> tuple[Tensor, Tensor]:
        cell = self._state_shape(self.hidden) if self.cell.is_lstm else 0
        return self.main.new_empty(self._state_shape(self.state)), self.main.new_empty(cell)


class RnnCellArguments(RnnArguments):
    """One step of one layer: input [batch, width], states [batch, hidden]."""

    def _take_sizes(self) -> None:
        self.named |= {"proj_size": 0, "num_layers": 1}
        super()._take_sizes()

    def _check_input(self) -> None:
        shape = list(self.main.shape)
        self.require(len(shape) == 2, f"input has shape {shape}, expected [batch, width]; unsqueeze or reshape it")
        self.inputs = shape[1]
        self._check_states("the state of each row")

    def _state_shape(self, width: int) -> tuple[int, ...]:
        return (self.main.shape[0], width)

    def fake(self) -> tuple[Tensor, ...]:
        return self._fake_states()


def _empty_like(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A result that has the rows of a batch entry together in memory if `tensor` has; else contiguous."""
    if len(shape) == 3 and tensor.stride(0) < tensor.stride(1):
        steps, batch, width = shape
        return tensor.new_empty((batch, steps, width)).transpose(0, 1)
    return tensor.new_empty(shape)


def packed_bytes(weights: list[Tensor], mode: str, bidirectional: bool, bias: bool) -> int:
    """The size of what rnn_pack makes of these weights."""
    arguments = RnnArguments(rnn_pack, (weights, mode, bidirectional, bias, 0.0, None))
    arguments.check()
    return arguments._packed_bytes()


for _op in RNN_OPS.values():
    register(_op, RnnCellArguments if _op is rnn_cell else RnnArguments, gpu=("cuda", "triton"))
