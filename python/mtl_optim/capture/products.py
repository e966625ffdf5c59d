"""Where an autograd graph multiplies with a weight: the operators whose weight gradient is a product that can wait.

With inputs A ``[..., R, d_in]`` and the gradient D ``[..., R, d_out]`` of the output, that of the weight is A'D, as
``[..., d_in, d_out]``. An operator is known by the name of its node and by the edge that leads to the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from .reach import Reach


class Operator(NamedTuple):
    """How an operator uses a weight.

    Attributes:
        saved: what the node has kept of its inputs, as an attribute of it.
        inputs: A, from the node, that tensor, and the shape of the weight.
        outputs: D, from the gradient of the node's output, which may have leading dimensions.
        rows: R, from the shape of that output, and whether the operator is of the kind that is known.
        flips: whether the weight's gradient is (A'D)'.
        kind: "matrix", "convolution" (the weight has more dimensions), or "embedding" (A is given by indices).
    """

    saved: str
    inputs: Callable[[Any, Tensor, torch.Size], Tensor]
    outputs: Callable[[Any, Tensor], Tensor]
    rows: Callable[[Any, torch.Size], int]
    flips: bool
    kind: str = "matrix"


class Use(NamedTuple):
    """A use of a weight by a node that several losses reach."""

    node: Node
    operator: Operator
    flips: bool
    rows: int

    def saved(self) -> Tensor:
        """What the node has kept of its inputs; under checkpointing they are computed for it."""
        found: Tensor = getattr(self.node, self.operator.saved)
        return found

    def inputs(self, weight: Tensor) -> Tensor:
        """A; for an embedding the indices."""
        return self.operator.inputs(self.node, self.saved().detach(), weight.shape)


def _right(saved: str) -> Operator:
    """Inputs times weight."""
    return Operator(saved, lambda node, kept, shape: kept, lambda node, grad: grad, _matrix_rows(-2), False)


def _left(saved: str) -> Operator:
    """Weight times inputs: the transposed product of the transposed."""
    return Operator(saved, lambda node, kept, shape: kept.mT, lambda node, grad: grad.mT, _matrix_rows(-1), True)


def _matrix_rows(dim: int) -> Callable[[Any, torch.Size], int]:
    return lambda node, shape: shape[dim] if getattr(node, "_saved_alpha", 1) == 1 else 0


def _convolution_inputs(node: Any, image: Tensor, shape: torch.Size) -> Tensor:
    """The patches of the input, ``[B * positions, C * kernel size]``."""
    kernel = tuple(shape[2:])
    dilation, padding, stride = (tuple(getattr(node, f"_saved_{name}")) for name in ("dilation", "padding", "stride"))
    if len(kernel) == 1:
        image, kernel = image.unsqueeze(-2), (1, *kernel)
        dilation, padding, stride = (1, *dilation), (0, *padding), (1, *stride)
    return nn.functional.unfold(image, kernel, dilation, padding, stride).mT.flatten(0, 1)


def _convolution_outputs(node: Any, grad: Tensor) -> Tensor:
    return grad.flatten(-len(node._saved_stride)).mT.flatten(-3, -2)


def _convolution_rows(node: Any, shape: torch.Size) -> int:
    known = node._saved_groups == 1 and not node._saved_transposed and 3 <= len(shape) <= 4
    return shape[0] * math.prod(shape[2:]) if known else 0


_OPERATORS = {
    ("AddmmBackward0", 2): _right("_saved_mat1"),
    ("AddmmBackward0", 1): _left("_saved_mat2"),
    ("MmBackward0", 1): _right("_saved_self"),
    ("MmBackward0", 0): _left("_saved_mat2"),
    ("BaddbmmBackward0", 2): _right("_saved_batch1"),
    ("BaddbmmBackward0", 1): _left("_saved_batch2"),
    ("BmmBackward0", 1): _right("_saved_self"),
    ("BmmBackward0", 0): _left("_saved_mat2"),
    ("ConvolutionBackward0", 1): Operator(
        "_saved_input", _convolution_inputs, _convolution_outputs, _convolution_rows, True, "convolution"
    ),
    ("EmbeddingBackward0", 0): Operator(
        "_saved_indices",
        lambda node, kept, shape: kept,
        lambda node, grad: grad,
        lambda node, shape: math.prod(shape[:-1]),
        False,
        "embedding",
    ),
}
_SAME = frozenset({"ToCopyBackward0", "AliasBackward0", "ExpandBackward0", "ViewBackward0", "UnsafeViewBackward0"})
"""Between a weight and the operator that uses it, as long as they keep its shape."""


def uses_of(leaf: Node, weight: Tensor, reach: Reach) -> list[Use] | str:
    """All uses of a weight, or what is in the way of its gradient being such a product.

    Args:
        leaf: the node that accumulates its gradient.
    """
    found: list[Use] = []
    stack = [(leaf, False, weight.shape)]
    while stack:
        below, flipped, shape = stack.pop()
        for node, index in reach.users.get(below, ()):
            name = node.name()
            result = _result_shape(node)
            operator = _OPERATORS.get((name, index))
            if operator is not None:
                if not reach.shared(node):
                    return "its inputs differ between tasks"
                fits = operator.kind != "matrix" or len(result) == len(shape)
                rows = operator.rows(node, result) if fits else 0
                if not rows:
                    return f"{name} of another kind"
                found.append(Use(node, operator, flipped != operator.flips, rows))
            elif _transposes(node, name, len(shape)):
                stack.append((node, not flipped, torch.Size([*shape[:-2], shape[-1], shape[-2]])))
            elif name in _SAME and result == shape:
                stack.append((node, flipped, shape))
            else:
                return name
    if len({(use.operator.kind, use.flips) for use in found}) > 1:
        return "it is used in several ways, as such and transposed"
    return found


def most_rows(reach: Reach) -> float:
    """R of the largest matrix product that several losses reach; infinite where there is a convolution, 0 for none."""
    found = 0.0
    for node in reach.order:
        name = node.name()
        if name == "ConvolutionBackward0" and reach.shared(node):
            return math.inf
        if name in ("AddmmBackward0", "MmBackward0") and reach.shared(node):
            found = max(found, _result_shape(node)[0])
    return found


def _transposes(node: Any, name: str, num_dims: int) -> bool:
    """Whether a node swaps the last two of two or three dimensions."""
    if num_dims not in (2, 3):
        return False
    last = {num_dims - 2, num_dims - 1}
    if name == "TBackward0":
        return num_dims == 2
    if name == "TransposeBackward0":
        return {_dim(node._saved_dim0, num_dims), _dim(node._saved_dim1, num_dims)} == last
    if name == "PermuteBackward0":
        dims = [_dim(dim, num_dims) for dim in node._saved_dims]
        return dims == [*range(num_dims - 2), num_dims - 1, num_dims - 2]
    return False


def _result_shape(node: Any) -> torch.Size:
    return torch.Size(node._input_metadata[0].shape)


def _dim(saved: int, num_dims: int) -> int:
    """A dimension as autograd saves it: negative ones as unsigned 64-bit numbers."""
    return (saved - (1 << 64) if saved >= 1 << 63 else saved) % num_dims
