"""A Transformer that reads digits row by row, trained three ways: as it is, under autocast, with checkpoints.

python examples/training.py [--plot curves.png]

Autocast runs linear layers and attention in bfloat16. Checkpointing throws a layer's inner results away and computes
them again in the backward: the same losses to the last bit, and less kept in between.
"""

import copy

import torch
from digits import digits
from side_by_side import Sides, plot, report, shuffled, train
from torch import Tensor
from torch.utils.checkpoint import checkpoint

WIDTH = 48


class Rows(torch.nn.Module):
    """Each row of a picture is a word of 8 numbers."""

    def __init__(self, checkpoints: bool = False, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.checkpoints, self.dtype = checkpoints, dtype
        self.enter, self.places = torch.nn.Linear(8, WIDTH), torch.nn.Parameter(torch.randn(8, WIDTH) * 0.1)
        layers = [torch.nn.TransformerEncoderLayer(WIDTH, 4, 96, dropout=0.0, batch_first=True) for _ in range(2)]
        self.layers, self.head = torch.nn.ModuleList(layers), torch.nn.Linear(WIDTH, 10)

    def forward(self, image: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            x = self.enter(image.squeeze(1)) + self.places
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False) if self.checkpoints else layer(x)
            logits: Tensor = self.head(x.mean(1))
        return logits.float()


def kept(model: torch.nn.Module, image: Tensor) -> int:
    """Bytes that a forward keeps for the backward, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def seen(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda t: t):
        model(image).sum().backward()
    return sum(storages.values())


def trained(name: str, model: Rows, tolerance: float) -> Sides:
    images, labels = digits()
    sides = train(model, shuffled(images[300:], labels[300:], size=64, count=60))
    report(name, sides, (images[:300], labels[:300]), tolerance)
    sizes = [kept(copy.deepcopy(side.model), images[:64]) / 1024 for side in sides]
    print(f"kept for the backward: torch {sizes[0]:.0f} KiB, handtuned {sizes[1]:.0f} KiB\n")
    return sides


def main() -> None:
    torch.manual_seed(0)
    plain, checkpoints, bfloat16 = Rows(), Rows(checkpoints=True), Rows(dtype=torch.bfloat16)
    for model in (checkpoints, bfloat16):
        model.load_state_dict(plain.state_dict())
    sides = trained("as it is", plain, 1e-2)
    again = trained("with checkpoints", checkpoints, 1e-2)
    assert again[1].losses == sides[1].losses, "a checkpoint changed a bit"
    trained("autocast, bfloat16", bfloat16, 0.2)
    plot("a Transformer on digits", sides)


if __name__ == "__main__":
    main()
