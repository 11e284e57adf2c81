"""handtuned's modules on several processes: two on this machine, talking through gloo, against one alone."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_docs import blocks
from torch import Tensor

from handtuned import nn
from handtuned.nn import functional as H

PROCESSES, WIDTH = 2, 16


def model() -> torch.nn.Module:
    """The same in every process: an encoder layer, a norm and a linear layer."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True)
    return torch.nn.Sequential(layer, nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(4, 6, WIDTH, generator=generator) for _ in range(2))
    return x, grad


def trained(net: torch.nn.Module, x: Tensor, grad: Tensor, steps: int = 2) -> list[float]:
    """The losses of some steps."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        loss = (net(x) * grad).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def mine(t: Tensor, rank: int, dim: int = 0) -> Tensor:
    return t.chunk(PROCESSES, dim)[rank]


# ---- what each process does ------------------------------------------------------------------------------------------


def data_parallel(rank: int, folder: str) -> None:
    x, grad = batch()
    alone = model()
    trained(alone, x, grad)
    wrapped = torch.nn.parallel.DistributedDataParallel(model())
    trained(wrapped, mine(x, rank), mine(grad, rank))
    torch.testing.assert_close(wrapped.module.state_dict(), alone.state_dict(), rtol=1e-5, atol=1e-6)


def fully_sharded(rank: int, folder: str) -> None:
    """FSDP2, and a checkpoint of its shards that a model on one process would read as well."""
    from torch.distributed.checkpoint import load, save
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    x, grad = batch()
    alone, sharded, again = model(), model(), model()
    for net in (sharded, again):
        for part in net:
            fully_shard(part)
        fully_shard(net)
    trained(alone, x, grad)
    trained(sharded, mine(x, rank), mine(grad, rank))
    whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.testing.assert_close(whole, alone.state_dict(), rtol=1e-5, atol=1e-6)
    save({"model": sharded.state_dict()}, checkpoint_id=folder)
    state = {"model": again.state_dict()}
    load(state, checkpoint_id=folder)
    again.load_state_dict(state["model"])
    with torch.no_grad():  # keeps packed weights in a module whose parameters come and go
        for net in (sharded, again, sharded):
            net.eval()
            torch.testing.assert_close(net(x), alone(x), rtol=1e-5, atol=1e-5)


def check_split(rank: int, split: torch.nn.Module, alone: torch.nn.Module, sequence: bool = False) -> None:
    """Output, and the gradients of input and parameters, of a split module beside those of the whole one.

    sequence: each process passes its part of dim 1.
    """
    from torch.distributed.tensor import DTensor

    x, grad = batch()
    expected_in = x.clone().requires_grad_()
    alone(expected_in).backward(grad)
    parts = [mine(t, rank, 1) if sequence else t for t in (x, grad, alone(x), expected_in.grad)]
    found_in = parts[0].clone().requires_grad_()
    found = split(found_in)
    local = found.to_local() if isinstance(found, DTensor) else found
    torch.testing.assert_close(local, parts[2], rtol=1e-5, atol=1e-5)
    local.backward(parts[1])
    torch.testing.assert_close(found_in.grad, parts[3], rtol=1e-5, atol=1e-5)
    whole = dict(alone.named_parameters())
    for name, parameter in split.named_parameters():
        if name in whole:
            given = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            torch.testing.assert_close(given, whole[name].grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        found = split(parts[0])
        local = found.to_local() if isinstance(found, DTensor) else found
        torch.testing.assert_close(local, parts[2], rtol=1e-5, atol=1e-5)


def tensor_parallel(rank: int, folder: str) -> None:
    """Linear layers split by columns, then by rows; norms by the sequence."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    alone = torch.nn.Sequential(
        nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), torch.nn.GELU(), nn.Linear(24, WIDTH), nn.RMSNorm(WIDTH)
    )
    ways = {"1": ColwiseParallel(), "3": RowwiseParallel()}
    split = parallelize_module(copy.deepcopy(alone), mesh, ways)
    check_split(rank, split, alone)
    x, grad = batch()
    losses = [trained(net, x, grad, 3) for net in (copy.deepcopy(alone), split)]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=1e-6)
    for norm in (nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)):
        split = parallelize_module(copy.deepcopy(norm), mesh, SequenceParallel())
        check_split(rank, split, norm, sequence=True)


def sharded_attention(rank: int, folder: str) -> None:
    """Attention of DTensors split by batch entries and by heads, with all that may stand beside q, k and v."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (PROCESSES,))
    generator = torch.Generator().manual_seed(3)
    shapes = (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), (4, 5, 7), (4,), (2, 4, 5, 8)
    *whole, grad = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    others = {"key_lengths": torch.tensor([7, 3]), "alibi_slopes": torch.rand(4, generator=generator)}
    for dim in (0, 1):
        spread = [distribute_tensor(t.detach(), mesh, [Shard(dim)]).requires_grad_() for t in whole[:3]]
        spread += [distribute_tensor(t.detach(), mesh, [Replicate()]).requires_grad_() for t in whole[3:]]
        beside = {name: distribute_tensor(t, mesh, [Replicate()]) for name, t in others.items()}
        expected, found = (
            H.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, sinks=sinks, **more)
            for (q, k, v, mask, sinks), more in ((whole, others), (spread, beside))
        )
        assert isinstance(found, DTensor)
        assert found.placements == (Shard(dim),)
        torch.testing.assert_close(found.full_tensor(), expected)
        grads = torch.autograd.grad(expected, whole, grad.detach())
        split = torch.autograd.grad(found, spread, distribute_tensor(grad.detach(), mesh, [Shard(dim)]))
        for part, one in zip(split, grads, strict=True):
            torch.testing.assert_close(part.full_tensor(), one, rtol=1e-5, atol=1e-5)
    rows, starts = torch.randn(7, 4, 8, generator=generator).requires_grad_(), torch.tensor([0, 3, 7])
    packed = distribute_tensor(rows.detach(), mesh, [Shard(1)]).requires_grad_()
    spread_starts = distribute_tensor(starts, mesh, [Replicate()])
    expected = H.attention_varlen(rows, rows, rows, starts, starts)
    found = H.attention_varlen(packed, packed, packed, spread_starts, spread_starts)
    assert isinstance(found, DTensor)
    assert found.placements == (Shard(1),)
    (one,) = torch.autograd.grad(expected.square().sum(), rows)
    (part,) = torch.autograd.grad(found.square().sum(), packed)
    torch.testing.assert_close(part.full_tensor(), one, rtol=1e-5, atol=1e-5)


def sharded_rows(rank: int, folder: str) -> None:
    """Norms behind a residual add, and a linear layer with all that may follow it, of DTensors split along each dim."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (PROCESSES,))
    generator = torch.Generator().manual_seed(4)
    rows = (3, 5, WIDTH)  # of which the processes have unequal parts
    shapes = rows, rows, (WIDTH,), (WIDTH,), (WIDTH, WIDTH), rows, rows
    *whole, grad, grad_sum = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    calls: list[Callable[..., Any]] = [
        lambda x, r, w, b, m: H.add_layer_norm(x, r, (WIDTH,), w, b),
        lambda x, r, w, b, m: H.add_rms_norm(x, r, (WIDTH,), w),
        lambda x, r, w, b, m: (H.linear(x, m, b, activation="gelu", residual=r), x),
        lambda x, r, w, b, m: (H.linear(x, m, b, residual=r), x),
    ]
    for dim in range(3):
        for weight in (Replicate(), Shard(0), Shard(1)):
            ways = [Shard(dim), Shard(dim), Replicate(), Replicate(), weight]
            spread = [distribute_tensor(t.detach(), mesh, [way]) for t, way in zip(whole, ways, strict=True)]
            spread = [t.requires_grad_() for t in spread]
            grads = [distribute_tensor(t.detach(), mesh, [Shard(dim)]) for t in (grad, grad_sum)]
            for call in calls if weight == Replicate() else calls[2:]:
                expected, found = call(*whole), call(*spread)
                for part, one in zip(found, expected, strict=True):
                    torch.testing.assert_close(part.full_tensor(), one, rtol=1e-5, atol=1e-5)
                one_grads = torch.autograd.grad(expected, whole, (grad.detach(), grad_sum.detach()), allow_unused=True)
                for part, one in zip(
                    torch.autograd.grad(found, spread, grads, allow_unused=True), one_grads, strict=True
                ):
                    assert (part is None) == (one is None)
                    if part is not None:
                        torch.testing.assert_close(part.full_tensor(), one, rtol=1e-5, atol=1e-5)


def split_layer(rank: int, folder: str) -> None:
    """The page's attention by heads in a Transformer layer, whose feed-forward is split too."""
    from torch.distributed.device_mesh import init_device_mesh

    page: dict[str, Any] = {}
    for _, code in blocks(Path(__file__).parents[1] / "docs" / "distributed.md", "python"):
        exec(code, page)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    alone = model()[0]
    split = page["split_layer"](copy.deepcopy(alone), mesh)
    check_split(rank, split, alone)
    x, _ = batch()
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    padding = torch.arange(6) >= torch.tensor([6, 2, 4, 5])[:, None]
    for masks in ({"src_mask": hidden, "is_causal": True}, {"src_mask": hidden, "src_key_padding_mask": padding}):
        torch.testing.assert_close(split(x, **masks), alone(x, **masks), rtol=1e-5, atol=1e-5)


def refused(rank: int, folder: str) -> None:
    """What no process could do alone, or no rule is for."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    x = distribute_tensor(batch()[0], init_device_mesh("cpu", (PROCESSES,)), [Shard(0)])
    with pytest.raises(RuntimeError, match="no rule says how to split it"):
        H.pack_linear_weight(x[0])
    with pytest.raises(RuntimeError, match="know which elements of the mask are its own"):
        H.scaled_dot_product_attention(x, x, x, dropout_p=0.5)


def context_parallel(rank: int, folder: str) -> None:
    """The ring attention of the page."""
    page: dict[str, Any] = {}
    for _, code in blocks(Path(__file__).parents[1] / "docs" / "distributed.md", "python"):
        exec(code, page)
    generator = torch.Generator().manual_seed(2)
    whole = [torch.randn(2, 3, 12, 8, generator=generator).requires_grad_() for _ in range(4)]
    expected = H.scaled_dot_product_attention(*whole[:3], is_causal=True)
    grads = torch.autograd.grad(expected, whole[:3], whole[3].detach())
    shards = [mine(t.detach(), rank, 2).clone().requires_grad_() for t in whole]
    found = page["ring_attention"](*shards[:3])
    torch.testing.assert_close(found, mine(expected, rank, 2))
    for shard, grad in zip(torch.autograd.grad(found, shards[:3], shards[3].detach()), grads, strict=True):
        torch.testing.assert_close(shard, mine(grad, rank, 2))


# ---- processes -------------------------------------------------------------------------------------------------------

WAYS: list[Callable[[int, str], None]] = [
    data_parallel,
    fully_sharded,
    tensor_parallel,
    sharded_rows,
    sharded_attention,
    split_layer,
    refused,
    context_parallel,
]


def process(rank: int, port: int, folder: str) -> None:
    """All ways one after the other; each says in a file of its own how it went."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    for way in WAYS:
        try:
            way(rank, f"{folder}/{way.__name__}")
            said = "equal"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        (Path(folder) / f"{way.__name__}.{rank}.txt").write_text(said)
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.spawn(process, (port, str(folder)), nprocs=PROCESSES, join=False)
    assert context is not None
    context.join(timeout=150)
    for child in context.processes:
        if child.is_alive():
            child.kill()
    return folder


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_as_on_one_process(way: Callable[[int, str], None], results: Path) -> None:
    for rank in range(PROCESSES):
        file = results / f"{way.__name__}.{rank}.txt"
        assert file.exists(), "it did not come to an end"
        assert file.read_text() == "equal"
