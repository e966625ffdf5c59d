"""Random loss weighting: fresh random weights at every step."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

import mtl_kernels
from mtl_kernels import Solution
from mtl_kernels.rng import philox

from .base import About, Method, check_active, check_choice, check_gram, check_seed
from .shares import equal_shares, finite_among

_WORD = 0xFFFFFFFF
_FIRST_BLOCK = 4096
"""The counter's last word starts here: PCGrad's orders of 128 tasks end below it, so no two draws share a word."""


@dataclasses.dataclass(frozen=True, eq=False)
class RandomWeights(Method):
    """Random loss weighting (RLW): w = softmax(z) with z ~ N(0, I) over the active tasks, drawn anew at every step.

    Lin et al. 2021 (arXiv 2111.10603). A baseline: the expected weights are 1 / K each.

    Args:
        distribution: "normal" (the paper's default) is softmax(z); "uniform" u / sum u with u ~ U(0, 1); "dirichlet"
            a point of the simplex, all equally likely (Dirichlet with concentration 1); "bernoulli" 1 / n on a random
            subset of n tasks, each in it with probability 1/2. An empty subset is not drawn again, which would take
            a wait for the device: it counts as all tasks.
        seed: of the draws. What a task draws is a function of (seed, step, problem, task) alone: the random words are
            the same on every device, and the weights as close as its logarithm and exponential are.

    ``state["rng"]`` is (seed, step), int64 on the device of the Gram matrix; the step advances with every solve. Of the
    Gram matrix only its shape counts, and whether it is finite: if not, the weights are 1 / K.

    Raises:
        TypeError, ValueError: an unknown distribution, or a seed that is not an integer in 0..2**63-1.
    """

    name: ClassVar[str] = "randomweights"
    about: ClassVar[About] = About("nothing", "random state", "none in a step; the mean over many", "O(K)")
    needs_gram: ClassVar[bool] = False

    distribution: Literal["normal", "uniform", "dirichlet", "bernoulli"] = "normal"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(
            "RandomWeights", "distribution", self.distribution, ("normal", "uniform", "dirichlet", "bernoulli")
        )
        check_seed("RandomWeights", self.seed)

    def solve(self, gram: Tensor, *, losses: Tensor | None = None, active: Tensor | None = None) -> Solution:
        """Random weights >= 0 with sum 1 over the active tasks, drawn apart for every problem; see `Method.solve`."""
        check_gram("RandomWeights", gram)
        check_active("RandomWeights", gram, active)
        rng = self._rng(gram.device)
        u, v = _uniform_pair(rng, gram.shape[:-1])
        rng[1].add_(1)
        if self.distribution == "normal":
            z = (-2 * u.log()).sqrt() * (2 * math.pi * v).cos()  # Box and Muller
            share = z.exp()  # |z| < 9: exp needs no shift
        elif self.distribution == "uniform":
            share = u
        elif self.distribution == "dirichlet":
            share = -u.log()
        else:
            share = (u < 0.5).double()
        equal = equal_shares(gram, active)
        share = torch.where(equal > 0, share, 0.0)
        total = share.sum(-1, keepdim=True)
        drawn = finite_among(gram, active) & (total > 0)
        return Solution(torch.where(drawn, share / total, equal))

    def _rng(self, device: torch.device) -> Tensor:
        return self._kept("rng", device, lambda: mtl_kernels.rng_state(self.seed, device=device))


def _uniform_pair(rng: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Two independent numbers per task, strictly between 0 and 1, float64 of ``shape`` ``[..., K]``.

    The four words of counter (step, problem, 4096 + task) make two of 52 bits and a half each.
    """
    seed, step = rng[0], rng[1]
    num_problems, num_tasks = math.prod(shape[:-1]), shape[-1]
    problem = torch.arange(num_problems, device=rng.device).view(-1, 1) & _WORD
    task = torch.arange(_FIRST_BLOCK, _FIRST_BLOCK + num_tasks, device=rng.device)
    words = philox((step & _WORD, (step >> 32) & _WORD, problem, task), (seed & _WORD, (seed >> 32) & _WORD)) >> 6
    pair = ((words[..., 0::2] * 2**26 + words[..., 1::2]).double() + 0.5) * 2.0**-52
    return pair[..., 0].reshape(shape), pair[..., 1].reshape(shape)
