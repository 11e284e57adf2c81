"""handtuned's modules on two and four processes of this machine, talking through gloo, against one alone.

What DTensors do is in dtensor_ways.py.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from dtensor_ways import (
    PROCESSES,
    WIDTH,
    check_split,
    pair,
    refused,
    sharded_attention,
    sharded_caches,
    sharded_int8_and_losses,
    sharded_recurrent,
    sharded_rows,
    tensor_parallel,
)
from test_docs import blocks
from torch import Tensor

from handtuned import nn
from handtuned.nn import functional as H


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


def page() -> dict[str, Any]:
    """What docs/distributed.md defines."""
    names: dict[str, Any] = {}
    for _, code in blocks(Path(__file__).parents[1] / "docs" / "distributed.md", "python"):
        exec(code, names)
    return names


def split_layer(rank: int, folder: str) -> None:
    """The page's attention by heads in a Transformer layer, whose feed-forward is split too."""
    alone = model()[0]
    split = page()["split_layer"](copy.deepcopy(alone), pair())
    check_split(rank, split, alone)
    x, _ = batch()
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    padding = torch.arange(6) >= torch.tensor([6, 2, 4, 5])[:, None]
    for masks in ({"src_mask": hidden, "is_causal": True}, {"src_mask": hidden, "src_key_padding_mask": padding}):
        torch.testing.assert_close(split(x, **masks), alone(x, **masks), rtol=1e-5, atol=1e-5)


def two_dims(rank: int, folder: str) -> None:
    """Four processes: FSDP2 over one dim of the mesh, and layers split by heads and hidden units over the other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    alone, split = model(), model()
    split[0] = page()["split_layer"](split[0], mesh["tensor"])
    parallelize_module(split, mesh["tensor"], {"2": ColwiseParallel(output_layouts=Replicate())})
    for part in split:
        fully_shard(part, mesh=mesh["data"])
    fully_shard(split, mesh=mesh["data"])
    x, grad = batch()
    part = mesh.get_local_rank("data")
    losses = torch.tensor(trained(split, mine(x, part), mine(grad, part), 3))
    dist.all_reduce(losses, group=mesh.get_group("data"))
    torch.testing.assert_close(losses / 2, torch.tensor(trained(alone, x, grad, 3)), rtol=1e-5, atol=1e-6)
    whole = alone.state_dict()
    placed = split[0].linear1.weight
    assert isinstance(placed, DTensor)
    assert placed.device_mesh.ndim == 2
    assert placed.to_local().shape == (6, WIDTH)  # a quarter of 24 rows
    for name, parameter in split.named_parameters():
        if name in whole:  # all but the attention, which has its query, key and value in one
            torch.testing.assert_close(parameter.full_tensor(), whole[name], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(split(mine(x, part)), alone(mine(x, part)), rtol=1e-5, atol=1e-5)


def context_parallel(rank: int, folder: str) -> None:
    """The ring attention of the page."""
    generator = torch.Generator().manual_seed(2)
    whole = [torch.randn(2, 3, 12, 8, generator=generator).requires_grad_() for _ in range(4)]
    expected = H.scaled_dot_product_attention(*whole[:3], is_causal=True)
    grads = torch.autograd.grad(expected, whole[:3], whole[3].detach())
    shards = [mine(t.detach(), rank, 2).clone().requires_grad_() for t in whole]
    found = page()["ring_attention"](*shards[:3])
    torch.testing.assert_close(found, mine(expected, rank, 2))
    for shard, grad in zip(torch.autograd.grad(found, shards[:3], shards[3].detach()), grads, strict=True):
        torch.testing.assert_close(shard, mine(grad, rank, 2))


# ---- processes -------------------------------------------------------------------------------------------------------

Way = Callable[[int, str], None]
WAYS: dict[int, list[Way]] = {  # by the number of processes
    2: [
        data_parallel,
        fully_sharded,
        tensor_parallel,  # before all others that have DTensors: what is compiled looks for the rules
        sharded_rows,
        sharded_int8_and_losses,
        sharded_attention,
        sharded_caches,
        sharded_recurrent,
        split_layer,
        refused,
        context_parallel,
    ],
    4: [two_dims],
}
ONCE = ["handtuned", "torch.distributed.tensor.parallel", "torch.distributed.fsdp", "torch.distributed.checkpoint"]


def process(rank: int, size: int, port: int, folder: str) -> None:
    """All ways one after the other; each says in a file of its own how it went."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    for way in WAYS[size]:
        try:
            way(rank, f"{folder}/{way.__name__}")
            said = "equal"
        except (Exception, pytest.fail.Exception) as error:
            said = f"{type(error).__name__}: {error}"
        (Path(folder) / f"{way.__name__}.{rank}.txt").write_text(said)
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All processes at once, forked from one that has torch imported already."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.set_forkserver_preload(ONCE)
    worlds: list[Any] = []
    for size in WAYS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = (size, port, str(folder))
        worlds.append(mp.start_processes(process, arguments, size, join=False, start_method="forkserver"))
    end = time.monotonic() + 240
    for world in worlds:
        with contextlib.suppress(mp.ProcessExitedException):  # that no file says how a way went, tells the test
            world.join(timeout=max(end - time.monotonic(), 1))
        for child in world.processes:
            if child.is_alive():
                child.kill()
    return folder


EACH = [(size, way) for size, ways in WAYS.items() for way in ways]


@pytest.mark.parametrize(("size", "way"), EACH, ids=[way.__name__ for _, way in EACH])
def test_as_on_one_process(size: int, way: Way, results: Path) -> None:
    for rank in range(size):
        file = results / f"{way.__name__}.{rank}.txt"
        assert file.exists(), "it did not come to an end"
        assert file.read_text() == "equal"
