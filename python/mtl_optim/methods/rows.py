"""What the methods have in common that need the rows of gradients themselves, and not just their Gram matrix."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

import mtl_kernels
from mtl_kernels import RowTable, ranges

from ..cuda_graphs import refuse_capture
from .base import Combination, Method, check_active, other_tasks

_TABLES_KEPT = 64
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Problem(NamedTuple):
    """What a method has to combine.

    Attributes:
        rows, groups, out, losses, places: as for `Method.combine`.
        gram: ``[..., K, K]``. norms: ``[..., K]``. active: bool ``[..., K]``.
        finite: bool ``[..., 1]``, whether all rows of active tasks are.
    """

    rows: RowTable
    groups: Sequence[int] | None
    out: Any
    losses: Tensor | None
    places: Sequence[int]
    gram: Tensor
    norms: Tensor
    active: Tensor
    finite: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class RowMethod(Method):
    """A method that is no function of the Gram matrix. A subclass defines `combine_rows`.

    The Gram matrix is taken all the same, for one more read of the rows: the report shows it, and it tells whether the
    rows are finite before anything is kept of them.
    """

    needs_gram: ClassVar[bool] = False

    def solve(self, gram: Tensor, *, losses: Tensor | None = None, active: Tensor | None = None) -> NoReturn:
        """Raise TypeError: a Gram matrix is not enough."""
        name = type(self).__name__
        raise TypeError(
            f"{name} needs the rows of gradients, and only their Gram matrix is at hand; call the method itself on "
            f"them, {name}(...)(rows), or give it to a MultiTaskOptimizer"
        )

    def __call__(
        self,
        rows: Tensor | Sequence[Sequence[Tensor | None]] | RowTable,
        *more: Tensor | Sequence[Sequence[Tensor | None]] | RowTable,
        losses: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Any:
        """Combines the rows; see `Method`.

        Raises:
            ValueError: no task is active.
        """
        if isinstance(active, Tensor) and not bool(active.any()):
            raise ValueError(f"{type(self).__name__}: expected at least one active task, found none")
        return super().__call__(rows, *more, losses=losses, active=active)

    def combine(
        self,
        batches: Sequence[RowTable],
        *,
        groups: Sequence[int] | None = None,
        losses: Tensor | None = None,
        active: Tensor | None = None,
        out: Any = None,
        places: Sequence[int] | None = None,
    ) -> Combination:
        """See `Method.combine`.

        Raises:
            TypeError, ValueError: losses missing where they are needed, too few tasks, or a state of other tasks,
                parameters or problems; the state is then as it was.
        """
        (rows,) = batches
        gram = mtl_kernels.gram(rows, groups=groups)
        ranges.check_range(rows, gram, groups)
        check_active(type(self).__name__, gram, active)
        length = mtl_kernels.norms(gram)
        there = torch.ones_like(length, dtype=torch.bool) if active is None else active.expand(length.shape)
        finite = (length.isfinite() | ~there).all(-1, keepdim=True)
        where = range(rows.num_params) if places is None else places
        return self.combine_rows(Problem(rows, groups, out, losses, where, gram, length, there, finite))

    def combine_rows(self, problem: Problem) -> Combination:
        """What `combine` returns, of rows that were looked at."""
        raise NotImplementedError(f"{type(self).__name__} does not define combine_rows()")


@dataclasses.dataclass(frozen=True, eq=False)
class KeepingMethod(RowMethod):
    """A method that keeps one number for every element of every row from step to step.

    The state of a parameter is ``state["NAME.PLACE"]``, ``[K, *shape]``: NAME is `kept`, PLACE the place of the
    parameter among all those of the optimizer, or among those of the rows. It is zero when a parameter is first
    combined, and stays as it is in steps in which the parameter or the task takes no part. Of each task or problem
    there is a float64 number or two beside.

    Args:
        state_dtype: float32, float64, bfloat16 or float16; None for that of the rows.

    Raises:
        TypeError: another dtype.
    """

    kept: ClassVar[str]

    state_dtype: torch.dtype | None = dataclasses.field(default=None, kw_only=True)
    _tables: dict[tuple[int, ...], tuple[list[Tensor | None], RowTable]] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.state_dtype is not None and self.state_dtype not in _DTYPES:
            raise TypeError(
                f"{type(self).__name__}: expected state_dtype as one of {', '.join(map(str, _DTYPES))}, or None for "
                f"that of the rows, found {self.state_dtype!r}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def config(self) -> dict[str, Any]:
        """The hyper-parameters by name, as plain values; the dtype by its name."""
        dtype = None if self.state_dtype is None else str(self.state_dtype).removeprefix("torch.")
        return {**super().config(), "state_dtype": dtype}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Replaces the state by a copy of ``state_dict``; see `Method.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._tables.clear()

    def reset(self) -> None:
        """Clears the state."""
        super().reset()
        self._tables.clear()

    def _check_kept(self, problem: Problem) -> None:
        """Raise ValueError where the state is of other tasks, parameters or problems."""
        owner, num_tasks, batch = type(self).__name__, problem.rows.num_tasks, problem.gram.shape[:-2]
        for key, like in zip(self._keys(problem), problem.rows.like, strict=True):
            found = self.state.get(key)
            if found is None or like is None or found.shape == (num_tasks, *like.shape):
                continue
            if len(found) != num_tasks:
                raise other_tasks(owner, len(found), num_tasks)
            raise ValueError(
                f"{owner} keeps {key} of shape {list(found.shape)} for a parameter that is {list(like.shape)} now; "
                "call reset() to start anew, or load_state_dict() with a state of these parameters"
            )
        for key, value in self.state.items():
            if "." in key:
                continue
            if value.shape[:-1] != batch:
                raise ValueError(
                    f"{owner} keeps {key} of shape {list(value.shape)} and was given {list(batch)} problems of "
                    f"{num_tasks} tasks; with one problem per parameter or param group the same ones have to be "
                    "reached in every step. Call reset() to start anew"
                )
            if value.shape[-1] not in (1, num_tasks):
                raise other_tasks(owner, value.shape[-1], num_tasks)

    def _keys(self, problem: Problem) -> list[str]:
        return [f"{self.kept}.{place}" for place in problem.places]

    def _kept_rows(self, problem: Problem) -> RowTable:
        """The rows that are kept beside those of the problem, as a table to update in place."""
        rows, where = problem.rows, tuple(problem.places)
        columns = zip(self._keys(problem), rows.like, strict=True)
        kept = [self._like_row(key, like, rows.num_tasks) for key, like in columns]
        found = self._tables.get(where)
        if found is None or found[1].dense is not rows.dense or not all(map(operator.is_, found[0], kept)):
            if len(self._tables) >= _TABLES_KEPT:
                self._tables.clear()
            split = [[None] * rows.num_tasks if one is None else list(one.unbind(0)) for one in kept]
            entries: Any = kept[0] if rows.dense else list(zip(*split, strict=True))
            found = self._tables[where] = kept, RowTable(entries, captured=True)
        return found[1]

    def _like_row(self, key: str, like: Tensor | None, num_tasks: int) -> Tensor | None:
        if like is None:
            return None
        kept, dtype = self.state.get(key), self.state_dtype or like.dtype
        if kept is None or kept.dtype is not dtype or kept.device != like.device:
            refuse_capture(f"the {key} that {type(self).__name__} keeps would be set up")
            self._tables.clear()
            with torch.inference_mode(False):
                # Laid out as the rows are, so that both are read in the same order without a copy.
                new = torch.empty_strided(
                    (num_tasks, *like.shape), (like.numel(), *like.stride()), dtype=dtype, device=like.device
                )
                kept = self.state[key] = new.zero_() if kept is None else new.copy_(kept)
        return kept

    def _kept_numbers(self, key: str, like: Tensor, start: float = 0.0) -> Tensor:
        """float64 shaped like ``like``, on its device."""
        new = functools.partial(torch.full, like.shape, start, dtype=torch.float64, device=like.device)
        return self._kept(key, like.device, new)

    def _steps(self, sound: Tensor) -> Tensor:
        """t = 1, 2, ...: the number of sound steps of every problem, float64 ``[..., 1]``; 1 before the first."""
        return self._kept_numbers("step", sound).add_(sound).clamp(min=1)

    def _holds(self, problem: Problem, size: Tensor) -> Tensor:
        """Whether the state can hold gradients of length ``size`` (nan and inf it cannot), for every active task."""
        dtypes = {self.state_dtype or like.dtype for like in problem.rows.like if like is not None}
        largest = min((torch.finfo(dtype).max for dtype in dtypes), default=torch.inf)
        return ((size <= largest) | ~problem.active).all(-1, keepdim=True)


def place_for(problem: Problem) -> Any:
    """Where a combination goes that is not of the rows: ``out``, or room in the dtype of the rows."""
    if problem.out is not None:
        return problem.out
    found = [None if like is None else torch.empty_like(like) for like in problem.rows.like]
    return found[0] if problem.rows.dense else found
