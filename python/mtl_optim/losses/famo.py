"""FAMO: weights that follow how fast each loss falls, from the losses alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Losses, WeightedLosses, non_negative, number, positive, vector

EPS = 1e-8


class FAMO(WeightedLosses):
    """Fast adaptive multitask optimization: c sum_k z_k log D_k, with D = L - L_min + 1e-8 and z = softmax(w).

    Liu et al. 2023 (arXiv 2306.03792). c = 1 / sum_k (z_k / D_k) is held constant, so that the gradient is a convex
    combination of those of the losses. After the optimizer's step, call `update` with the losses of the same batch
    under the new parameters: it takes one Adam step on w along the softmax's Jacobian times
    log D_old - log D_new. Adam (betas 0.9, 0.999; eps 1e-8; weight decay added to the gradient) keeps its state in
    buffers.

    Losses <= min_losses - 1e-8 raise ValueError on a CPU; elsewhere and in compiled code nan or -inf flows. An `update`
    that is not finite changes nothing.

    Args:
        num_tasks: K >= 1.
        lr: step size for w, a finite number > 0.
        weight_decay: a finite number >= 0.
        min_losses: lower bounds of the losses, K finite numbers or one for all.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    w: Tensor
    min_losses: Tensor
    previous: Tensor
    first_moment: Tensor
    second_moment: Tensor
    steps: Tensor

    def __init__(
        self,
        num_tasks: int,
        lr: float = 0.025,
        weight_decay: float = 1e-3,
        min_losses: Tensor | list[float] | float = 0.0,
    ) -> None:
        super().__init__(num_tasks)
        self.lr = positive("FAMO", "lr", lr)
        self.weight_decay = non_negative("FAMO", "weight_decay", weight_decay)
        if isinstance(min_losses, (int, float)):
            min_losses = [number("FAMO", "min_losses", min_losses, lambda v: True, "")] * num_tasks
        self.register_buffer("min_losses", vector("FAMO", "min_losses", min_losses, num_tasks))
        self.register_buffer("w", torch.zeros(num_tasks))
        self.register_buffer("previous", torch.full((num_tasks,), math.nan))
        self.register_buffer("first_moment", torch.zeros(num_tasks))
        self.register_buffer("second_moment", torch.zeros(num_tasks))
        self.register_buffer("steps", torch.zeros(()))
        self._called = False

    def combine(self, losses: Tensor) -> Tensor:
        """The definition; gradients reach the losses alone."""
        distance = self._distance(losses)
        if self.training:
            self.previous.copy_(losses.detach())
            self._called = True
        z = torch.softmax(self.w, 0).to(losses.dtype)
        c = 1 / (z / distance.detach()).sum()
        return c * (z * distance.log()).sum()

    def weigh(self, losses: Tensor) -> Tensor:
        """c z_k / D_k, the weights of the gradients, of sum 1, ``[K]``."""
        share = torch.softmax(self.w, 0).to(losses.dtype) / self._distance(losses)
        return share / share.sum()

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
