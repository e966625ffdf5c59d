"""Random loss weighting: fresh random weights at every step."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch

from mtl_kernels import SolverCall
from mtl_kernels.solvers.random_weights import random_options

from .base import About, Method, check_choice, check_seed


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

    def solver_call(self, device: torch.device) -> SolverCall:
        """Solver "random_weights": weights >= 0 with sum 1 over the active tasks, drawn apart for every problem."""
        options = random_options(self.distribution)
        return SolverCall(
            "random_weights", options, rng=self._rng(self.seed, device), advance_rng=True, certified=False
        )
