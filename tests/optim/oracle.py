"""What the optimizer must reproduce, computed apart: rows by autograd.grad, methods on whole vectors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from mtl_optim.step.lazy import held


def rows_of(losses: Sequence[Tensor], params: Sequence[Tensor]) -> list[list[Tensor | None]]:
    """The gradient of every loss, None where it does not reach."""
    return [list(torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)) for loss in losses]


def flatten(row: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """A row as one float64 vector, zeros for None."""
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(row, like, strict=True)]
    return torch.cat([part.detach().double().reshape(-1) for part in parts])


def pcgrad_fixed(matrix: Tensor) -> Tensor:
    """Algorithm 1 of Yu et al. 2020 on the vectors themselves, tasks visited in ascending order."""
    result = torch.zeros_like(matrix[0])
    for i in range(matrix.shape[0]):
        projected = matrix[i].clone()
        for j in range(matrix.shape[0]):
            product = projected @ matrix[j]
            if j != i and product < 0:
                projected -= product / (matrix[j] @ matrix[j]) * matrix[j]
        result += projected
    return result


def pcgrad_orders(matrix: Tensor) -> list[Tensor]:
    """Every result that PCGrad can give for some order of the tasks (K = 3)."""
    num_tasks = matrix.shape[0]
    choices: list[list[Tensor]] = []
    for i in range(num_tasks):
        outcomes = []
        for order in itertools.permutations([j for j in range(num_tasks) if j != i]):
            projected = matrix[i].clone()
            for j in order:
                product = projected @ matrix[j]
                if product < 0:
                    projected -= product / (matrix[j] @ matrix[j]) * matrix[j]
            outcomes.append(projected)
        choices.append(outcomes)
    return [sum(parts[1:], parts[0]) for parts in itertools.product(*choices)]


def min_norm_pair(matrix: Tensor) -> Tensor:
    """The point of the segment between two vectors that is nearest to the origin."""
    first, second = matrix
    difference = second - first
    share = ((second @ difference) / (difference @ difference)).clamp(0, 1)
    return share * first + (1 - share) * second


class TwoHeads(nn.Module):
    """A shared trunk and one head per task."""

    def __init__(self, tasks: int = 2, width: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.trunk = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(tasks))
        self.to(dtype)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64) * 0.5)

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.trunk(x)
        return [head(hidden) for head in self.heads]

    def losses(self, seed: int = 0, transform: Callable[[Tensor], Tensor] = torch.square) -> list[Tensor]:
        """One loss per task on a batch that depends on ``seed`` only; targets that fight each other."""
        dtype = next(self.parameters()).dtype
        generator = torch.Generator().manual_seed(100 + seed)
        x = torch.randn(8, 4, generator=generator, dtype=torch.float64).to(dtype)
        target = torch.randn(8, 1, generator=generator, dtype=torch.float64).to(dtype)
        outputs = self(x)
        return [transform(out - (-1) ** k * (k + 1) * target).mean() for k, out in enumerate(outputs)]


def uncombined(params: Iterable[Tensor]) -> list[Tensor | None]:
    """What ``.grad`` holds beside the rows that wait to be combined, which reading it would combine."""
    return [None if (grad := held(param)) is None else grad.clone() for param in params]


__all__ = [
    "TwoHeads",
    "flatten",
    "min_norm_pair",
    "pcgrad_fixed",
    "pcgrad_orders",
    "rows_of",
    "uncombined",
]
