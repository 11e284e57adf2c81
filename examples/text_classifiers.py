"""Is this sentence a question? Told from its words, without the mark, by an RNN, an LSTM, a GRU and a Transformer.

python examples/text_classifiers.py [--plot curves.png]

Each model is written with torch.nn alone and trained twice, as it is and after handtuned.replace: the same losses and
the same answers. The plot is the Transformer's.
"""

from collections.abc import Callable

import torch
from side_by_side import plot, report, shuffled, train, words
from torch import Tensor

from handtuned.nn import SinusoidalPositionalEncoding

WIDTH = 48


class Recurrent(torch.nn.Module):
    """Embedding, a recurrent layer, and of its last state the class."""

    def __init__(self, kind: Callable[..., torch.nn.Module], vocabulary: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, WIDTH, padding_idx=0)
        self.layer = kind(WIDTH, WIDTH, batch_first=True, bidirectional=True)
        self.head = torch.nn.Linear(2 * WIDTH, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        output, _ = self.layer(self.embedding(tokens))
        logits: Tensor = self.head(output.amax(1))
        return logits


class Transformer(torch.nn.Module):
    """Embedding, sinusoidal positions, encoder layers, and the mean over what is no padding."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, WIDTH, padding_idx=0)
        self.positions = SinusoidalPositionalEncoding(WIDTH, dropout=0.0, max_length=64, batch_first=True)
        layer = torch.nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = torch.nn.Linear(WIDTH, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        x = self.encoder(self.positions(self.embedding(tokens)), src_key_padding_mask=padding)
        kept = ~padding[..., None]
        logits: Tensor = self.head((x * kept).sum(1) / kept.sum(1))
        return logits


def main() -> None:
    tokens, questions, vocabulary = words()
    held_out, rest = slice(0, 60), slice(60, None)
    kinds = (torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU)
    torch.manual_seed(0)
    models: dict[str, torch.nn.Module] = {kind.__name__: Recurrent(kind, vocabulary) for kind in kinds}
    for name, model in {**models, "Transformer": Transformer(vocabulary)}.items():
        sides = train(model, shuffled(tokens[rest], questions[rest], size=16, count=40))
        report(name, sides, (tokens[held_out], questions[held_out]), tolerance=2e-2)
    plot("Transformer", sides)


if __name__ == "__main__":
    main()
