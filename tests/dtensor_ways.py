"""What tests/test_distributed.py does in each of two processes with DTensors: every op's sharding rules, by values and
gradients beside those of whole tensors; what is refused; and parallelize_module, also compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement

from handtuned import nn
from handtuned.nn import functional as H

PROCESSES, WIDTH = 2, 16
R = Replicate()
Call = Callable[..., Any]


def pair() -> DeviceMesh:
    return init_device_mesh("cpu", (PROCESSES,))


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    """The same in every process."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def spread(t: Tensor, mesh: DeviceMesh, way: Placement) -> DTensor:
    found = distribute_tensor(t.detach().clone(), mesh, [way])
    found.requires_grad_(t.requires_grad)
    return found


def tensors(found: Any) -> list[Any]:
    return [found] if isinstance(found, Tensor) else [t for part in found for t in tensors(part)]


def assert_same(
    call: Call, whole: Sequence[Tensor], ways: Sequence[Placement], placed: Placement | None = None
) -> None:
    """Results of call, and the gradients of what asks for one, of whole tensors and of DTensors.

    placed: where the first result must be, if not for the way there from elsewhere.
    """
    mesh = pair()
    parts = [spread(t, mesh, way) for t, way in zip(whole, ways, strict=True)]
    expected, found = tensors(call(*whole)), tensors(call(*parts))
    assert placed is None or found[0].placements == (placed,)
    for part, one in zip(found, expected, strict=True):
        torch.testing.assert_close(part.full_tensor(), one, rtol=1e-5, atol=1e-5)
    grads = [torch.linspace(-1, 1, max(one.numel(), 1))[: one.numel()].view(one.shape) for one in expected]
    of_parts = [
        spread(g, mesh, R if part.placements[0].is_partial() else part.placements[0])
        for g, part in zip(grads, found, strict=True)
    ]
    of_whole, of_parts = (
        torch.autograd.grad(outputs, [t for t in inputs if t.requires_grad], incoming, allow_unused=True)
        for outputs, inputs, incoming in ((expected, whole, grads), (found, parts, of_parts))
    )
    for part, one in zip(of_parts, of_whole, strict=True):
        assert (part is None) == (one is None)
        if part is not None:
            torch.testing.assert_close(part.full_tensor(), one, rtol=1e-5, atol=1e-5)


def trainable(ts: Sequence[Tensor]) -> list[Tensor]:
    return [t.requires_grad_() for t in ts]


# ---- ops -------------------------------------------------------------------------------------------------------------


def sharded_rows(rank: int, folder: str) -> None:
    """Norms behind a residual add, and a linear layer with all that may follow it, split along each dim."""
    rows = (3, 5, WIDTH)  # of which the processes have unequal parts
    whole = trainable(drawn(rows, rows, (WIDTH,), (WIDTH,), (WIDTH, WIDTH)))
    linears: list[Call] = [
        lambda x, r, w, b, m: H.linear(x, m, b, activation="gelu", residual=r),
        lambda x, r, w, b, m: H.linear(x, m, b, residual=r),
    ]
    norms: list[Call] = [
        lambda x, r, w, b, m: H.add_layer_norm(x, r, (WIDTH,), w, b),
        lambda x, r, w, b, m: H.add_rms_norm(x, r, (WIDTH,), w),
    ]
    for dim in range(3):
        for weight in (R, Shard(0), Shard(1)):
            for call in linears + norms * (weight == R):
                assert_same(call, whole, [Shard(dim), Shard(dim), R, R, weight])


def sharded_int8_and_losses(rank: int, folder: str) -> None:
    """By rows; a mean over all of them is the sum over each process's, divided."""
    x, residual, w, b, scaled = drawn((3, 5, 6), (3, 5, 7), (7, 6), (7,), (7,))
    x, residual, b, weight = *trainable([x, residual, b]), w
    quantized, scale = H.quantize_linear_weight(w)
    packed = H.pack_int8_weight(quantized)
    call: Call = lambda x, p, s, b, r: H.linear_int8(x, p, s, b, activation="gelu", residual=r)  # noqa: E731
    for dim in range(2):
        assert_same(call, [x, packed, scale, b, residual], [Shard(dim), R, R, R, R], Shard(dim))
    target, weight = torch.tensor([[0, 1, 2, -100, 4], [6, -100, 4, 1, 1], [5, 5, 5, 2, 0]]), w.clone().requires_grad_()
    for reduction, placed in (("none", Shard(1)), ("sum", Partial()), ("mean", None)):
        options: dict[str, Any] = dict(reduction=reduction, label_smoothing=0.1, z_loss=0.1)
        loss: Call = lambda x, w, t, b, c, o=options: H.linear_cross_entropy(x, w, t, linear_bias=b, weight=c, **o)  # noqa: E731
        assert_same(loss, [x, weight, target, b, scaled.abs()], [Shard(1), R, Shard(1), R, R], placed)
        plain: Call = lambda x, w, t, o=options: H.linear_cross_entropy(x, w, t, **o)  # noqa: E731
        assert_same(plain, [x, weight, target], [Shard(0), R, R])


def sharded_attention(rank: int, folder: str) -> None:
    """By batch entries and by heads, with all that may stand beside q, k and v; rows that are packed; rotated ones."""
    whole = drawn((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), (4, 5, 7), (4,))
    others = [torch.tensor([7, 3]), torch.arange(1.0, 5.0) / 8]

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor, lengths: Tensor, slopes: Tensor) -> Any:
        options: dict[str, Any] = dict(sinks=sinks, key_lengths=lengths, alibi_slopes=slopes)
        return H.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **options)

    for dim in (0, 1):
        way = Shard(dim)
        assert_same(attention, [*trainable(whole), *others], [way, way, way, R, R, R, R], way)
    rows, starts = torch.randn(7, 4, 8).requires_grad_(), torch.tensor([0, 3, 7])
    torch.distributed.broadcast(rows.data, 0)
    assert_same(lambda x, s: H.attention_varlen(x, x, x, s, s), [rows, starts], [Shard(1), R], Shard(1))
    tables = H.rotary_tables(5, 8)
    for dim in range(3):
        assert_same(H.rotary_embedding, [whole[0], *tables], [Shard(dim), R, R], Shard(dim))


def sharded_caches(rank: int, folder: str) -> None:
    """New keys are written where a cache is, and by heads also where its pages are."""
    mesh = pair()
    q, k, v, pages, pages_v = drawn((4, 4, 2, 8), (4, 2, 2, 8), (4, 2, 2, 8), (9, 2, 4, 8), (9, 2, 4, 8))
    table = torch.arange(8).view(4, 2)
    caches = torch.zeros(4, 2, 8, 8)
    rotary = H.rotary_tables(8, 8)
    for way, held, blocks in (
        (Shard(0), (caches, caches), None),
        (Shard(1), (caches, caches), None),
        (Shard(1), (pages, pages_v), table),
    ):
        keys, values = (t.clone() for t in held)
        spread_caches = [spread(t, mesh, way) for t in held]
        for length in (0, 2):
            lengths = torch.full((4,), length)
            given = [q, k, v, lengths, *rotary, *([] if blocks is None else [blocks])]
            expected = stepped(keys, values, *given)
            found: Any = stepped(*spread_caches, *(spread(t, mesh, R) for t in given))
            assert found.placements == (way,)
            torch.testing.assert_close(found.full_tensor(), expected)
        for part, one in zip(spread_caches, (keys, values), strict=True):
            torch.testing.assert_close(part.full_tensor(), one)


@torch.no_grad()
def stepped(
    keys: Tensor,
    values: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    cos: Tensor,
    sin: Tensor,
    table: Tensor | None = None,
) -> Any:
    options: dict[str, Any] = dict(cache_lengths=lengths, rotary_cos=cos, rotary_sin=sin, block_table=table)
    return H.attention_with_kv_cache(q, keys, values, k, v, **options)


def sharded_recurrent(rank: int, folder: str) -> None:
    """By batch entries: stacks as functions, with lengths; modules, whose weights are the same in each process."""
    x, h, c = trainable(drawn((4, 3, 3), (4, 3, 5), (4, 3, 5)))
    lengths = torch.tensor([4, 2, 3])
    for name, gates in (("lstm", 4), ("gru", 3)):
        sizes = [(gates * 5, inputs) for inputs in (3, 3, 10, 10)]
        ws = trainable(
            drawn(*((shape) for rows, inputs in sizes for shape in ((rows, inputs), (rows, 5), (rows,), (rows,))))
        )

        def run(x: Tensor, h: Tensor, c: Tensor, lengths: Tensor, *ws: Tensor, name: str = name) -> Any:
            state = (h, c) if name == "lstm" else h
            return getattr(H, name)(x, state, ws, True, 2, bidirectional=True, lengths=lengths)

        assert_same(run, [x, h, c, lengths, *ws], [Shard(1), *[R] * (3 + len(ws))], Shard(1))
    mesh, (rows,) = pair(), drawn((3, 6))
    torch.manual_seed(0)
    for module in (nn.LSTMCell(6, 5), nn.RNNCell(6, 5), nn.RNN(6, 5)):
        split = distribute_module(copy.deepcopy(module), mesh)
        x, at = (rows[None], 1) if isinstance(module, nn.RNN) else (rows, 0)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                expected, found = tensors(module(x)), tensors(split(spread(x, mesh, Shard(at))))
            for part, one in zip(found, expected, strict=True):
                torch.testing.assert_close(part.full_tensor(), one)
        for output in (expected[0], found[0]):
            output.sum().backward()
        for mine, whole in zip(split.parameters(), module.parameters(), strict=True):
            assert isinstance(mine.grad, DTensor)
            torch.testing.assert_close(mine.grad.full_tensor(), whole.grad)


def refused(rank: int, folder: str) -> None:
    """What no process could do alone."""
    mesh = pair()
    (x,) = drawn((4, 2, 6, 8))
    q, cache = (spread(x, mesh, Shard(dim)) for dim in (0, 2))
    for call in (
        lambda: H.scaled_dot_product_attention(q, q, q, dropout_p=0.5),
        lambda: H.rnn(
            q[0], None, [spread(t, mesh, R) for t in drawn((8, 8), (8, 8))], False, training=True, zoneout=0.5
        ),
    ):
        with pytest.raises(RuntimeError, match="know which elements of the mask are its own"):
            call()
    lengths = spread(torch.zeros(4, dtype=torch.int64), mesh, R)
    with pytest.raises(RuntimeError, match="both replicated or split by heads or batch entries"):
        H.attention_with_kv_cache(q, cache, cache, q, q, cache_lengths=lengths)


# ---- modules ---------------------------------------------------------------------------------------------------------


def check_split(rank: int, split: Call, alone: torch.nn.Module, sequence: bool = False) -> None:
    """Output, and the gradients of input and parameters, of a split module beside those of the whole one.

    sequence: each process passes its part of dim 1.
    """
    x, grad = drawn((4, 6, WIDTH), (4, 6, WIDTH))
    expected_in = x.clone().requires_grad_()
    alone.zero_grad()
    expected = alone(expected_in)
    expected.backward(grad)
    mine = lambda t: t.chunk(PROCESSES, 1)[rank] if sequence else t  # noqa: E731
    found_in = mine(x).clone().requires_grad_()
    found = split(found_in)
    local = found.to_local() if isinstance(found, DTensor) else found
    local.backward(mine(grad))
    torch.testing.assert_close(local, mine(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_in.grad, mine(expected_in.grad), rtol=1e-5, atol=1e-5)
    whole = dict(alone.named_parameters())
    for name, parameter in split.named_parameters() if isinstance(split, torch.nn.Module) else ():
        if name.removeprefix("_orig_mod.") in whole:
            given = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            torch.testing.assert_close(given, whole[name.removeprefix("_orig_mod.")].grad, rtol=1e-5, atol=1e-5)
            parameter.grad = None
    with torch.no_grad():
        found = split(mine(x).contiguous())
        local = found.to_local() if isinstance(found, DTensor) else found
        torch.testing.assert_close(local, mine(expected), rtol=1e-5, atol=1e-5)


def tensor_parallel(rank: int, folder: str) -> None:
    """Linear layers split by columns, then by rows; norms by the sequence; and all of that in one compiled graph, which
    finds the rules by itself."""
    torch.manual_seed(0)
    mesh = pair()
    alone = torch.nn.Sequential(
        nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), torch.nn.GELU(), nn.Linear(24, WIDTH), nn.RMSNorm(WIDTH)
    )
    ways = {"1": ColwiseParallel(), "3": RowwiseParallel()}
    split = parallelize_module(copy.deepcopy(alone), mesh, ways)
    parts: list[tuple[torch.nn.Module, torch.nn.Module, bool]] = [(split, alone, False)]
    for norm in (nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)):
        parts.append((parallelize_module(copy.deepcopy(norm), mesh, SequenceParallel()), norm, True))
    for split, alone, sequence in parts:
        check_split(rank, torch.compile(split, fullgraph=True, backend="aot_eager"), alone, sequence)
        check_split(rank, split, alone, sequence)
