"""Which digit is this? A CNN and an MLP with dropout on scikit-learn's digits, 1797 pictures of 8 x 8.

python examples/digits.py [--plot curves.png]

The report of replace() comes first: the CNN's convolutions stay torch's, its linear layers do not. Max pooling, ReLU
and Adam make much of little, so the CNN's two curves part by some 1e-3. So do two of torch's own, the second with the
weights of one linear layer moved by half a rounding: the last line.
"""

import copy

import torch
from side_by_side import plot, report, shuffled, train
from sklearn.datasets import load_digits
from torch import Tensor, nn

import handtuned


def digits() -> tuple[Tensor, Tensor]:
    """Pictures (1797, 1, 8, 8) with values from 0 to 1, and what they show; in an order of their own."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    return images, torch.tensor(data.target)[order]


def cnn() -> nn.Module:
    features = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))


def mlp(width: int = 128) -> nn.Module:
    hidden = [nn.Linear(64, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def moved(model: nn.Sequential) -> nn.Sequential:
    """A copy with the weights of its first linear layer a little off: by 2^-24 of each, up or down."""
    model = copy.deepcopy(model)
    weight = next(module.weight for module in model if isinstance(module, nn.Linear))
    with torch.no_grad():
        weight.mul_(1 + 2**-24 * torch.randn_like(weight).sign())
    return model


def main() -> None:
    torch.manual_seed(0)
    images, labels = digits()
    held_out = (images[:300], labels[:300])
    for name, model in (("MLP with dropout", mlp()), ("CNN", cnn())):
        print(handtuned.replace(copy.deepcopy(model)))
        other = moved(model)
        sides = train(model, shuffled(images[300:], labels[300:], size=64, count=120))
        report(name, sides, held_out)
    plot("CNN", sides)
    others, _ = train(other, shuffled(images[300:], labels[300:], size=64, count=120))
    apart = max(abs(a - b) for a, b in zip(sides[0].losses, others.losses, strict=True))
    print(f"torch alone, from weights that are half a rounding apart: {apart:.1e} apart")


if __name__ == "__main__":
    main()
