"""A Transformer encoder-decoder learns to write words backwards: trained side by side, then asked letter by letter.

python examples/encoder_decoder.py [--plot curves.png]
"""

import re

import torch
from side_by_side import TEXT, plot, report, shuffled, train
from torch import Tensor

LETTERS, BEGIN, LONGEST = 26, 27, 4  # 0 stands behind a word, 1 to 26 are letters


class Reverser(torch.nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.letters = torch.nn.Embedding(BEGIN + 1, width)
        self.places = torch.nn.Parameter(torch.randn(LONGEST + 1, width) * 0.5)
        self.transformer = torch.nn.Transformer(width, 4, 1, 1, 2 * width, dropout=0.0, batch_first=True)
        self.head = torch.nn.Linear(width, BEGIN)

    def forward(self, word: Tensor, written: Tensor) -> Tensor:
        """Logits of each next letter, (N, BEGIN, letters): of the word (N, LONGEST), given what is written."""
        source, target = (self.letters(t) + self.places[: t.shape[1]] for t in (word, written))
        hidden = torch.ones(written.shape[1], written.shape[1], dtype=torch.bool).triu(1)
        y = self.transformer(source, target, tgt_mask=hidden, tgt_is_causal=True)
        logits: Tensor = self.head(y).transpose(1, 2)
        return logits


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    """Words, BEGIN and their letters from the end, and what comes after each of those."""
    found = sorted({w for w in re.findall("[a-z]+", TEXT.read_text().lower()) if len(w) == LONGEST})
    words = torch.tensor([[ord(c) - 96 for c in word] for word in found])
    words = words[torch.randperm(len(words), generator=torch.Generator().manual_seed(0))]
    turned = words.flip(1)
    return words, torch.cat([torch.full((len(words), 1), BEGIN), turned[:, :-1]], 1), turned


@torch.no_grad()
def write(model: torch.nn.Module, word: str) -> str:
    numbers = torch.tensor([[ord(c) - 96 for c in word]])
    written = torch.tensor([[BEGIN]])
    for _ in word:
        letter = model(numbers, written)[:, :, -1].argmax(1, keepdim=True)
        written = torch.cat([written, letter], 1)
    return "".join(chr(96 + int(n)) for n in written[0, 1:])


def main() -> None:
    torch.manual_seed(0)
    words, written, turned = pairs()
    held_out = (words[:40], written[:40], turned[:40])
    sides = train(Reverser(), shuffled(words[40:], written[40:], turned[40:], size=32, count=120), rate=3e-3)
    report("encoder-decoder", sides, held_out, tolerance=5e-2, classes=False)
    ours = sides[1].model.eval()
    for word in ("play", "rome", "hear"):
        print(f"{word} backwards is {write(ours, word)}")
    right = (ours(*held_out[:2]).argmax(1) == held_out[2]).float().mean().item()
    print(f"{right:.0%} of the letters of new words are right")
    assert right > 0.6
    plot("encoder-decoder", sides)


if __name__ == "__main__":
    main()
