"""For tests: samples of every op, and the choice of an instruction set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import _C, ops, reference

Sample = tuple[Any, tuple[Any, ...], dict[str, Any]]


@contextmanager
def isa(name: str) -> Iterator[None]:
    """Runs the CPU kernels of one instruction set inside; ValueError if this machine cannot. Process-wide."""
    before = _C.isa()
    _C.select_isa(name)
    try:
        yield
    finally:
        _C.select_isa(before)


def available_isas() -> list[str]:
    """The instruction sets that are built and that this machine can run, best first."""
    return [row["name"] for row in _C.isa_table() if row["built"] and row["supported"]]


def op_samples(device: str = "cpu") -> Iterator[Sample]:
    """(op, args, kwargs) for every op, over dtypes, optional arguments and odd shapes; for opcheck and fuzzing."""
    yield from _norm_samples(device)
    yield from _attention_samples(device)
    yield from _rnn_samples(device)
    yield from _linear_samples(device)
    yield from _linear_int8_samples(device)
    yield from _cross_entropy_samples(device)
    yield from _rotary_samples(device)


def _drawer(device: str) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return draw


def _norm_samples(device: str) -> Iterator[Sample]:
    draw = _drawer(device)
    seed = torch.tensor([1234567890123], device=device)
    cases = [
        ((3, 5), 1, torch.float32, torch.float32, True),
        ((2, 3, 4), 2, torch.float64, torch.float64, True),
        ((4, 33), 1, torch.bfloat16, torch.float32, True),
        ((4, 1), 1, torch.float16, torch.float16, False),
        ((0, 7), 1, torch.float32, torch.float32, True),
    ]
    for shape, ndim, dtype, weight_dtype, affine in cases:
        x, r, dy, dh = (draw(*shape, dtype=dtype) for _ in range(4))
        w, b = (draw(*shape[-ndim:], dtype=weight_dtype) if affine else None for _ in range(2))
        yield ops.layer_norm, (x, ndim, w, b, 1e-5), {}
        yield ops.layer_norm_inference, (x, ndim, w, b, 1e-5), {}
        stats = ops.layer_norm(x, ndim, w, b, 1e-5)[1]
        yield ops.layer_norm_backward, (dy, x, ndim, stats, w, True, affine, affine), {}
        yield ops.rms_norm, (x, ndim, w, 1e-6), {}
        yield ops.rms_norm_inference, (x, ndim, w, 1e-6), {}
        rstd = ops.rms_norm(x, ndim, w, 1e-6)[1]
        yield ops.rms_norm_backward, (dy, x, ndim, rstd, w, True, affine), {}
        for p in (0.0, 0.3):
            key = seed if p else None
            yield ops.add_layer_norm, (x, r, ndim, w, b, 1e-5, p, key), {}
            _, h, stats = ops.add_layer_norm(x, r, ndim, w, b, 1e-5, p, key)
            yield (
                ops.add_layer_norm_backward,
                (dy, dh, h, ndim, stats, w, p, key, True, True, affine, affine),
                {},
            )
            yield ops.add_rms_norm, (x, r, ndim, w, 1e-6, p, key), {}
            _, h, rstd = ops.add_rms_norm(x, r, ndim, w, 1e-6, p, key)
            yield ops.add_rms_norm_backward, (dy, None, h, ndim, rstd, w, p, key, True, False, affine), {}


def _attention_samples(device: str) -> Iterator[Sample]:
    draw = _drawer(device)

    def ints(*values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, device=device, dtype=dtype)

    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    seed = ints(1234567890123, dtype=torch.int64)
    starts, key_starts = ints(0, 2, 2, 5), ints(0, 3, 4, 4, dtype=torch.int64)
    # query, key, value; what differs from plain attention
    dense: list[tuple[Any, ...]] = [
        ((2, 4, 3, 5), (2, 2, 6, 5), (2, 2, 6, 7), f32, {"bottom_right": True, "window_right": 0}),
        ((1, 2, 5, 8), (1, 2, 4, 8), (1, 2, 4, 8), f64, {"mask": draw(2, 1, 4, dtype=f64), "softcap": 3.0}),
        ((2, 3, 1, 16), (2, 1, 9, 16), (2, 1, 9, 16), bf16, {"key_lengths": ints(9, 0), "sinks": draw(3, dtype=f32)}),
        ((1, 2, 4, 1), (1, 2, 4, 1), (1, 2, 4, 3), f16, {"mask": draw(4, 4, dtype=f16) > 0, "window_left": 1}),
        ((1, 2, 6, 4), (1, 1, 6, 4), (1, 1, 6, 4), f32, {"dropout_p": 0.3, "seed": seed}),
        ((0, 2, 3, 4), (0, 2, 3, 4), (0, 2, 3, 4), f32, {}),
        ((2, 2, 3, 4), (2, 2, 0, 4), (2, 2, 0, 4), f32, {"alibi_slopes": draw(2, dtype=f32).abs()}),
    ]
    packed = {"query_starts": starts, "key_starts": key_starts, "bottom_right": True}
    dense += [
        ((6, 2, 4), (5, 1, 4), (5, 1, 3), f32, packed | {"window_right": 0, "mask": draw(2, 1, 1, dtype=f32)}),
        ((5, 2, 4), (4, 2, 4), (4, 2, 4), bf16, packed | {"dropout_p": 0.3, "seed": seed}),
    ]
    for *shapes, dtype, changes in dense:
        query, key, value = (draw(*shape, dtype=dtype) for shape in shapes)
        inside = len(shapes[0]) == 4 and dtype == f32  # heads inside the rows, as most models have them
        if inside:
            query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
        yield from _attention_and_backward(query, key, value, draw, changes)
    pages, table = draw(4, 2, 3, 8, dtype=f32), ints([2, 0], [3, -1])
    paged = {"block_table": table, "key_lengths": ints(5, 2)}
    yield ops.attention, (draw(2, 4, 1, 8, dtype=f32), pages, pages + 1, *_attention_options(paged)), {}


def _attention_options(changes: dict[str, Any]) -> tuple[Any, ...]:
    plain = {
        "scale": 0.3,
        "bottom_right": False,
        "window_left": -1,
        "window_right": -1,
        "softcap": 0.0,
        "dropout_p": 0.0,
    }
    names = [a.name for a in ops.attention._schema.arguments][3:]
    return tuple(changes.get(name, plain.get(name)) for name in names)


def _attention_and_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    draw: Callable[..., torch.Tensor],
    changes: dict[str, Any],
) -> Iterator[Sample]:
    options = _attention_options(changes)
    yield ops.attention, (query, key, value, *options), {}
    output, lse = ops.attention(query, key, value, *options)
    needs = (True, True, True, options[0] is not None and options[0].dtype != torch.bool, options[6] is not None)
    given = (draw(*output.shape, dtype=output.dtype), draw(*lse.shape, dtype=lse.dtype), query, key, value, output, lse)
    without_pages = (*options[:4], *options[5:])  # block_table is for inference alone
    yield ops.attention_backward, (*given, *without_pages, *needs), {}
    yield ops.attention_backward, (given[0], None, *given[2:], *without_pages, False, True, False, False, False), {}


def _rnn_samples(device: str) -> Iterator[Sample]:
    draw = _drawer(device)
    seed = torch.tensor([1234567890123], device=device)
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values)

    # mode; steps (None: packed rows), batch, input, hidden, projection; layers, two directions, biases; what else
    cases: list[tuple[Any, ...]] = [
        ("LSTM", (3, 2, 5, 7, 0), (1, False, True), f32, {"states": True}),
        ("LSTM", (4, 3, 4, 6, 2), (2, True, True), f32, {"lengths": ints(2, 0, 4)}),
        ("GRU", (3, 2, 5, 17, 0), (2, True, False), f64, {"states": True}),
        ("GRU", (None, 3, 3, 4, 0), (1, True, True), f32, {"lengths": ints(3, 2, 1)}),
        ("RNN_TANH", (3, 2, 5, 9, 0), (2, False, True), bf16, {"dropout_p": 0.3}),
        ("RNN_RELU", (2, 1, 1, 1, 0), (1, False, True), f16, {"states": True}),
        ("LSTM", (2, 0, 3, 4, 0), (1, False, True), f32, {}),
        ("GRU", (2, 1, 0, 4, 0), (1, False, True), f32, {}),
        ("LSTM", (0, 2, 3, 4, 0), (1, False, True), f32, {"states": True}),
        (
            "LSTM coupled peepholes layernorm",
            (3, 2, 5, 7, 3),
            (2, True, False),
            f32,
            {"rates": (0.1, 0.2, 0.3, 0.4), "seed": seed},
        ),
        (
            "LSTM peepholes hardtanh",
            (3, 2, 5, 7, 0),
            (1, False, True),
            bf16,
            {"states": True, "rates": (0.1, 0.2, 0, 0)},
        ),
        (
            "GRU hardsigmoid layernorm",
            (None, 3, 3, 4, 0),
            (1, True, True),
            f32,
            {"lengths": ints(3, 2, 1), "rates": (0.5, 0, 0, 0)},
        ),
        (
            "RNN_TANH hardtanh layernorm",
            (3, 2, 5, 9, 0),
            (2, False, True),
            f64,
            {"rates": (0.1, 0, 0.5, 0.5), "seed": seed},
        ),
    ]
    for mode, (steps, batch, width, hidden, proj), (layers, two, bias), dtype, more in cases:
        lengths, p, rates, cell = more.get("lengths"), more.get("dropout_p", 0.0), more.get("rates"), ops.CELLS[mode]
        key = seed if p else more.get("seed")
        directions, state = 1 + two, proj or hidden
        x = draw(*((6,) if steps is None else (steps, batch)), width, dtype=dtype)
        if steps == 3:  # batch first, as many callers have it
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        h0, c0 = (draw(layers * directions, batch, n, dtype=dtype) for n in (state, hidden))
        states = (h0 if more.get("states") else None, c0 if more.get("states") and cell.is_lstm else None)
        rows, weights = cell.gates * hidden, []
        for layer in range(layers):
            for _ in range(directions):
                weights += [draw(rows, directions * state if layer else width, dtype=dtype) / 4]
                weights += [draw(rows, state, dtype=dtype) / 4]
                weights += [draw(rows, dtype=dtype) for _ in range(2 * bias)]
                weights += [draw(proj, hidden, dtype=dtype)] if proj else []
                weights += [draw(cell.peephole_gates * hidden, dtype=dtype)] if cell.peepholes else []
                weights += [draw(n, dtype=dtype) for n in (rows, rows, hidden, hidden)[: cell.gains(bias)]]
        packing = (weights, mode, two, bias, rates[-1] if rates else 0.0, key)
        yield ops.rnn_pack, packing, {}
        packed, cells = ops.rnn_pack(*packing), cell.is_lstm and steps != 0
        given = (x, lengths, *states, packed, mode, hidden, proj, layers, two, p, rates, key)
        yield ops.rnn, (*given, False, False), {}
        yield ops.rnn, (*given, True, cells), {}
        yield ops.rnn_inference, given[:-3], {}
        output, hn, cn, all_cells, saved = ops.rnn(*given, True, cells)
        grads = [draw(*t.shape, dtype=dtype) if cell.is_lstm else None for t in (cn, all_cells)]
        grads = [draw(*output.shape, dtype=dtype), None, grads[0], grads[1] if cells else None]
        kept = (x, lengths, *states, weights, saved, mode, two, bias, p, rates, key)
        yield ops.rnn_backward, (*grads, *kept, True, states[0] is not None, states[1] is not None, True), {}
        yield ops.rnn_backward, (None, draw(*hn.shape, dtype=dtype), None, None, *kept, False, False, False, True), {}
        if not proj:
            packed = ops.rnn_pack(weights[: cell.weights(bias, False)], mode, False, bias, 0.0, None)
            first = (None if state is None else state[0] for state in states)
            yield ops.rnn_cell, (draw(batch, width, dtype=dtype), *first, packed, mode, hidden), {}


def _linear_samples(device: str) -> Iterator[Sample]:
    draw = _drawer(device)
    seed = torch.tensor([1234567890123], device=device)
    # rows, in, out, dtype, activation, dropout_p, bias, residual, packed
    cases = [
        ((3,), 5, 7, torch.float32, 0, 0.0, True, False, False),
        ((2, 4), 9, 70, torch.float32, 2, 0.3, True, True, True),
        ((6,), 5, 4, torch.float64, 4, 0.0, False, True, True),
        ((2, 3), 7, 3, torch.bfloat16, 3, 0.3, True, False, True),
        ((5,), 4, 6, torch.float16, 1, 0.0, True, True, False),
        ((0,), 4, 6, torch.float32, 2, 0.0, True, False, False),
    ]
    for rows, k, n, dtype, activation, p, has_bias, has_residual, has_packed in cases:
        x, w, dy = draw(*rows, k, dtype=dtype), draw(n, k, dtype=dtype), draw(*rows, n, dtype=dtype)
        bias = draw(n, dtype=dtype) if has_bias else None
        residual = draw(*rows, n, dtype=dtype) if has_residual else None
        key = seed if p else None
        yield ops.linear_pack, (w,), {}
        packed = ops.linear_pack(w) if has_packed else None
        args = (x, w, bias, residual, packed, activation, p, key)
        yield ops.linear, args, {}
        yield ops.linear_inference, args, {}
        z = ops.linear(*args)[1]
        yield ops.linear_backward, (dy, x, w, bias, z, activation, p, key, True, True, has_bias), {}
        yield ops.linear_backward, (dy, x, w, bias, z, activation, p, key, False, True, False), {}
    yield ops.linear_pack, (draw(0, 4, dtype=torch.float32),), {}


def _linear_int8_samples(device: str) -> Iterator[Sample]:
    draw = _drawer(device)
    seed = torch.tensor([1234567890123], device=device)
    # rows, in, out, dtype, activation, dropout_p, bias, residual
    cases = [
        ((3,), 5, 7, torch.float32, 0, 0.0, True, False),
        ((2, 4), 9, 70, torch.float32, 2, 0.3, True, True),
        ((2, 3), 7, 3, torch.bfloat16, 3, 0.3, True, False),
        ((9,), 4, 6, torch.float16, 1, 0.0, False, True),
        ((0,), 4, 6, torch.float32, 2, 0.0, True, False),
    ]
    for rows, k, n, dtype, activation, p, has_bias, has_residual in cases:
        q, scale = reference.quantize_weight(draw(n, k, dtype=torch.float32))
        yield ops.linear_int8_pack, (q,), {}
        given = (draw(*rows, k, dtype=dtype), ops.linear_int8_pack(q), scale)
        bias = draw(n, dtype=dtype) if has_bias else None
        residual = draw(*rows, n, dtype=dtype) if has_residual else None
        for quantize_input in (False, True):
            args = (bias, residual, activation, p, seed if p else None, quantize_input, not quantize_input)
            yield ops.linear_int8, (*given, *args), {}
    yield ops.linear_int8_pack, (torch.zeros(0, 4, dtype=torch.int8, device=device),), {}


def _cross_entropy_samples(device: str) -> Iterator[Sample]:
    draw = _drawer(device)
    # rows, in, classes, dtype; bias, class weights; reduction; label_smoothing, softcap, z_loss
    cases = [
        ((5,), 7, 9, torch.float32, (True, True), 0, (0.1, 0.0, 0.0)),
        ((2, 3), 8, 70, torch.float32, (False, False), 1, (0.0, 0.0, 0.0)),
        ((4,), 5, 3, torch.float64, (True, False), 2, (0.0, 2.0, 0.1)),
        ((3,), 6, 66, torch.bfloat16, (True, True), 1, (0.2, 0.0, 0.0)),
        ((6,), 9, 5, torch.float16, (False, True), 0, (0.0, 0.0, 0.0)),
        ((0,), 4, 5, torch.float32, (True, False), 1, (0.0, 0.0, 0.0)),
        ((), 4, 5, torch.float32, (False, False), 0, (0.0, 0.0, 0.0)),
    ]
    for rows, k, classes, dtype, (has_bias, has_weight), reduction, numbers in cases:
        x, w = draw(*rows, k, dtype=dtype), draw(classes, k, dtype=dtype)
        bias = draw(classes, dtype=dtype) if has_bias else None
        weight = draw(classes, dtype=dtype).abs() if has_weight else None
        target = torch.arange(x.numel() // k, device=device).reshape(rows) % classes
        given = (x, w, bias, torch.where(target == 1, -1, target), weight)
        options = (reduction, -1, *numbers)
        for keep in (0, 0 if numbers[1] else classes // 2, 0 if numbers[1] else classes):
            yield ops.linear_cross_entropy, (*given, *options, keep), {}
        loss, stats, kept = ops.linear_cross_entropy(*given, *options, keep)
        grad = draw(*loss.shape, dtype=loss.dtype)
        for needs in ((True, True, has_bias), (False, True, False)):
            yield ops.linear_cross_entropy_backward, (grad, *given, stats, kept, *options, *needs), {}


def _rotary_samples(device: str) -> Iterator[Sample]:
    draw = _drawer(device)
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    # input, tables, whether heads lie inside the rows; dtypes; interleaved
    cases: list[tuple[Any, ...]] = [
        ((2, 3, 5, 8), (5, 3), True, (f32, f32), True),
        ((2, 3, 4, 70), (2, 1, 4, 35), False, (f64, f64), False),
        ((4, 33), (4, 16), False, (bf16, f32), False),
        ((3, 2, 6), (2, 2), False, (f16, f16), True),
        ((0, 4, 6), (4, 3), False, (f32, f32), False),
    ]
    for shape, angles, inside, (dtype, table), interleaved in cases:
        x, cos, sin = draw(*shape, dtype=dtype), draw(*angles, dtype=table), draw(*angles, dtype=table)
        x = x.transpose(1, 2).contiguous().transpose(1, 2) if inside else x
        yield ops.rotary, (x, cos, sin, interleaved, False), {}
        yield ops.rotary, (x, cos, sin, interleaved, True), {}
    lengths, where = torch.tensor([3, 0], device=device), torch.tensor([[2, 0], [3, 1]], device=device)
    for dtype, angle, pages in ((f32, f32, None), (f64, f64, where), (bf16, f32, where.int()), (f16, None, None)):
        q, k, v = (draw(2, heads, 2, width, dtype=dtype) for heads, width in ((4, 8), (2, 8), (2, 6)))
        caches = [draw(4 if pages is not None else 2, 2, 5, width, dtype=dtype) for width in (8, 6)]
        tables = [None if angle is None else draw(5, 3, dtype=angle) for _ in range(2)]
        yield ops.append_kv, (q, k, v, *caches, lengths, pages, *tables, dtype == f32, True), {}
    empty = [draw(0, heads, 2, 8, dtype=f32) for heads in (4, 2, 2, 2, 2)]
    yield ops.append_kv, (*empty, lengths[:0], None, None, None, False, False), {}
