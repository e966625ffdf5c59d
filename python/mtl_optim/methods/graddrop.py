"""GradDrop: every element keeps the gradients of one sign (Chen et al. 2020, arXiv 2010.06808)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

import mtl_kernels
from mtl_kernels import RowTable

from ..cuda_graphs import refuse_capture
from .base import About, Combination, check_number, check_seed
from .rows import Problem, RowMethod


@dataclasses.dataclass(frozen=True, eq=False)
class GradDrop(RowMethod):
    """Gradient sign dropout, Algorithm 1 of Chen et al. 2020 (arXiv 2010.06808) with the identity for f.

    Element by element, P = (1 + sum_k g_k / sum_k |g_k|) / 2 (1/2 where all g_k are zero) and U ~ U(0, 1): positive g_k
    are kept where P > U, negative ones where P < U, and d = sum_k (leak_k + (1 - leak_k) kept_k) g_k.

    The paper drops in the gradient of the last shared activation, with signs taken after a product with that
    activation, and so do its authors' and LibMTL's codes; here, as in TorchJD, it is that of the shared parameters.

    Args:
        leak: the share of a dropped element that remains, in [0, 1]: one for all tasks, one by the name of each, or a
            sequence of K for the tasks in the order in which they are first seen.
        seed: of the draws. U is a function of (seed, step, element) alone, on every device.

    ``state["rng"]`` is (seed, step), int64 on the device of the rows; the step advances with every combination. There
    are no weights. An element of d is NaN where one of the K values is not finite.

    Raises:
        TypeError, ValueError: a leak that is not in [0, 1], or a seed that is not an integer in 0..2**63-1.
    """

    name: ClassVar[str] = "graddrop"
    about: ClassVar[About] = About("rows", "random state", "no element mixes signs (leak 0)", "2 reads of the rows")
    weighs_rows: ClassVar[bool] = False

    leak: float | Sequence[float] | Mapping[str, float] = 0.0
    seed: int = 0
    _on_device: dict[torch.device, Tensor] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _bound: dict[tuple[str, ...], GradDrop] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        leak = self.leak
        if isinstance(leak, Tensor):
            leak = leak.detach().tolist()
        if isinstance(leak, Mapping):
            leak = dict(leak)
            if not all(isinstance(name, str) for name in leak):
                raise TypeError(f"GradDrop: expected the names of tasks as strings, found {list(leak)}")
        elif isinstance(leak, Sequence) and not isinstance(leak, (str, bytes)):
            leak = tuple(leak)
        values = leak.values() if isinstance(leak, dict) else leak if isinstance(leak, tuple) else (leak,)
        for value in values:
            check_number("GradDrop", "leak", value, "in [0, 1]", lambda share: 0 <= share <= 1)
        check_seed("GradDrop", self.seed)
        object.__setattr__(self, "leak", leak)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_on_device": {}, "_bound": {}}

    def bound_to(self, tasks: tuple[str, ...]) -> GradDrop:
        """With the leaks of these tasks, in their order, and this one's state; see `Method.bound_to`."""
        leak = self.leak
        if not isinstance(leak, dict):
            return self
        if tasks not in self._bound:
            if missing := [task for task in tasks if task not in leak]:
                raise ValueError(
                    f"GradDrop has leaks for {list(leak)} and none for task {missing[0]!r}; add it, or name the losses "
                    "so: opt.backward({name: loss, ...})"
                )
            bound = self._bound[tasks] = GradDrop([leak[task] for task in tasks], self.seed)
            object.__setattr__(bound, "state", self.state)
        return self._bound[tasks]

    def check_tasks(self, num_tasks: int) -> None:
        """Raise ValueError unless the leaks are those of K tasks, in their order, or one for all."""
        if isinstance(self.leak, dict):
            raise ValueError(
                f"GradDrop was given leaks by the names {list(self.leak)}, which rows do not tell; call "
                ".bound_to(tasks) with the names of the rows first"
            )
        if isinstance(self.leak, tuple) and len(self.leak) != num_tasks:
            raise ValueError(f"GradDrop has {len(self.leak)} leaks for {num_tasks} tasks; pass one per task")

    def combine_rows(self, problem: Problem) -> Combination:
        """No element of one sign and the other.

        Raises:
            ValueError: the number of leaks is not K, or they go by names.
        """
        rows = problem.rows
        leak = self._leak(rows)
        rng = self._rng(self.seed, rows.device)
        combined = mtl_kernels.graddrop(rows, rng, leak=leak, out=problem.out)
        rng[1:].add_(1)
        return Combination(combined, problem.gram, None, None)

    def _leak(self, rows: RowTable) -> Tensor | None:
        self.check_tasks(rows.num_tasks)
        leak, cache = self.leak, self._on_device
        if isinstance(leak, (int, float)):
            return torch.full((rows.num_tasks,), leak, dtype=torch.float64, device=rows.device) if leak else None
        if rows.device not in cache:
            refuse_capture("the leaks of GradDrop would be copied to the device")
            cache[rows.device] = torch.tensor(leak, dtype=torch.float64, device=rows.device)
        return cache[rows.device]
