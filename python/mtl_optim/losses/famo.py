"""FAMO: weights that follow how fast each loss falls, from the losses alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import LossAbout, Losses, SumOfTerms
from .checks import Tasks, Vector, non_negative, number, positive, vector

EPS = 1e-8
_FORGOTTEN = 1000
"""Calls without an update after which somebody has surely forgotten it."""


class FAMO(SumOfTerms):
    """Fast adaptive multitask optimization: c sum_k z_k log D_k, with D = L - L_min + 1e-8 and z = softmax(w).

    Liu et al. 2023 (arXiv 2306.03792). c = 1 / sum_k (z_k / D_k) is held constant, so that the gradient is a convex
    combination of those of the losses. After the optimizer's step, call `update` with the losses of the same batch
    under the new parameters: it takes one Adam step on w along the softmax's Jacobian times log D_old - log D_new. A
    RuntimeWarning tells where that is forgotten. Adam (betas 0.9, 0.999; eps 1e-8; weight decay added to the gradient)
    keeps its state in buffers.

    Losses <= min_losses - 1e-8 raise ValueError on a CPU; elsewhere and in compiled code nan or -inf flows. An `update`
    that is not finite changes nothing.

    Args:
        tasks: how many tasks there are, or their names; all of them come in every call.
        lr: step size for w, a finite number > 0.
        weight_decay: a finite number >= 0.
        min_losses: lower bounds of the losses, K finite numbers or one for all.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    about: ClassVar[LossAbout] = LossAbout("c sum softmax(w) log(L - min)", "w, its Adam", "update(losses) after steps")
    takes_some: ClassVar[bool] = False

    w: Tensor
    min_losses: Tensor
    previous: Tensor
    first_moment: Tensor
    second_moment: Tensor
    steps: Tensor

    def __init__(
        self,
        tasks: Tasks,
        lr: float = 0.025,
        weight_decay: float = 1e-3,
        min_losses: Vector | float = 0.0,
    ) -> None:
        super().__init__(tasks)
        num_tasks = self._count()
        self.lr = positive("FAMO", "lr", lr)
        self.weight_decay = non_negative("FAMO", "weight_decay", weight_decay)
        if isinstance(min_losses, (int, float)):
            min_losses = [number("FAMO", "min_losses", min_losses, lambda v: True, "")] * num_tasks
        self.register_buffer("min_losses", vector("FAMO", "min_losses", min_losses, tasks))
        self.register_buffer("w", torch.zeros(num_tasks))
        self.register_buffer("previous", torch.full((num_tasks,), math.nan))
        self.register_buffer("first_moment", torch.zeros(num_tasks))
        self.register_buffer("second_moment", torch.zeros(num_tasks))
        self.register_buffer("steps", torch.zeros(()))
        self._called = False

    def factors(self, losses: Tensor) -> Tensor:
        """c z_k and L_min, ``[K, 2]``; in training mode the losses are kept for `update`."""
        distance = self._distance(losses)
        if self.training:
            self.previous.copy_(losses)
            self._called = True
            self.remind(_FORGOTTEN, "update(new_losses)", "after every step of the optimizer")
        z = torch.softmax(self.w, 0).to(losses.dtype)
        return torch.stack((z / (z / distance).sum(), self.min_losses.to(losses.dtype)), -1)

    def term(self, losses: Tensor, factors: Tensor) -> Tensor:
        """c z_k log D_k; gradients reach L_k alone."""
        return factors[..., 0] * (losses - factors[..., 1] + EPS).log()

    def update(self, new_losses: Losses) -> None:
        """One Adam step on w.

        Args:
            new_losses: as for `forward`: the same batch after the optimizer's step.

        Raises:
            RuntimeError: no call in training mode came before.
            TypeError, ValueError: as for `forward`.
        """
        if not self._called:
            raise RuntimeError(
                "FAMO: update(new_losses) compares with the losses of the last call, and there was none in training "
                "mode; call the module on the losses first"
            )
        self._calls = 0
        now = self._distance(self.gather(new_losses, "new_losses").detach().to(self.w.dtype))
        with torch.no_grad():
            delta = self._distance(self.previous).log() - now.log()
            z = torch.softmax(self.w, 0)
            grad = z * (delta - (z * delta).sum()) + self.weight_decay * self.w
            usable = grad.isfinite().all()
            steps = self.steps + 1
            first = torch.lerp(self.first_moment, grad, 0.1)
            second = 0.999 * self.second_moment + 0.001 * grad * grad
            step = first / (1 - 0.9**steps) / ((second / (1 - 0.999**steps)).sqrt() + 1e-8)
            for state, moved in (
                (self.w, self.w - self.lr * step),
                (self.first_moment, first),
                (self.second_moment, second),
                (self.steps, steps),
            ):
                state.copy_(torch.where(usable, moved, state))

    def _distance(self, losses: Tensor) -> Tensor:
        distance = losses - self.min_losses + EPS
        self.require_positive(distance, "the logarithm is taken after min_losses was subtracted")
        return distance

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._called = not bool(self.previous.isnan().all())
