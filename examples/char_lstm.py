"""A character-level language model, trained twice from the same weights: with torch's LSTM and with handtuned's.

python examples/char_lstm.py [--epochs 4] [--hidden 256] [--plot curves.png]

The text is the beginning of Shakespeare's Coriolanus (public domain). Both trainings see the same batches in the same
order, the state passed from one stretch of text to the next without its gradient; the losses agree to rounding errors.
Printed: loss and seconds of each epoch on both sides, and a line of what the model writes. --plot draws the curves.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import handtuned

TEXT = Path(__file__).parent / "data" / "coriolanus.txt"
State = tuple[Tensor, Tensor] | None


class CharModel(torch.nn.Module):
    """Logits of the next character, of characters (steps, batch)."""

    def __init__(self, characters: int, hidden: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(characters, 64)
        self.lstm = torch.nn.LSTM(64, hidden)
        self.head = torch.nn.Linear(hidden, characters)

    def forward(self, text: Tensor, state: State = None) -> tuple[Tensor, State]:
        y, state = self.lstm(self.embedding(text), state)
        return self.head(y), state


def stretches(text: Tensor, batch: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(characters, those that follow), (steps, batch) each, row b going on where it was in the stretch before."""
    columns = text[: len(text) // batch * batch].view(batch, -1).T
    for begin in range(0, len(columns) - steps, steps):
        yield columns[begin : begin + steps], columns[begin + 1 : begin + steps + 1]


def train(model: CharModel, text: Tensor, epochs: int, batch: int, steps: int) -> tuple[list[float], list[float]]:
    """The loss of every stretch, and the seconds of every epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    losses, seconds = [], []
    for _ in range(epochs):
        start, state = time.perf_counter(), None
        for x, target in stretches(text, batch, steps):
            logits, state = model(x, state)
            state = tuple(s.detach() for s in state)  # type: ignore[assignment,union-attr]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return losses, seconds


@torch.no_grad()
def write(model: CharModel, alphabet: list[str], length: int) -> str:
    """What the model says after a line break, one step a character."""
    generator, state, text = torch.Generator().manual_seed(0), None, ["\n"]
    for _ in range(length):
        logits, state = model(torch.tensor([[alphabet.index(text[-1])]]), state)
        text.append(alphabet[int(torch.multinomial((logits[0, 0] / 0.6).softmax(0), 1, generator=generator))])
    return "".join(text[1:])


def plot(path: str, losses: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (name, values), style in zip(losses.items(), ("-", "--"), strict=True):
        axes.plot(values, style, label=name)
    axes.set(xlabel="step", ylabel="loss (nats per character)", title="character LSTM on Coriolanus")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--plot", metavar="FILE")
    options = parser.parse_args()

    text = TEXT.read_text()
    alphabet = sorted(set(text))
    characters = torch.tensor([alphabet.index(c) for c in text])
    torch.manual_seed(0)
    theirs = CharModel(len(alphabet), options.hidden)
    ours = copy.deepcopy(theirs)
    handtuned.replace(ours)

    losses, seconds = {}, {}
    for name, model in (("torch", theirs), ("handtuned", ours)):
        found = train(model, characters, options.epochs, options.batch, options.steps)
        losses[name], seconds[name] = found
    per_epoch = len(losses["torch"]) // options.epochs
    for epoch in range(options.epochs):
        part = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        row = (f"{name} {statistics.mean(losses[name][part]):.4f} in {seconds[name][epoch]:.2f} s" for name in losses)
        print(f"epoch {epoch + 1}: mean loss", ", ".join(row))
    apart = max(abs(a - b) for a, b in zip(losses["torch"], losses["handtuned"], strict=True))
    print(f"largest difference of a loss {apart:.1e}")
    print(repr(write(ours, alphabet, 70)))
    assert losses["torch"][-1] < losses["torch"][0] - 0.5, "it does not learn"
    assert apart < 0.02, "the curves are not the same"
    if options.plot:
        plot(options.plot, losses)


if __name__ == "__main__":
    main()
