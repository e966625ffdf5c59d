"""What the autograd graph of a loss tells before a pass: the leaves it ends in, and what it hides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

_COMPILED = "CompiledFunctionBackward"


def reached_leaves(losses: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """The leaves that the autograd graphs of some losses end in, and whether the graphs may hide others.

    Custom Python functions (reentrant checkpointing is one) can run a backward pass of their own, which the
    graph does not show. Those of torch.compile do not: every parameter is an input of theirs.
    """
    leaves = {id(loss): loss for loss in losses if loss.grad_fn is None}
    hides = False
    for node, _ in _edges(losses):
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            leaves[id(variable)] = variable
        hides = hides or (isinstance(node, BackwardCFunction) and type(node).__name__ != _COMPILED)
    return list(leaves.values()), hides


def split_compiled_graph(losses: Iterable[Tensor]) -> bool:
    """Whether losses come out of one compiled graph through different outputs.

    Its backward pass is one function of the gradients of all outputs, zeros where a loss does not use one, so
    that every loss reaches every parameter in it.
    """
    outputs_of: dict[Any, set[int]] = {}
    for loss in losses:
        used: dict[Any, set[int]] = {}
        for node, output in _edges([loss]):
            if type(node).__name__ == _COMPILED:
                used.setdefault(node, set()).add(output)
        if any(outputs_of.setdefault(node, outputs) != outputs for node, outputs in used.items()):
            return True
    return False


def _edges(losses: Iterable[Tensor]) -> Iterator[tuple[Any, int]]:
    """The edges of some graphs, each as the node it leads to and the number of that node's output."""
    stack: list[tuple[Any, int]] = [(loss.grad_fn, loss.output_nr) for loss in losses]
    seen = set()
    while stack:
        node, output = stack.pop()
        if node is None:
            continue
        yield node, output
        if node not in seen:
            seen.add(node)
            stack.extend(node.next_functions)
