"""MGDA: the minimum-norm point of the convex hull of the gradients."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

import mtl_kernels
from mtl_kernels import Solution, SolverCall
from mtl_kernels.solvers.min_norm import min_norm_options

from .base import About, Method, check_active, check_choice, check_gram, loss_values


@dataclasses.dataclass(frozen=True, eq=False)
class MGDA(Method):
    """Multiple-gradient descent: w = argmin over the simplex of w^T G w.

    Desideri 2012 (Comptes Rendus 350, eq. 2.1); Sener & Koltun 2018 (arXiv 1810.04650, eq. 3, Algorithm 2).
    The step d = J^T w descends every loss, or is zero where no such step exists; so a zero row gives d = 0.

    Args:
        normalize: what each row is divided by before the solve: "none", "l2" its norm n_k, "loss" its loss
            L_k, "loss+" L_k n_k. A zero norm, or a loss that is not positive and finite, counts as 1.
        solver: "exact" (Wolfe's active set) or "frank_wolfe" (exact line search, the published algorithm).
        max_iters: cap on the iterations, an integer >= 1; ``None`` is the solver's own.
        tol: relative duality gap to stop at, a number >= 0; ``None`` is the solver's own.
        weights_for: "original" maps the simplex weights back to the original rows (w_k / s_k for rows
            divided by s_k), so that d is the minimum-norm combination of the normalised rows; "normalized"
            uses the simplex weights on the original rows, as the published code does.
        zero_rows: a task whose gradient is zero is stationary, and "stop" (the definition) gives d = 0 as long as it
            is; "skip" leaves such tasks out of the step.

    The gap is that of the solved, normalised problem. Except with ``weights_for="normalized"``, a normalised
    MGDA step does not scale with the gradients; it therefore refuses to run with GradScaler.

    Raises:
        TypeError, ValueError: an unknown option, or a number out of range.
    """

    name: ClassVar[str] = "mgda"
    about: ClassVar[About] = About("Gram", "none", "no conflict; 0 where Pareto-stationary", "O(K^3), about K steps")

    normalize: Literal["none", "l2", "loss", "loss+"] = "none"
    solver: Literal["exact", "frank_wolfe"] = "exact"
    max_iters: int | None = None
    tol: float | None = None
    weights_for: Literal["original", "normalized"] = "original"
    zero_rows: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        check_choice("MGDA", "normalize", self.normalize, ("none", "l2", "loss", "loss+"))
        check_choice("MGDA", "solver", self.solver, ("exact", "frank_wolfe"))
        check_choice("MGDA", "weights_for", self.weights_for, ("original", "normalized"))
        check_choice("MGDA", "zero_rows", self.zero_rows, ("stop", "skip"))
        if self.max_iters is not None:
            if isinstance(self.max_iters, bool) or not isinstance(self.max_iters, int):
                raise TypeError(f"MGDA: expected max_iters as an integer, found {self.max_iters!r}")
            if self.max_iters < 1:
                raise ValueError(f"MGDA: expected max_iters >= 1, found {self.max_iters}")
        if self.tol is not None:
            if isinstance(self.tol, bool) or not isinstance(self.tol, (int, float)):
                raise TypeError(f"MGDA: expected tol as a number, found {self.tol!r}")
            if not math.isfinite(self.tol) or self.tol < 0:
                raise ValueError(f"MGDA: expected a finite tol >= 0, found {self.tol}")

    @property
    def needs_losses(self) -> bool:
        """True for normalize="loss" and "loss+"."""
        return self.normalize in ("loss", "loss+")

    @property
    def scales_with_gradient(self) -> bool:
        """False where rows are divided by something that grows with them."""
        return self.normalize == "none" or self.weights_for == "normalized"

    @property
    def weighs_alone(self) -> bool:
        """True where weights undo a normalisation."""
        return not self.scales_with_gradient

    @property
    def stops_at_zero_rows(self) -> bool:
        """True for zero_rows="stop"."""
        return self.zero_rows == "stop"

    def solver_call(self, device: torch.device) -> SolverCall | None:
        """Solver "min_norm", on rows as they are; None where they are looked at first."""
        if self.normalize != "none" or self.zero_rows == "skip":
            return None
        return SolverCall("min_norm", min_norm_options(self.solver, self.max_iters, self.tol))

    def solve(self, gram: Tensor, *, losses: Tensor | None = None, active: Tensor | None = None) -> Solution:
        """The minimum-norm weights, for the original rows; see `Method.solve`.

        Raises:
            TypeError, ValueError: losses missing or of the wrong shape where normalize needs them.
        """
        if self.solver_call(gram.device) is not None:
            return super().solve(gram, losses=losses, active=active)
        check_gram("MGDA", gram)
        check_active("MGDA", gram, active)
        if self.zero_rows == "skip":
            there = gram.diagonal(dim1=-2, dim2=-1) != 0
            active = there if active is None else there & active
        scale = self._scale(gram, losses)
        problem = gram.double() / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
        weights, gap, iterations = mtl_kernels.min_norm_weights(
            problem, solver=self.solver, max_iters=self.max_iters, tol=self.tol, active=active
        )
        if gap is not None and self.weights_for == "original":
            # A gap of NaN marks a non-finite problem, whose 1 / K weights are to reach the rows as they are.
            weights = torch.where(gap.isnan().unsqueeze(-1), weights, weights / scale)
        return Solution(weights, gap, iterations)

    def _scale(self, gram: Tensor, losses: Tensor | None) -> Tensor:
        """What the rows are divided by, float64 ``[..., K]``."""
        scale = torch.ones(gram.shape[:-1], dtype=torch.float64, device=gram.device)
        if self.normalize in ("l2", "loss+"):
            scale = scale * _positive_or_one(mtl_kernels.norms(gram.double()))
        if self.needs_losses:
            values = loss_values(f"MGDA(normalize={self.normalize!r})", gram, losses)
            scale = scale * _positive_or_one(values)
        return scale


def _positive_or_one(factor: Tensor) -> Tensor:
    return torch.where((factor > 0) & factor.isfinite(), factor, torch.ones_like(factor))
