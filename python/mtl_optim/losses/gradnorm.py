"""GradNorm: weights that bring the gradient norms of the tasks to a common scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import LossAbout, Losses, WeightedLosses, first_seen, or_one
from .checks import Tasks, non_negative, positive

LEAST = 1e-3
"""No weight falls below it before they are scaled: of a row times 0 the norm is lost, and with it the way back."""
_ABSENT = -1.0
_FORGOTTEN = 1000
"""Calls without an update after which somebody has surely forgotten it."""


class GradNorm(WeightedLosses):
    """Learned weights of sum K that minimise sum_k abs(w_k n_k - mean(w n) r_k^alpha), the targets held constant.

    Chen et al. 2018 (arXiv 1711.02257, Algorithm 1). n_k is the norm of the gradient of L_k, without its weight, on
    some shared parameters; r_k = (L_k / L_k(0)) / mean of these ratios. The weights start at 1, take one step of plain
    gradient descent after every call, are kept >= 1e-3 and scaled to sum K; they are a buffer, not a parameter. Where a
    norm or a loss is not finite, or r_k^alpha no number (losses < 0), they stay. Tasks that a dict leaves out, and
    those whose loss is nan, keep their weight and count in no mean.

    The norms come from one of three places:

    - ``MultiTaskOptimizer(..., transform=GradNorm(K))`` takes them from the Gram matrix of every combination, those of
      all shared parameters, at no extra backward pass. With ``refresh_every`` only new combinations count.
    - ``GradNorm(K, parameters=...)`` takes them at every call itself, by one backward pass per task to these
      parameters, such as the last shared layer. It cannot be compiled into one graph.
    - `update`, called by hand.

    Args:
        tasks: how many tasks there are, or their names.
        parameters: where the module takes norms itself, in training mode.
        alpha: strength of the restoring force, a finite number >= 0.
        lr: step size for the weights, a finite number > 0.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    about: ClassVar[LossAbout] = LossAbout("sum w L, w n like r^a", "w, first losses", "update(norms), or transform=")

    w: Tensor
    initial: Tensor
    current: Tensor

    def __init__(
        self, tasks: Tasks, parameters: Iterable[Tensor] | None = None, alpha: float = 1.5, lr: float = 0.025
    ) -> None:
        super().__init__(tasks)
        num_tasks = self._count()
        self.alpha = non_negative("GradNorm", "alpha", alpha)
        self.lr = positive("GradNorm", "lr", lr)
        if isinstance(parameters, (Tensor, nn.Module)):
            raise TypeError(
                f"GradNorm: expected parameters as a sequence of tensors, found {type(parameters).__name__}; "
                "pass [tensor], or module.parameters()"
            )
        # A tuple, so that the parameters of the model are not registered here.
        self._measured: tuple[Tensor, ...] = tuple(parameters or ())
        if not all(isinstance(parameter, Tensor) and parameter.requires_grad for parameter in self._measured):
            raise TypeError("GradNorm: expected parameters as tensors that require gradients")
        if parameters is not None and not self._measured:
            raise ValueError(
                "GradNorm: expected at least one tensor in parameters, found none; was a generator used up?"
            )
        self.register_buffer("w", torch.ones(num_tasks))
        self.register_buffer("initial", torch.full((num_tasks,), math.nan))
        self.register_buffer("current", torch.full((num_tasks,), math.nan))
        self._called = False

    @property
    def wants_norms(self) -> bool:
        """Whether `update` waits for norms: there was a call in training mode since the last one."""
        return self._called

    def forward(self, losses: Losses) -> Tensor:
        """The weighted sum; with ``parameters`` the weights then take their step. See `LossCombination.forward`."""
        self._check_graphs(losses)
        combined = super().forward(losses)
        self._measure(losses)
        return combined

    def terms(self, losses: Losses) -> Losses:
        """The weighted losses; with ``parameters`` the weights then take their step. See `SumOfTerms.terms`."""
        self._check_graphs(losses)
        found = super().terms(losses)
        self._measure(losses)
        return found

    def record(self, losses: Tensor) -> None:
        """Keeps the losses for the next step, and the first positive, finite ones."""
        self.initial.copy_(first_seen(self.initial, losses))
        self.current.copy_(torch.where(losses.isnan(), self.current, losses))
        self._called = True
        self.remind(_FORGOTTEN, "update(norms)", "after every call, or pass parameters=, or use it as transform=")

    def weigh(self, losses: Tensor) -> Tensor:
        """The learned weights, ``[K]``."""
        return self.w.clone()

    def update(self, norms: Losses, *, weighted: bool = False) -> None:
        """One step of the weights, for the losses of the last call.

        Args:
            norms: the norms n_k of the gradients, as losses are passed; a dict may leave tasks out, whose weight stays.
            weighted: whether they are those of w_k L_k, as ``opt.report.norms`` where this module's terms were passed.

        Raises:
            RuntimeError: no call in training mode came before, or none since the last update.
            TypeError, ValueError: norms of another kind, or another number of them.
        """
        found = self.gather(norms, "norms", absent=_ABSENT).detach()
        if not self._called:
            raise RuntimeError(
                "GradNorm: update(norms) goes with the losses of the last call, and there was none in training mode "
                "since the last update; call the module on the losses first"
            )
        self._called, self._calls = False, 0
        with torch.no_grad():
            there = (found != _ABSENT) & ~self.current.isnan()
            n = found.to(self.w)
            n = torch.where(there, n / self.w if weighted else n, 0.0)
            count = there.sum()
            ratio = or_one(self.current / self.initial)
            mean_ratio = torch.where(there, ratio, 0.0).sum() / count
            target = (self.w * n).sum() / count * (ratio / mean_ratio) ** self.alpha
            moved = (self.w - self.lr * torch.sign(self.w * n - target) * n).clamp(min=LEAST)
            moved = torch.where(there, moved, 0.0)
            share = self.w.shape[0] - torch.where(there, 0.0, self.w).sum()
            moved = moved * (share / moved.sum())
            usable = moved.isfinite().all() & n.isfinite().all() & torch.where(there, target, 0.0).isfinite().all()
            self.w.copy_(torch.where(there & usable, moved, self.w))
            self.current.fill_(math.nan)

    @property
    def _measures(self) -> bool:
        return bool(self._measured) and self.training and torch.is_grad_enabled()

    def _check_graphs(self, losses: Losses) -> None:
        """Raise TypeError, before anything is recorded, where norms cannot be taken."""
        if not self._measures:
            return
        each = [losses] if isinstance(losses, Tensor) else self.listed(losses)
        if any(loss is not None and not loss.requires_grad for loss in each):
            raise TypeError(
                "GradNorm: a loss has no graph to take the norm of its gradient by; call eval() where losses are "
                "not trained on"
            )

    def _measure(self, losses: Losses) -> None:
        if self._measures:
            self._update_by_passes(losses)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _update_by_passes(self, losses: Losses) -> None:
        each = list(losses.unbind()) if isinstance(losses, Tensor) else self.listed(losses)
        absent = torch.full((), _ABSENT, dtype=torch.float64, device=self.w.device)
        self.update(torch.stack([absent if loss is None else self._norm(loss) for loss in each]))

    def _norm(self, loss: Tensor) -> Tensor:
        """The norm of the gradient of a loss on the parameters, a float64 scalar."""
        grads = torch.autograd.grad(loss, self._measured, retain_graph=True, allow_unused=True)
        parts = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads if grad is not None]
        if not parts:
            return torch.zeros((), dtype=torch.float64, device=self.w.device)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(parts))
        return norm.detach()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._called = not bool(self.current.isnan().all())
