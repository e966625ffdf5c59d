"""Passes through what several losses share, for several of them at a time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from .graph import Edge
from .passes import hooked, run_backward
from .reach import Crossing, Reach


class Frontier:
    """Where the losses' own parts of the graph end, and what arrives there.

    Attributes:
        leaves: per loss, those that its own nodes lead to and that other losses reach as well.
        mixed: those of them that losses reach by way of the frontier too: no pass ends in one without the other.
        nested: whether some of its edges lead to others, so that the passes to it run through shared parts too.
    """

    def __init__(self, reach: Reach) -> None:
        self._crossings: list[list[Crossing]] = []
        self.leaves: list[list[Tensor]] = []
        self._arrived: dict[Edge, dict[int, Tensor]] = {}
        for found in reach.crossings():
            ends = (one.edge[0] for one in found if one.node is not None)
            direct = dict.fromkeys(node for node in ends if node in reach.leaves)
            self._crossings.append([one for one in found if one.edge[0] not in direct])
            self.leaves.append([reach.leaves[node] for node in direct])
        known = {id(leaf) for leaves in self.leaves for leaf in leaves}
        self.mixed = [
            leaf
            for node, leaf in reach.leaves.items()
            if id(leaf) in known and any(reach.shared(user) for user, _ in reach.users.get(node, ()))
        ]
        edges = {crossing.edge for crossings in self._crossings for crossing in crossings}
        starts = {node for node, _ in edges}
        below: set[Node] = set()
        self.nested = False
        for node in reach.order:
            users = [user for user, _ in reach.users.get(node, ()) if reach.shared(user)]
            if any(user in below or user in starts for user in users):
                below.add(node)
                self.nested = self.nested or node in starts

    def run(self, k: int, loss: Tensor, own: Sequence[Any]) -> None:
        """The backward pass of a loss down to the frontier, and to leaves of its own.

        The edges get what the loss's own nodes hand over, not what arrives there: that includes what came by way of
        other edges.
        """
        crossings = self._crossings[k]
        nodes: dict[Node, list[Crossing]] = {}
        for crossing in crossings:
            if crossing.node is None:
                self._add(k, crossing.edge, torch.ones_like(loss))
            else:
                nodes.setdefault(crossing.node, []).append(crossing)
        edges = dict.fromkeys(crossing.edge for found in nodes.values() for crossing in found)
        inputs = [*own, *(GradientEdge(*edge) for edge in edges)]
        if not inputs:
            return
        hooks = [(node.register_hook, functools.partial(self._hand_over, k, found)) for node, found in nodes.items()]
        with hooked(hooks):
            run_backward(functools.partial(loss.backward, retain_graph=True, inputs=inputs))

    def through(self, targets: Sequence[Any], tasks: Sequence[int], retain_graph: bool) -> Sequence[Tensor | None]:
        """The gradients of some losses at some leaves and edges, ``[len(tasks), ...]``; zeros where a loss has none."""
        edges = [edge for edge, arrived in self._arrived.items() if not arrived.keys().isdisjoint(tasks)]
        if not edges:
            return [None] * len(targets)
        starts = [_stack(self._arrived[edge], tasks) for edge in edges]
        outputs = [GradientEdge(*edge) for edge in edges]
        return torch.autograd.grad(
            outputs, targets, starts, retain_graph=retain_graph, allow_unused=True, is_grads_batched=True
        )

    def _hand_over(self, k: int, crossings: Sequence[Crossing], grads: Sequence[Tensor | None], _: object) -> None:
        for crossing in crossings:
            if (grad := grads[crossing.output]) is not None:
                self._add(k, crossing.edge, grad)

    def _add(self, k: int, edge: Edge, grad: Tensor) -> None:
        arrived = self._arrived.setdefault(edge, {})
        arrived[k] = arrived[k] + grad if k in arrived else grad


def _stack(grads: dict[int, Tensor], tasks: Sequence[int]) -> Tensor:
    """Those of some losses, which are then gone."""
    found = [grads.pop(k, None) for k in tasks]
    first = next(grad for grad in found if grad is not None)
    return torch.stack([torch.zeros_like(first) if grad is None else grad for grad in found])
