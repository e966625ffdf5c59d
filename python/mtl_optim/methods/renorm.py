"""Shared gradients as long as those of the heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

import mtl_kernels
from mtl_kernels import RowTable, Solution

from .base import About, Method, check_active, check_gram
from .shares import equal_shares, finite_among


@dataclasses.dataclass(frozen=True, eq=False)
class ReNorm(Method):
    """w_k = h_k / n_k: every shared row is rescaled to h_k, the norm of its task's gradient for its own parameters.

    n_k = ||g_k||. A zero row has weight 0. In a training step h_k is the norm over all parameters that task k alone
    reaches in it, whatever the granularity, without those of a ``transform``; where several tasks come and one of them
    has none, the step raises. A task that comes alone before any step has shown its head keeps its gradient.

    On a matrix the norms are given: ``ReNorm()(rows, head_norms=h)``.
    """

    name: ClassVar[str] = "renorm"
    about: ClassVar[About] = About("Gram, head gradients", "none", "every task as long a part as in its head", "O(K)")
    weighs_alone: ClassVar[bool] = True
    needs_heads: ClassVar[bool] = True

    _head_norms: Tensor | None = dataclasses.field(default=None, init=False, repr=False)

    def with_heads(self, norms: Tensor) -> ReNorm:
        """The method for rows of tasks whose head gradients have these norms, ``[K]``."""
        bound = ReNorm()
        object.__setattr__(bound, "_head_norms", norms)
        return bound

    def solve(
        self,
        gram: Tensor,
        *,
        losses: Tensor | None = None,
        active: Tensor | None = None,
        head_norms: Tensor | None = None,
    ) -> Solution:
        """h_k / n_k on every active task; see `Method.solve`.

        Args:
            head_norms: h, ``[K]`` or ``[..., K]``.

        Raises:
            TypeError, ValueError: there are none, or not one per row.
        """
        check_gram("ReNorm", gram)
        check_active("ReNorm", gram, active)
        heads = self._checked(gram, self._head_norms if head_norms is None else head_norms)
        length = mtl_kernels.norms(gram.double())
        equal = equal_shares(gram, active)
        there = equal > 0
        finite = finite_among(gram, active) & (heads.isfinite() | ~there).all(-1, keepdim=True)
        weights = torch.where((length > 0) & there, heads / length, 0.0)
        return Solution(torch.where(finite, weights, equal))

    def weights(
        self,
        gram: Tensor,
        *,
        losses: Tensor | None = None,
        active: Tensor | None = None,
        head_norms: Tensor | None = None,
    ) -> Tensor:
        """The weights alone; the arguments are those of `solve`."""
        return self.solve(gram, losses=losses, active=active, head_norms=head_norms).weights

    def __call__(
        self,
        rows: Tensor | Sequence[Sequence[Tensor | None]] | RowTable,
        *more: Tensor | Sequence[Sequence[Tensor | None]] | RowTable,
        losses: Tensor | None = None,
        active: Tensor | None = None,
        head_norms: Tensor | None = None,
    ) -> Any:
        """Combines the rows; ``head_norms`` as for `solve`. See `Method.__call__`."""
        method = self if head_norms is None else self.with_heads(head_norms)
        return super(ReNorm, method).__call__(rows, *more, losses=losses, active=active)

    @staticmethod
    def _checked(gram: Tensor, norms: Tensor | None) -> Tensor:
        if norms is None:
            raise ValueError(
                "ReNorm needs the norms of the tasks' head gradients: pass head_norms=, a tensor [K]; in a training "
                "step MultiTaskOptimizer finds them"
            )
        if not isinstance(norms, Tensor) or not norms.is_floating_point():
            found = norms.dtype if isinstance(norms, Tensor) else type(norms).__name__
            raise TypeError(f"ReNorm: expected head_norms as a floating-point tensor [K], found {found}")
        if norms.shape not in (gram.shape[:-1], gram.shape[-1:]):
            raise ValueError(f"ReNorm: expected head_norms of shape [{gram.shape[-1]}], found {list(norms.shape)}")
        return norms.detach().to(gram.device, torch.float64)
