"""Which parameters there are to combine, and which of them a loss can reach."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.function import BackwardCFunction

_COMPILED = "CompiledFunctionBackward"


class Parameters(NamedTuple):
    """The parameters of an optimizer that require grad.

    Attributes:
        managed: those whose gradients are combined. group_of: the param group of each of them.
        others: those of groups with mtl=False.
    """

    managed: list[Tensor]
    group_of: list[int]
    others: list[Tensor]


def select_parameters(groups: Iterable[Mapping[str, Any]]) -> Parameters:
    """Sorts the parameters of the param groups.

    Raises:
        ValueError: none is managed, or they are on several devices.
    """
    found = Parameters([], [], [])
    for g, group in enumerate(groups):
        wanted = [param for param in group["params"] if param.requires_grad]
        if group.get("mtl", True):
            found.managed.extend(wanted)
            found.group_of.extend([g] * len(wanted))
        else:
            found.others.extend(wanted)
    if not found.managed:
        raise ValueError("no parameter to combine gradients of: none requires grad in a param group without mtl=False")
    devices = {param.device for param in found.managed}
    if len(devices) > 1:
        raise ValueError(
            f"the managed parameters are on several devices ({', '.join(sorted(map(str, devices)))}); "
            "keep them on one, or put those of the others in param groups with mtl=False"
        )
    return found


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


def outside_leaves(named: Mapping[str, Tensor], parameters: Parameters) -> list[Tensor]:
    """The leaves outside the optimizer that the losses reach.

    Raises:
        ValueError: a loss surely reaches no managed parameter.
    """
    managed = {id(param) for param in parameters.managed}
    inside = managed | {id(param) for param in parameters.others}
    outside: dict[int, Tensor] = {}
    for name, loss in named.items():
        leaves, hides = reached_leaves([loss])
        if not hides and not any(id(leaf) in managed for leaf in leaves):
            raise reaches_nothing(name)
        outside.update((id(leaf), leaf) for leaf in leaves if id(leaf) not in inside)
    return list(outside.values())


def reaches_nothing(name: str) -> ValueError:
    """The error for a loss without a gradient for any managed parameter."""
    return ValueError(
        f"loss {name!r} reaches none of the parameters whose gradients are combined: was backward() called, "
        "are its parameters in the optimizer, and do they require grad? Parameters of groups with mtl=False "
        "do not count"
    )
