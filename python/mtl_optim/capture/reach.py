"""Which part of the joint autograd graph of several losses each of them reaches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from .graph import Edge, is_custom


class Crossing(NamedTuple):
    """Where the graph of one loss alone leads into what it shares with others.

    Attributes:
        node: the last node of its own, whose ``output``-th gradient goes to ``edge``; None where the loss itself is
            shared.
    """

    node: Node | None
    output: int
    edge: Edge


class Reach:
    """The nodes below some losses, in topological order: a node comes after all that lead to it.

    Attributes:
        order: the nodes. tasks: per node, the losses that reach it, as bits.
        users: per node, the nodes that lead to it and by which of their edges.
        leaves: the nodes that accumulate a leaf's gradient, with the leaf.
        custom: whether there are custom functions, which may run passes of their own.
        reentrant: whether some of them is a checkpoint that takes no pass but one for all leaves.
    """

    def __init__(self, losses: Sequence[Tensor]) -> None:
        self.roots: list[Edge] = [(edge.node, edge.output_nr) for edge in map(get_gradient_edge, losses)]
        self.order: list[Node] = []
        self.users: dict[Node, list[tuple[Node, int]]] = {}
        self.leaves: dict[Node, Tensor] = {}
        self.custom = self.reentrant = False
        waiting = self._count_users()
        self.tasks = dict.fromkeys(waiting, 0)
        for k, (node, _) in enumerate(self.roots):
            self.tasks[node] |= 1 << k
        ready = [node for node, count in waiting.items() if not count]
        while ready:
            node = ready.pop()
            self.order.append(node)
            bits = self.tasks[node]
            for index, (below, _) in enumerate(node.next_functions):
                if below is None:
                    continue
                self.tasks[below] |= bits
                self.users.setdefault(below, []).append((node, index))
                waiting[below] -= 1
                if not waiting[below]:
                    ready.append(below)
            variable = getattr(node, "variable", None)
            if isinstance(variable, Tensor):
                self.leaves[node] = variable
            elif is_custom(node):
                self.custom = True
                self.reentrant = self.reentrant or node.name() == "CheckpointFunctionBackward"

    def shared(self, node: Node) -> bool:
        """Whether several losses reach a node."""
        bits = self.tasks[node]
        return bits & (bits - 1) != 0

    @property
    def splits(self) -> bool:
        """Whether a custom function that several losses reach has several outputs.

        Such a one may tell a gradient that is absent from one of zeros, which a pass for several losses at once cannot.
        """
        return any(is_custom(node) and self.shared(node) and len(node._input_metadata) > 1 for node in self.order)

    def tasks_at(self, node: Node, some: Iterable[int]) -> list[int]:
        """Those of some losses that reach a node."""
        bits = self.tasks[node]
        return [k for k in some if bits >> k & 1]

    def crossings(self) -> list[list[Crossing]]:
        """Per loss, where its own part of the graph ends."""
        found: list[list[Crossing]] = [[] for _ in self.roots]
        for k, (node, output) in enumerate(self.roots):
            if self.shared(node):
                found[k].append(Crossing(None, 0, (node, output)))
        for node in self.order:
            if self.shared(node):
                continue
            k = self.tasks[node].bit_length() - 1
            for index, (below, output) in enumerate(node.next_functions):
                if below is not None and self.shared(below):
                    found[k].append(Crossing(node, index, (below, output)))
        return found

    def _count_users(self) -> dict[Node, int]:
        """How many edges lead to each node."""
        counts: dict[Node, int] = {node: 0 for node, _ in self.roots}
        stack: list[Any] = list(counts)
        while stack:
            for below, _ in stack.pop().next_functions:
                if below is None:
                    continue
                if below not in counts:
                    counts[below] = 0
                    stack.append(below)
                counts[below] += 1
        return counts
