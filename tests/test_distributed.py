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

WAYS: list[Callable[[int, str], None]] = [data_parallel, fully_sharded, tensor_parallel, context_parallel]


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
