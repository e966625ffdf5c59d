"""Rows of a weight as coordinates: what a gradient A'D is in an orthonormal basis of the rows of A.

A = L Q with L ``[R, R]`` and orthonormal Q ``[R, d_in]``, so that A'D = Q'U with U = L'D ``[R, d_out]``. Lengths and
angles of the U are those of the gradients, and a combination of the U becomes one of the gradients by one product with
Q, at the end. No gradient of the weight is computed for a single task.

On several ranks A has the rows of all of them, which each of them gathers, so that all have the same L and Q; with its
part L_r of L a rank has U_r = L_r'D_r, and the U_r add up to U. At the end each rank makes some columns of d_in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .products import Use

_MOST_ROWS = 0.4
"""R as a share of d_in: above it a row of coordinates saves little of a row."""
_MOST_WORK = 0.75
"""Of the operations of dense rows: above it the passes hardly gain what the rest costs."""


class Shares(NamedTuple):
    """What the ranks have of the inputs of a weight.

    Attributes:
        rows: of each rank. rank: this one.
        gather: the tensors of all ranks, of these sizes along a dimension.
    """

    rows: Sequence[int]
    rank: int
    gather: Callable[[Tensor, int, Sequence[int]], list[Tensor]]

    def joined(self, own: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        """Those of all ranks in one."""
        everywhere = self.gather(own, dim, sizes)
        return own if len(everywhere) == 1 else torch.cat(everywhere, dim)


def pays(num_tasks: int, weight: Tensor, uses: Sequence[Use], rows: int, ranks: int) -> bool:
    """The rule by which a weight is factored, from sizes alone.

    Operations with numbers of 64 bits count twice: there are R^2 d_in of them for A A', and as many for Q.

    Args:
        rows: R, those of all ranks.
    """
    _, d_in, d_out = _sizes(weight, uses)
    own = rows / ranks
    if uses[0].operator.kind == "embedding":
        return rows <= _MOST_ROWS * d_in
    dense = 2 * num_tasks * own * d_in * d_out
    factored = (
        2 * num_tasks * own * rows * d_out
        + 2 * own * d_in * d_out
        + 2 * (2 * rows * rows * d_in + own * rows * d_in + rows**3 / 3)
    )
    return rows <= _MOST_ROWS * d_in and factored <= _MOST_WORK * dense


class Factor(Protocol):
    """A weight whose rows are coordinates.

    Attributes:
        like: of the shape and dtype of a row.
    """

    like: Tensor

    def coordinates(self, use: int, grad: Tensor) -> Tensor:
        """What the gradient of the output of a use adds to the row; of all tasks, where that has one dimension more."""

    def expand(self, combined: Tensor) -> Tensor:
        """The gradient of the weight with these coordinates."""


class ProductFactor:
    """See the head of this file. Batches of weights ``[E, d_in, d_out]`` have a basis each."""

    def __init__(self, weight: Tensor, uses: Sequence[Use], shares: Shares) -> None:
        self._weight = weight
        self._uses, self._shares = uses, shares
        parts = [use.inputs(weight) for use in uses]
        own = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
        inputs = shares.joined(own, -2, shares.rows)
        self._places = [sum(shares.rows[: shares.rank])]
        for part in parts:
            self._places.append(self._places[-1] + part.shape[-2])
        self.dtype = torch.promote_types(inputs.dtype, torch.float32)
        with full_precision(inputs.device):
            if self.dtype is torch.float64:
                basis, left = torch.linalg.qr(inputs.mT)
                self._basis: Tensor | None = basis.mT
                self._left, self._inputs = left.mT, inputs
            else:
                self._basis, self._inputs = None, inputs
                self._left = _root_of_products(inputs.double())
            self._transposed = self._left.to(self.dtype).mT.contiguous()
        _, _, d_out = _sizes(weight, uses)
        self.like = _empty((*self._left.shape[:-1], d_out), self.dtype, weight.device)

    def coordinates(self, use: int, grad: Tensor) -> Tensor:
        """U, ``[..., R, d_out]``."""
        found = self._uses[use]
        with full_precision(grad.device):
            outputs = found.operator.outputs(found.node, grad).to(self.dtype)
            return torch.matmul(self._transposed[..., self._places[use] : self._places[use + 1]], outputs)

    def expand(self, combined: Tensor) -> Tensor:
        flips, shares = self._uses[0].flips, self._shares
        columns, ranks = self._inputs.shape[-1], len(shares.rows)
        sizes = [columns * (rank + 1) // ranks - columns * rank // ranks for rank in range(ranks)]
        own = slice(sum(sizes[: shares.rank]), sum(sizes[: shares.rank + 1]))
        with full_precision(combined.device):
            if self._basis is not None:
                basis = self._basis[..., own]
            else:
                inputs = self._inputs[..., own].double()
                basis = torch.linalg.solve_triangular(self._left, inputs, upper=False).to(self.dtype)
            product = combined.mT @ basis if flips else basis.mT @ combined
        return shares.joined(product, -1 if flips else -2, sizes).reshape(self._weight.shape)


class EmbeddingFactor:
    """A row per index that occurs: the others are zero for every task."""

    def __init__(self, weight: Tensor, uses: Sequence[Use], shares: Shares) -> None:
        self._weight = weight
        self._nodes = [use.node for use in uses]
        indices = [use.inputs(weight) for use in uses]
        everywhere = shares.joined(torch.cat([index.reshape(-1) for index in indices]), 0, shares.rows)
        self._rows, places = torch.unique(everywhere, return_inverse=True)
        own = places.split(list(shares.rows))[shares.rank]
        sizes = [index.numel() for index in indices]
        self._places = [part.view_as(index) for part, index in zip(own.split(sizes), indices, strict=True)]
        self.like = _empty((len(self._rows), *weight.shape[1:]), weight.dtype, weight.device)

    def coordinates(self, use: int, grad: Tensor) -> Tensor:
        if grad.dim() > self._places[use].dim() + 1:
            return torch.stack([self.coordinates(use, one) for one in grad])
        node = self._nodes[use]
        padding = node._saved_padding_idx  # type: ignore[attr-defined]
        if 0 <= padding < self._weight.shape[0]:
            outside = (self._rows[self._places[use]] == padding).unsqueeze(-1)
            grad = grad.masked_fill(outside, 0)
        by_frequency = node._saved_scale_grad_by_freq  # type: ignore[attr-defined]
        found: Tensor = torch.ops.aten.embedding_dense_backward(
            grad, self._places[use], self._rows.numel(), -1, by_frequency
        )
        return found

    def expand(self, combined: Tensor) -> Tensor:
        found = torch.zeros(self._weight.shape, dtype=combined.dtype, device=combined.device)
        return found.index_copy_(0, self._rows, combined)


def is_multiplied(use: Use) -> bool:
    """Whether the inputs of a use are dense and real, or indices of an embedding."""
    kept = use.saved()
    return use.operator.kind == "embedding" or (kept.layout is torch.strided and kept.is_floating_point())


def is_recomputed(use: Use) -> bool:
    """Whether looking at what a node has saved computes or copies it (checkpointing, offloading)."""
    first, second = use.saved(), use.saved()
    return first.layout is torch.strided and first.data_ptr() != second.data_ptr()


def make_factor(weight: Tensor, uses: Sequence[Use], shares: Shares) -> Factor:
    """What the rows of a weight go by in this step; reads what the graph has saved."""
    kind = EmbeddingFactor if uses[0].operator.kind == "embedding" else ProductFactor
    return kind(weight, uses, shares)


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Without memory for its elements."""
    return torch.empty((), dtype=dtype, device=device).expand(*shape)


def _sizes(weight: Tensor, uses: Sequence[Use]) -> tuple[int, int, int]:
    """R, d_in and d_out of a weight."""
    rows, operator = sum(use.rows for use in uses), uses[0].operator
    if operator.kind == "convolution":
        return rows, weight[0].numel(), weight.shape[0]
    d_in, d_out = weight.shape[-2:]
    return (rows, d_out, d_in) if uses[0].flips else (rows, d_in, d_out)


def _root_of_products(inputs: Tensor) -> Tensor:
    """L with L L' = A A' as closely as float64 tells, of A in float64; nan where A is not finite.

    What is added to the diagonal is the error of A A' itself, which a factorisation may meet where rows depend on each
    other (padding, dead units, repeated inputs).
    """
    products = inputs @ inputs.mT
    diagonal = products.diagonal(dim1=-2, dim2=-1)
    sizes = diagonal.sum(-1, keepdim=True)
    rounding = 4 * (products.shape[-1] + 1) * torch.finfo(torch.float64).eps
    diagonal.add_(rounding * sizes + torch.finfo(torch.float64).tiny)
    left, _ = torch.linalg.cholesky_ex(products)
    return torch.where(sizes.isfinite().unsqueeze(-1), left, torch.nan)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """What is computed for rows is not for autocast to round."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()
