"""A transformer-like block with AddLayerNorm beside the same block as one writes it in torch: parity and speed.

python examples/norms.py
"""

import statistics
import time

import torch
from torch import Tensor

import handtuned


class Block(torch.nn.Module):
    """x -> norm(dropout(mlp(x)) + x), twice, with torch's modules."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.branches = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(2))
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(2))
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        for branch, norm in zip(self.branches, self.norms, strict=True):
            residual = self.dropout(torch.relu(branch(x))) + residual
            x = norm(residual)
        return x


class FusedBlock(torch.nn.Module):
    """The same: each norm takes the branch and the residual, and gives back the new residual."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.branches = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(2))
        self.norms = torch.nn.ModuleList(handtuned.nn.AddLayerNorm(width, dropout=dropout) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        for branch, norm in zip(self.branches, self.norms, strict=True):
            x, residual = norm(torch.relu(branch(x)), residual)
        return x


def step(block: torch.nn.Module, x: Tensor, grad_output: Tensor) -> list[Tensor]:
    """Output and every gradient of one forward and backward."""
    x = x.detach().requires_grad_()
    output = block(x)
    return [output.detach(), *torch.autograd.grad(output, [x, *block.parameters()], grad_output)]


def seconds(block: torch.nn.Module, x: Tensor, grad_output: Tensor) -> float:
    start = time.perf_counter()
    step(block, x, grad_output)
    return time.perf_counter() - start


def main() -> None:
    torch.manual_seed(0)
    plain, fused = Block(256, dropout=0.1), FusedBlock(256, dropout=0.1)
    fused.load_state_dict(plain.state_dict())  # the twins have the same parameters under the same names
    x, grad_output = torch.randn(8, 128, 256), torch.randn(8, 128, 256)

    plain.eval(), fused.eval()  # without dropout the two can be compared element by element
    names = ["output", "grad of x", *(f"grad of {name}" for name, _ in plain.named_parameters())]
    for name, expected, actual in zip(names, step(plain, x, grad_output), step(fused, x, grad_output), strict=True):
        relative = ((expected - actual).abs().max() / expected.abs().max()).item()
        print(f"{name:26} differs by {relative:.1e} of its largest value")
        assert relative < 1e-5

    plain.train(), fused.train()
    pairs = [(seconds(plain, x, grad_output), seconds(fused, x, grad_output)) for _ in range(30)]  # interleaved
    ratios = [a / b for a, b in pairs[5:]]
    print(f"training step with dropout, torch / handtuned: {statistics.median(ratios):.2f}x (median of {len(ratios)})")
    print(handtuned.explain(fused.norms[0], x, x))


if __name__ == "__main__":
    main()
