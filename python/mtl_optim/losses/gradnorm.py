"""GradNorm: weights that bring the gradient norms of the tasks to a common scale."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .base import Losses, WeightedLosses, first_seen, non_negative, or_one, positive


class GradNorm(WeightedLosses):
    """Learned weights of sum K that minimise sum_k abs(w_k n_k - mean(w n) r_k^alpha), the targets held constant.

    Chen et al. 2018 (arXiv 1711.02257, Algorithm 1). n_k is the norm of the gradient of L_k, without its weight, on
    some shared parameters; r_k = (L_k / L_k(0)) / mean of these ratios. The weights start at 1, take one step
    of plain gradient descent at `update`, are kept >= 0 and scaled to sum K; they are a buffer, not a parameter.

    Args:
        num_tasks: K >= 1.
        parameters: where `update` measures norms itself, such as the last shared layer; not needed where norms
            are given.
        alpha: strength of the restoring force, a finite number >= 0.
        lr: step size for the weights, a finite number > 0.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    w: Tensor
    initial: Tensor
    current: Tensor

    def __init__(
        self, num_tasks: int, parameters: Iterable[Tensor] | None = None, alpha: float = 1.5, lr: float = 0.025
    ) -> None:
        super().__init__(num_tasks)
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
        self.register_buffer("w", torch.ones(num_tasks))
        self.register_buffer("initial", torch.full((num_tasks,), math.nan))
        self.register_buffer("current", torch.full((num_tasks,), math.nan))

    def record(self, losses: Tensor) -> None:
        """Keeps the losses for the next `update`, and the first positive, finite ones."""
        self.initial.copy_(first_seen(self.initial, losses))
        self.current.copy_(losses)

    def weigh(self, losses: Tensor) -> Tensor:
        """The learned weights, ``[K]``."""
        return self.w.clone()

    def update(self, norms: Losses | None = None, *, losses: Losses | None = None) -> None:
        """One step of the weights, for the losses of the last call; none where a norm or loss is not finite.

        Args:
            norms: ``[K]``, the norms n_k of the unweighted gradients, from anywhere; no backward pass is made.
            losses: instead of norms, the losses with their graph, before ``backward()`` frees it: one backward pass per
                task to ``parameters``.

        Raises:
            TypeError: neither norms nor losses, or both; losses without ``parameters``.
            ValueError: another number of norms.
        """
        if losses is not None and norms is None:
            found = self._norms(losses)
        elif norms is not None and losses is None:
            found = self.gather(norms, "norms").detach()
        else:
            raise TypeError("GradNorm: expected either norms, or losses= whose graph is still there")
        with torch.no_grad():
            n = found.to(self.w)
            ratio = or_one(self.current / self.initial)
            target = (self.w * n).mean() * (ratio / ratio.mean()) ** self.alpha
            moved = (self.w - self.lr * torch.sign(self.w * n - target) * n).clamp(min=0)
            moved = moved * (moved.shape[0] / moved.sum())
            usable = moved.isfinite().all() & self.current.isfinite().all() & n.isfinite().all()
            self.w.copy_(torch.where(usable, moved, self.w))

    def _norms(self, losses: Losses) -> Tensor:
        """The gradient norm of each loss on the parameters, ``[K]``."""
        if not self._measured:
            raise TypeError(
                "GradNorm: no parameters to measure norms on; pass parameters= when creating it, or norms here"
            )
        norms = []
        for loss in self.gather(losses):
            grads = torch.autograd.grad(loss, self._measured, retain_graph=True, allow_unused=True)
            parts = [torch.linalg.vector_norm(grad) for grad in grads if grad is not None]
            norms.append(torch.linalg.vector_norm(torch.stack(parts)) if parts else torch.zeros_like(loss))
        return torch.stack(norms).detach()
