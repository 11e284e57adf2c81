"""What the examples share: a model trained twice from the same weights, with torch's modules and with handtuned's.

python examples/side_by_side.py

By itself it trains a line through points, to show what the others do: the same batches in the same order on both
sides, the losses of both, the time of both, what both predict, and one plot.
"""

import argparse
import copy
import re
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import handtuned

Batch = tuple[Tensor, ...]  # the model's arguments, and last its targets
Loss = Callable[[Tensor, Tensor], Tensor]
torch.set_num_threads(1)  # models this small gain nothing by more
TEXT = Path(__file__).parent / "data" / "coriolanus.txt"


@dataclass
class Side:
    model: torch.nn.Module
    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of the steps, in seconds

    def step(self, optimizer: torch.optim.Optimizer, batch: Batch, loss_of: Loss) -> None:
        *inputs, target = batch
        start = time.perf_counter()
        loss = loss_of(self.model(*inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        self.times.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    @torch.no_grad()
    def predictions(self, batch: Batch) -> Tensor:
        training = self.model.training
        found: Tensor = self.model.eval()(*batch[:-1])
        self.model.train(training)
        return found


Sides = tuple[Side, Side]  # torch's and handtuned's


def train(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    loss_of: Loss = torch.nn.functional.cross_entropy,
    rate: float = 3e-3,
) -> Sides:
    """(torch's side, handtuned's): the model as it is, and a copy of it after replace()."""
    sides = Side(model), Side(copy.deepcopy(model))
    handtuned.replace(sides[1].model)
    optimizers = [torch.optim.Adam(side.model.parameters(), lr=rate) for side in sides]
    for number, batch in enumerate(batches):
        for side, optimizer in zip(sides, optimizers, strict=True):
            torch.manual_seed(number)
            side.step(optimizer, batch, loss_of)
    return sides


def report(
    title: str, sides: tuple[Side, Side], held_out: Batch, tolerance: float = 1e-2, classes: bool = True
) -> None:
    """Prints what both sides did, and fails where they are not alike or learned nothing."""
    theirs, ours = sides
    apart = max(abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True))
    begin, end = theirs.losses[0], statistics.mean(ours.losses[-5:])
    ms = [statistics.median(side.times) * 1e3 for side in sides]
    print(f"{title}: {len(ours.losses)} steps, loss {begin:.3f} -> {end:.3f}, the two at most {apart:.1e} apart")
    print(f"a step: torch {ms[0]:.2f} ms, handtuned {ms[1]:.2f} ms")
    expected, found = (side.predictions(held_out) for side in sides)
    if classes:
        same = (expected.argmax(-1) == found.argmax(-1)).float().mean().item()
        right = (found.argmax(-1) == held_out[-1]).float().mean().item()
        print(f"on new data: {right:.0%} right, {same:.0%} of the predictions the same")
        assert same > 0.98
    else:
        print(f"on new data: predictions at most {(expected - found).abs().max():.1e} apart")
    assert apart < tolerance, "the curves are not the same"
    assert end < begin, "it does not learn"


def plot(title: str, sides: Sides) -> None:
    """Both curves into the file that the option --plot names, if it is given."""
    parser = argparse.ArgumentParser(description="torch and handtuned side by side")
    parser.add_argument("--plot", metavar="FILE", help="draw both loss curves")
    file = parser.parse_args().plot
    if file is None:
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, side, style in zip(("torch", "handtuned"), sides, ("-", "--"), strict=True):
        axes.plot(side.losses, style, label=name)
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.legend()
    figure.savefig(file)


def words(length: int = 12) -> tuple[Tensor, Tensor, int]:
    """Sentences of the play as numbers of words (sentences, length), 0 behind the end; whether each is a question; how
    many words there are. As many questions as others."""
    sentences = re.findall(r"([^.?!:;]+)([.?!])", TEXT.read_text())
    split = [(re.findall("[a-z]+", text.lower()), mark == "?") for text, mark in sentences]
    asked = [(line, 1) for line, question in split if question and len(line) > 1]
    told = [(line, 0) for line, question in split if not question and len(line) > 1]
    pairs = [pair for both in zip(asked, told, strict=False) for pair in both]
    number = {word: n + 1 for n, word in enumerate(sorted({word for line, _ in pairs for word in line}))}
    rows = torch.zeros(len(pairs), length, dtype=torch.int64)
    for row, (line, _) in zip(rows, pairs, strict=True):
        row[: len(line)] = torch.tensor([number[word] for word in line[:length]])
    return rows, torch.tensor([label for _, label in pairs]), len(number) + 1


def shuffled(*tensors: Tensor, size: int, count: int) -> Iterable[Batch]:
    """`count` batches of `size` rows, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        rows = torch.randint(len(tensors[0]), (size,), generator=generator)
        yield tuple(t[rows] for t in tensors)


def main() -> None:
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    y = x @ torch.linspace(-1, 1, 8)[:, None]
    loss = torch.nn.functional.mse_loss
    sides = train(torch.nn.Linear(8, 1), shuffled(x, y, size=20, count=60), loss, rate=3e-2)
    report("a line through points", sides, (x, y), classes=False)
    plot("a line through points", sides)


if __name__ == "__main__":
    main()
