"""What the autograd graph of a loss tells before a pass: the leaves it ends in, and what it hides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

_COMPILED = "CompiledFunctionBackward"
_DDP_SINK = "_DDPSinkBackward"
"""What DistributedDataParallel with find_unused_parameters puts behind a model: gradients pass through it."""

Edge = tuple[Any, int]
"""Where a tensor comes from: a node, and which of its outputs it is."""


def edge_of(tensor: Tensor) -> Edge:
    """That of a tensor with a graph."""
    return tensor.grad_fn, tensor.output_nr


def reached_leaves(losses: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """The leaves that the autograd graphs of some losses end in, and whether the graphs may hide others.

    Custom Python functions (reentrant checkpointing is one) can run a backward pass of their own, which the
    graph does not show. Those of torch.compile do not: every parameter is an input of theirs.
    """
    leaves = [loss for loss in losses if loss.grad_fn is None]
    found, _, hides = leaves_above([edge_of(loss) for loss in losses], frozenset())
    return list({id(leaf): leaf for leaf in (*leaves, *found)}.values()), hides


def leaves_beside(losses: Sequence[Tensor], params: Iterable[Tensor]) -> tuple[list[Tensor], bool]:
    """`reached_leaves`, and whether the graphs may hide some of these parameters: they do not show all of them."""
    leaves, hides = reached_leaves(losses)
    return leaves, hides and not set(map(id, params)) <= set(map(id, leaves))


def leaves_above(edges: Iterable[Edge], cuts: frozenset[Edge]) -> tuple[list[Tensor], set[Edge], bool]:
    """The leaves that some edges lead to without passing a cut, the cuts met, and whether others may be hidden."""
    leaves: dict[int, Tensor] = {}
    met: set[Edge] = set()
    hides = False
    for node, output in _edges(edges, cuts):
        if (node, output) in cuts:
            met.add((node, output))
            continue
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            leaves[id(variable)] = variable
        hides = hides or (is_custom(node) and type(node).__name__ != _DDP_SINK)
    return list(leaves.values()), met, hides


def is_custom(node: Any) -> bool:
    """Whether a node belongs to a custom Python function that may hide leaves from the graph."""
    return isinstance(node, BackwardCFunction) and type(node).__name__ != _COMPILED


def split_compiled_graph(losses: Iterable[Tensor]) -> bool:
    """Whether losses come out of one compiled graph through different outputs.

    Its backward pass is one function of the gradients of all outputs, zeros where a loss does not use one, so
    that every loss reaches every parameter in it.
    """
    outputs_of: dict[Any, set[int]] = {}
    for loss in losses:
        used: dict[Any, set[int]] = {}
        for node, output in _edges([edge_of(loss)]):
            if type(node).__name__ == _COMPILED:
                used.setdefault(node, set()).add(output)
        if any(outputs_of.setdefault(node, outputs) != outputs for node, outputs in used.items()):
            return True
    return False


def _edges(edges: Iterable[Edge], cuts: frozenset[Edge] = frozenset()) -> Iterator[Edge]:
    """The edges of some graphs, from where they begin; none behind a cut."""
    stack = list(edges)
    seen = set()
    while stack:
        node, output = stack.pop()
        if node is None:
            continue
        yield node, output
        if node not in seen and (node, output) not in cuts:
            seen.add(node)
            stack.extend(node.next_functions)
