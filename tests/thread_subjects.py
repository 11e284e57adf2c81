"""Every family as the programs of test_threads.py call it: at sizes whose work is cut among threads."""

from __future__ import annotations

import copy

import compile_subjects as cs
import torch
from torch import Tensor
from torch.utils.data import Dataset

SIZE = (16, 12)  # batch and length
NAMES = list(cs.SUBJECTS)
Bits = dict[str, list[Tensor]]

torch.manual_seed(0)
trained = {name: (make(), draw(*SIZE)) for name, (make, draw) in cs.SUBJECTS.items()}
kept: dict[str, torch.nn.Module] = {}  # in inference, with the packed weights of their first call


def forget_packed_weights() -> None:
    kept.update({name: copy.deepcopy(module).eval() for name, (module, _) in trained.items()})


def results(name: str) -> list[Tensor]:
    """Output and every gradient, and the output in inference."""
    module, (x, *others) = trained[name]
    leaf = x.clone().requires_grad_()
    output = module(leaf, *others)
    grads = torch.autograd.grad(output.square().mean(), [leaf, *module.parameters()], allow_unused=True)
    with torch.no_grad():
        inferred = kept[name](x, *others)
    return [output.detach(), inferred, *(grad for grad in grads if grad is not None)]


def same(name: str, expected: Bits) -> bool:
    return all(a.equal(b) for a, b in zip(results(name), expected[name], strict=True))


def by_one_thread() -> Bits:
    """What all calls are compared with. The calling thread opens no pool."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    forget_packed_weights()
    expected = {name: results(name) for name in NAMES}
    forget_packed_weights()
    torch.set_num_threads(threads)
    return expected


class Calls(Dataset[bool]):
    """Whether a family, called where the item is fetched, gives the bits that the maker's process expects."""

    def __init__(self, expected: Bits) -> None:
        self.expected = expected

    def __len__(self) -> int:
        return len(NAMES)

    def __getitem__(self, i: int) -> bool:
        if not kept:  # in a process of its own
            forget_packed_weights()
        return same(NAMES[i], self.expected)
