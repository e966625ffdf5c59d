"""Sharded parameters (DTensor: FSDP2, tensor parallel): every rank has its shards of gradients that are reduced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from ..capture.grads import Row, same_tensors
from .agreement import Agreement
from .ranks import Reduced


class Sharded:
    """Gram matrices of local shards, added up; combinations of local shards. Nothing is gathered.

    A parameter that a mesh dimension replicates is counted on the first rank of that dimension alone, and one that lies
    on several meshes side by side (FSDP2 around tensor parallel layers) on the first of them.
    """

    several = hides = True

    def __init__(self) -> None:
        self._agreement = Agreement(None)
        self.rank = self._agreement.rank
        self._params: list[Tensor] = []
        self._counted: list[bool] = []

    def check(self, point: str) -> None:
        self._agreement.exchange(point)

    def fail(self, error: BaseException) -> None:
        self._agreement.fail(error)

    def agree(self, what: str, value: Any) -> list[Any]:
        return self._agreement.exchange(what, value)

    def gather(self, tensor: Tensor, dim: int, sizes: Sequence[int]) -> list[Tensor]:
        return self._agreement.gather(tensor, dim, sizes)

    def sender(self, num_rows: int, params: Sequence[Tensor]) -> None:
        return None

    def reduce(self, batches: Sequence[Sequence[Row]], params: Sequence[Tensor]) -> list[Reduced]:
        self._check_masks([[grad is not None for grad in row] for rows in batches for row in rows])
        counted = self._counts(params)
        found = []
        for rows in batches:
            local = [[_local(grad, param) for grad, param in zip(row, params, strict=True)] for row in rows]
            found.append(Reduced(local, counted))
        return found

    def total(self, gram: Tensor) -> Tensor:
        return self._agreement.sum(gram)

    def expand(self, grads: Row, reduced: Reduced, params: Sequence[Tensor]) -> Row:
        return [None if grad is None else _like(param, grad) for grad, param in zip(grads, params, strict=True)]

    def average(self, grads: Row, params: Sequence[Tensor]) -> Row:
        return grads

    def mean(self, values: Tensor) -> Tensor:
        return self._agreement.sum(values) / self._agreement.size

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
    if grad is None:
        return None
    if grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    found: Tensor = grad.to_local()
    return found


def _like(param: Any, local: Tensor) -> Tensor:
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
