"""Sharded parameters (DTensor: FSDP2, tensor parallel): every rank has its shards of gradients that are reduced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from ..capture.grads import Row, same_tensors
from .agreement import Agreement
from .ranks import Reduced
from .replicated import Replicated
from .several import Several


class Sharded(Several):
    """Gram matrices of local shards, added up; combinations of local shards. Nothing is gathered.

    A parameter that a mesh dimension replicates is counted on the first rank of that dimension alone, and one that lies
    on several meshes side by side (FSDP2 around tensor parallel layers) on the first of them. Plain parameters beside
    sharded ones are replicated: their gradients are averaged over all ranks, whole.
    """

    hides = True

    def __init__(self) -> None:
        super().__init__(Agreement(None))
        self._plain = Replicated(None, "all", self._agreement)
        self._params: list[Tensor] = []
        self._counted: list[bool] = []

    def sender(self, num_rows: int, params: Sequence[Tensor]) -> None:
        return None

    def reduce(self, batches: Sequence[Sequence[Row]], params: Sequence[Tensor]) -> list[Reduced]:
        sharded, plain = _places(params)
        self._check_masks([[row[p] is not None for p in sharded] for rows in batches for row in rows])
        counted = [self.rank == 0] * len(params)
        for p, counts in zip(sharded, self._counts([params[p] for p in sharded]), strict=True):
            counted[p] = counts
        means = [Reduced([[] for _ in rows], []) for rows in batches]
        if plain:
            means = self._plain.reduce(
                [[[row[p] for p in plain] for row in rows] for rows in batches], [params[p] for p in plain]
            )
        found = []
        for rows, mean in zip(batches, means, strict=True):
            local = [[_local(grad, param) for grad, param in zip(row, params, strict=True)] for row in rows]
            for row, averaged in zip(local, mean.rows, strict=True):
                for p, grad in zip(plain, averaged, strict=True):
                    row[p] = grad
            found.append(Reduced(local, counted))
        return found

    def expand(self, grads: Row, reduced: Reduced, params: Sequence[Tensor]) -> Row:
        return [
            _like(param, grad) if grad is not None and isinstance(param, DTensor) else grad
            for grad, param in zip(grads, params, strict=True)
        ]

    def average(self, grads: Row, params: Sequence[Tensor]) -> Row:
        found, (_, plain) = list(grads), _places(params)
        means = self._plain.average([grads[p] for p in plain], [params[p] for p in plain])
        for p, mean in zip(plain, means, strict=True):
            found[p] = mean
        return found

    def _counts(self, params: Sequence[Tensor]) -> list[bool]:
        """Whether this rank is the one that counts its shard of each parameter."""
        if not same_tensors(params, self._params):
            mine = [(tuple(param.shape), _ranks_of(param)) for param in params]
            everywhere = self._agreement.exchange("parameters", mine)
            if any([shape for shape, _ in theirs] != [shape for shape, _ in mine] for theirs in everywhere):
                raise RuntimeError(
                    "the ranks hold different parameters (pipeline stages?), so that their Gram matrices are none of "
                    "one model; combine on ranks that hold the same ones"
                )
            first = [min(theirs[p][1] for theirs in everywhere) for p in range(len(params))]
            self._counted = [
                ranks == lowest and _is_first(param)
                for param, (_, ranks), lowest in zip(params, mine, first, strict=True)
            ]
            self._params = list(params)
        return self._counted

    def _check_masks(self, masks: list[list[bool]]) -> None:
        packed = [sum(here << p for p, here in enumerate(row)) for row in masks]
        if any(there != packed for there in self._agreement.exchange("combination", packed)):
            raise RuntimeError(
                "tasks reach different parameters on different ranks, although these are sharded; run every task "
                "through the same modules on all ranks"
            )


def _places(params: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Where the sharded parameters stand, and the plain ones."""
    sharded, plain = list[int](), list[int]()
    for p, param in enumerate(params):
        (sharded if isinstance(param, DTensor) else plain).append(p)
    return sharded, plain


def _ranks_of(param: Any) -> tuple[int, ...]:
    """Those that hold a parameter together, in order."""
    return tuple(sorted(param.device_mesh.mesh.flatten().tolist()))


def _is_first(param: Any) -> bool:
    """Whether this rank is the first of those of its mesh that have the same shard."""
    coordinate = param.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    at = zip(coordinate, param.placements, strict=True)
    return all(index == 0 for index, placement in at if isinstance(placement, Replicate))


def _local(grad: Any, param: Any) -> Tensor | None:
    """The shard of a gradient that belongs to that of its parameter."""
    if grad is None or not isinstance(param, DTensor):
        return None
    if grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    found: Tensor = grad.to_local()
    return found


def _like(param: Any, local: Tensor) -> Tensor:
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
