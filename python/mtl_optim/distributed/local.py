"""One process with whole parameters; in a run of several ranks a refusal that says what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..capture.grads import Row
from .ranks import Reduced


class Local:
    """Gradients that are those of the step as they are.

    Args:
        apart: whether the ranks of the run, if there are several, are said to train apart.
    """

    several = hides = False
    rank = 0

    def __init__(self, apart: bool = False) -> None:
        self._apart = apart

    def check(self, point: str) -> None:
        """Raise RuntimeError in a distributed run: nothing says how gradients are reduced."""
        if self._apart or not (dist.is_available() and dist.is_initialized()):
            return
        if (ranks := dist.get_world_size()) > 1:
            raise RuntimeError(
                f"this process is one of {ranks} ranks, and nothing says how gradients are reduced over them: the Gram "
                "matrix of one rank's gradients is not that of the mean gradient, so every rank would combine "
                "differently. Pass data_parallel= to MultiTaskOptimizer: the DistributedDataParallel model, or the "
                "process group of replicated modules; or data_parallel=False where ranks train apart. Parameters that "
                "are sharded with fully_shard (FSDP2) need nothing"
            )

    def fail(self, error: BaseException) -> None:
        """Nobody to tell."""

    def agree(self, what: str, value: Any) -> list[Any]:
        return [value]

    def gather(self, tensor: Tensor, dim: int, sizes: Sequence[int]) -> list[Tensor]:
        return [tensor]

    def sender(self, num_rows: int, params: Sequence[Tensor]) -> None:
        return None

    def reduce(self, batches: Sequence[Sequence[Row]], params: Sequence[Tensor]) -> list[Reduced]:
        return [Reduced([*rows], []) for rows in batches]

    def total(self, gram: Tensor) -> Tensor:
        return gram

    def expand(self, grads: Row, reduced: Reduced, params: Sequence[Tensor]) -> Row:
        return grads

    def average(self, grads: Row, params: Sequence[Tensor]) -> Row:
        return grads

    def mean(self, values: Tensor) -> Tensor:
        return values
