"""Which films will this viewer like? Embeddings of both, and an MLP with dropout on them and their product.

python examples/recommender.py [--plot curves.png]

The ratings are made up: viewers and films have hidden tastes, and a rating is how well the two agree, with noise. The
dropouts are modules of their own, so both sides draw the same masks and the losses agree to rounding errors.
"""

import torch
from side_by_side import plot, report, shuffled, train
from torch import Tensor

VIEWERS, FILMS, TASTES = 200, 120, 3


class Recommender(torch.nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.viewers, self.films = torch.nn.Embedding(VIEWERS, width), torch.nn.Embedding(FILMS, width)
        for embedding in (self.viewers, self.films):
            torch.nn.init.normal_(embedding.weight, std=0.3)
        layers = [torch.nn.Linear(3 * width, 64), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.LayerNorm(64)]
        self.mlp = torch.nn.Sequential(*layers, torch.nn.Linear(64, 1))

    def forward(self, viewer: Tensor, film: Tensor) -> Tensor:
        v, f = self.viewers(viewer), self.films(film)
        rating: Tensor = self.mlp(torch.cat([v, f, v * f], -1)).squeeze(-1)
        return rating


def ratings(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    likes, has = (torch.randn(n, TASTES, generator=generator) for n in (VIEWERS, FILMS))
    viewer, film = (torch.randint(n, (8000,), generator=generator) for n in (VIEWERS, FILMS))
    agree = (likes[viewer] * has[film]).sum(1) / TASTES**0.5
    return viewer, film, agree + 0.2 * torch.randn(8000, generator=generator)


def main() -> None:
    torch.manual_seed(0)
    data = ratings(torch.Generator().manual_seed(3))
    held_out, rest = [tuple(t[part] for t in data) for part in (slice(0, 500), slice(500, None))]
    sides = train(Recommender(), shuffled(*rest, size=128, count=400), torch.nn.functional.mse_loss, rate=1e-2)
    report("recommender", sides, held_out, classes=False)
    error = (sides[1].predictions(held_out) - held_out[2]).square().mean().item()
    print(f"mean squared error on new pairs {error:.2f}; of always the mean {held_out[2].var().item():.2f}")
    viewer = torch.zeros(FILMS, dtype=torch.int64)
    best = sides[1].predictions((viewer, torch.arange(FILMS), viewer)).topk(3).indices.tolist()
    print(f"for the first viewer: films {best}")
    plot("recommender", sides)


if __name__ == "__main__":
    main()
