"""Rows at tensors that the parameters behind them are reached through, so that these need one backward pass, not K."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..capture.grads import Row, add_grads, put_grads, take_grads
from ..capture.graph import edge_of, leaves_above
from ..capture.passes import run_backward
from ..methods.rows import KeepingMethod
from ..options import Options
from .losses import reaches_nothing
from .parameters import Parameters


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Where the graph of some losses is cut: rows are gradients at these tensors, and for what lies beside them.

    Attributes:
        tensors: see ``features`` of `MultiTaskOptimizer.backward`.
        beside: the leaves that a loss reaches without them.
        behind: the leaves that they are made of, for the combination; None for all there are, hidden ones too.
        plain: those of them that receive the plain sum: of param groups with mtl=False, and outside the optimizer.
    """

    tensors: list[Tensor]
    beside: list[Tensor]
    behind: list[Tensor] | None
    plain: list[Tensor]

    @classmethod
    def of(
        cls, features: object, named: Mapping[str, Tensor], parameters: Parameters, options: Options, keep_outside: bool
    ) -> Features:
        """Looks through the graphs of the losses.

        Raises:
            TypeError, ValueError: what is no such tensor, or cannot be cut at; a parameter on both sides of the cut; or
                an option that goes with rows over parameters only.
        """
        _check_options(options)
        if parameters.partial:
            raise ValueError(
                "features= with a param group of gram=False: what is behind the features is not in the Gram matrix "
                "anyway; leave gram=False out"
            )
        tensors = _check_tensors(features)
        edges = [edge_of(tensor) for tensor in tensors]
        beside, met, _ = leaves_above([edge_of(loss) for loss in named.values()], frozenset(edges))
        for n, edge in enumerate(edges):
            if edge not in met:
                raise ValueError(
                    f"features[{n}] is in the graph of none of the losses: pass the very tensor that the heads were "
                    "called with, of this forward pass and not detached"
                )
            inner = [(node, number) for node, number in edge[0].next_functions if node is not None]
            _, inside, _ = leaves_above(inner, frozenset(edges))
            if inside:
                other = edges.index(next(iter(inside)))
                raise ValueError(
                    f"features[{n}] is computed from features[{other}], whose gradient would hold its own as well; "
                    "pass the later ones alone, or tensors side by side"
                )
        behind, _, hides = leaves_above(edges, frozenset())
        known = set(map(id, (*parameters.managed, *parameters.others)))
        if keep_outside:
            beside, behind = ([leaf for leaf in side if id(leaf) in known] for side in (beside, behind))
        _check_sides(beside, behind)
        managed = set(map(id, parameters.managed))
        plain = [leaf for leaf in behind if id(leaf) not in managed]
        everything = not plain and not keep_outside
        if hides and not everything:
            raise ValueError(
                "the graph behind the features hides parameters (reentrant checkpointing?), so that those with a plain "
                "sum cannot be told from the others; call checkpoint(..., use_reentrant=False)"
            )
        combined = None if everything else [leaf for leaf in behind if id(leaf) in managed]
        return cls(tensors, beside, combined, plain)

    def in_front(self, parameters: Parameters) -> Parameters:
        """The features as if they were the first of the parameters."""
        count = len(self.tensors)
        return parameters._replace(
            managed=[*self.tensors, *parameters.managed],
            group_of=[*[0] * count, *parameters.group_of],
            places=[*range(-count, 0), *parameters.places],
            in_gram=[*[True] * count, *parameters.in_gram],
        )

    def row(self, name: str, loss: Tensor, parameters: Parameters, retain_graph: bool) -> Row:
        """The gradients of a loss down to the features, in memory of their own; others add up in ``.grad``.

        Args:
            parameters: those that `in_front` returned.

        Raises:
            ValueError: it reaches none of them.
        """
        inputs = [*self.tensors, *self.beside]
        with self._unseen():
            found = run_backward(
                functools.partial(torch.autograd.grad, loss, inputs, retain_graph=retain_graph, allow_unused=True)
            )
        place = {id(param): p for p, param in enumerate(parameters.managed)}
        others = set(map(id, parameters.others))
        row: Row = [None] * len(parameters.managed)
        reached = False
        for tensor, grad in zip(inputs, found, strict=True):
            if grad is None:
                continue
            p = place.get(id(tensor))
            reached = reached or p is not None or id(tensor) in others
            # Autograd may hand out one tensor twice, or one that somebody holds.
            own = torch.empty_like(tensor).copy_(grad) if grad.layout is torch.strided else grad.clone()
            if p is None:
                add_grads([tensor], [own])
            else:
                row[p] = own if own.layout is torch.strided else own.to_dense()
        if not reached:
            raise reaches_nothing(name)
        return row

    @contextlib.contextmanager
    def _unseen(self) -> Iterator[None]:
        """Features that retain their gradients shall have that of the combination alone."""
        retaining = [tensor for tensor in self.tensors if tensor.retains_grad]
        before = take_grads(retaining)
        try:
            yield
        finally:
            put_grads(retaining, before)

    def sums(self, rows: Sequence[Row]) -> Row:
        """The plain sum of the gradients at the features, where a leaf behind them receives it."""
        found: Row = [None] * len(self.tensors)
        for n in range(len(self.tensors) if self.plain else 0):
            there = [grad for row in rows if (grad := row[n]) is not None]
            found[n] = functools.reduce(torch.add, there[1:], there[0].clone()) if there else None
        return found

    def run_behind(self, combined: Row, sums: Row, retain_graph: bool) -> None:
        """The pass from the features to what is behind them, with what is combined; and one with the sums.

        Args:
            combined: over the features and, which is not looked at, over what comes behind them in `in_front`.
        """
        more = self.behind is None or bool(self.behind)
        if self.plain:
            with self._unseen():
                self._pass(sums, self.plain, retain_graph or more)
        if more:
            self._pass(combined, self.behind, retain_graph)

    def _pass(self, grads: Row, inputs: list[Tensor] | None, retain_graph: bool) -> None:
        found = [(tensor, grad) for tensor, grad in zip(self.tensors, grads, strict=False) if grad is not None]
        if found:
            tensors, starts = zip(*found, strict=True)
            run_backward(
                functools.partial(torch.autograd.backward, tensors, starts, retain_graph=retain_graph, inputs=inputs)
            )


def _check_options(options: Options) -> None:
    owner = f"features= with {type(options.method).__name__}"
    if options.granularity != "model":
        raise ValueError(f'features= makes one problem, found granularity={options.granularity!r}; use "model"')
    if options.capture != "harvest":
        raise ValueError(
            f"features= holds rows at tensors that are new in every step, found capture={options.capture!r}; use "
            '"harvest"'
        )
    if options.every > 1:
        raise ValueError(
            f"features= with refresh_every={options.every}: the pass through what is behind the features is one "
            "already; use refresh_every=1"
        )
    if options.method.num_batches > 1:
        raise ValueError(f"{owner}: it goes by products of the gradients of two batches, which features do not share")
    if isinstance(options.method, KeepingMethod):
        raise ValueError(
            f"{owner}: it keeps numbers for every element of a row from step to step, and those of features are of "
            "another batch each time; leave features= out"
        )


def _check_tensors(features: object) -> list[Tensor]:
    found = [features] if isinstance(features, Tensor) else features
    if not isinstance(found, (list, tuple)) or not all(isinstance(one, Tensor) for one in found):
        raise TypeError(f"expected features as a tensor or a list of tensors, found {type(features).__name__}")
    if not found:
        raise ValueError("expected at least one tensor as features, found an empty list")
    for n, tensor in enumerate(found):
        if tensor.grad_fn is None:
            reason = "is a leaf" if tensor.requires_grad else "does not require grad"
            raise ValueError(
                f"features[{n}] of shape {list(tensor.shape)} {reason}; pass what the shared part of the model "
                "returns, not detached"
            )
        if any(tensor is other for other in found[:n]):
            raise ValueError(f"features[{n}] is there twice")
    if len({tensor.device for tensor in found}) > 1:
        raise ValueError("the features are on several devices; keep them on one")
    return list(found)


def _check_sides(beside: Sequence[Tensor], behind: Sequence[Tensor]) -> None:
    there = set(map(id, behind))
    if both := [list(leaf.shape) for leaf in beside if id(leaf) in there]:
        raise ValueError(
            f"the losses reach parameters of shapes {', '.join(map(str, both))} both through the features and beside "
            "them (tied weights, a skip connection past the features?), so that only one part of their gradients would "
            "be combined; add the tensor that goes past to features, or leave features= out"
        )
