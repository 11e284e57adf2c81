"""Series of many lengths, classified by a bidirectional LSTM: lengths= beside torch's PackedSequence.

python examples/many_lengths.py

Each series is a noisy sine that grows or fades; which of the two is to be told from 10 to 80 samples of it.
torch needs the rows packed and the result of each one's end brought back; handtuned takes the padded batch and lengths,
in any order. Losses of both trainings agree to rounding errors; printed are accuracy and the time of a training step.
"""

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import handtuned

STEPS, BATCH, HIDDEN, ROUNDS = 80, 32, 48, 40


def series(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A padded batch (BATCH, STEPS, 1), each row's length, and whether it grows (BATCH,)."""
    lengths = torch.randint(10, STEPS + 1, (BATCH,), generator=generator)
    grows = torch.randint(2, (BATCH,), generator=generator)
    place = torch.arange(STEPS) / lengths[:, None]  # 0..1 over a row's own length
    start = torch.rand(BATCH, 1, generator=generator) * 6.28
    loudness = torch.where(grows[:, None] > 0, place, 1 - place)
    x = 2 * loudness * (start + 0.7 * torch.arange(STEPS)).sin() + 0.2 * torch.randn(BATCH, STEPS, generator=generator)
    x[place >= 1] = torch.nan  # nothing may read the padding
    return x[..., None], lengths, grows


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(1, HIDDEN, bidirectional=True, batch_first=True)
        self.head = torch.nn.Linear(2 * HIDDEN, 2)


def packed(model: Classifier, x: Tensor, lengths: Tensor) -> Tensor:
    rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    logits: Tensor = model.head(model.lstm(rows)[1][0].transpose(0, 1).flatten(1))
    return logits


def padded(model: Classifier, x: Tensor, lengths: Tensor) -> Tensor:
    logits: Tensor = model.head(model.lstm(x, lengths=lengths)[1][0].transpose(0, 1).flatten(1))
    return logits


def train(model: Classifier, forward: Callable[[Classifier, Tensor, Tensor], Tensor]) -> tuple[list[float], float]:
    """The loss of every step, and the median time of one in milliseconds."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses, times = [], []
    for _ in range(ROUNDS):
        x, lengths, grows = series(generator)
        start = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(forward(model, x, lengths), grows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        times.append(time.perf_counter() - start)
        losses.append(loss.item())
    return losses, statistics.median(times) * 1e3


def main() -> None:
    torch.manual_seed(0)
    theirs = Classifier()
    ours = copy.deepcopy(theirs)
    handtuned.replace(ours)
    (expected, torch_time), (found, our_time) = train(theirs, packed), train(ours, padded)
    x, lengths, grows = series(torch.Generator().manual_seed(2))
    with torch.no_grad():
        accuracy = (padded(ours, x, lengths).argmax(1) == grows).float().mean().item()
    apart = max(abs(a - b) for a, b in zip(expected[:20], found[:20], strict=True))
    print(f"loss {found[0]:.3f} -> {statistics.mean(found[-10:]):.3f}, accuracy {accuracy:.0%}")
    print(f"largest difference of the first 20 losses {apart:.1e}")
    print(f"a step: torch, packed {torch_time:.1f} ms; handtuned, padded with lengths {our_time:.1f} ms")
    assert apart < 1e-3


if __name__ == "__main__":
    main()
