"""What every combination method is: frozen options, explicit state, and weights from a Gram matrix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

import mtl_kernels
from mtl_kernels import RowTable, Solution, SolverCall, ops, ranges

from ..cuda_graphs import refuse_capture


class Weighted(NamedTuple):
    """What `Method.weigh` finds: gram ``[..., K, K]``, weights ``[..., K]``, certificate ``[..., 2]`` or None."""

    gram: Tensor
    weights: Tensor
    certificate: Tensor | None


class Combination(NamedTuple):
    """What `Method.combine` finds.

    Attributes:
        combined: the combination d, shaped like a row: a tensor for dense rows, else P tensors or None.
        gram: ``[..., K, K]`` of the rows.
        weights: ``[..., K]``, see `Report`; None for methods that have none.
        certificate: ``[..., 2]`` or None.
    """

    combined: Any
    gram: Tensor
    weights: Tensor | None
    certificate: Tensor | None


class About(NamedTuple):
    """What a reader wants to know of a method before choosing it, in a few words each.

    Attributes:
        needs: what the weights depend on: "nothing", "Gram", "losses", "Gram and losses", "rows"...
        state: what is kept between steps; "none".
        guarantee: what holds for the combination d = J^T w.
        cost: operations of a solve, for K tasks.
    """

    needs: str
    state: str
    guarantee: str
    cost: str


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """A rule that turns the Gram matrix of the task gradients into one weight per task.

    A subclass is a frozen dataclass that defines `solver_call`, or `solve` where no solver of `mtl_kernels` does all
    of it; ``state`` holds whatever changes between steps, as tensors. Two optimizers that must not share state need
    two instances.
    """

    name: ClassVar[str]
    """What `mtl_optim.methods.get` finds the class by."""

    about: ClassVar[About]

    state: dict[str, Tensor] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @property
    def refresh_every(self) -> int:
        """What a `MultiTaskOptimizer` that is not told goes by: the weights are computed at every n-th call."""
        return 1

    @property
    def needs_losses(self) -> bool:
        """Whether `solve` must be given the values of the losses."""
        return False

    @property
    def needs_gram(self) -> bool:
        """Whether the weights depend on the Gram matrix."""
        return True

    @property
    def scales_with_gradient(self) -> bool:
        """Whether scaling every row by c scales the combination by c, as GradScaler takes for granted."""
        return True

    @property
    def weighs_alone(self) -> bool:
        """Whether a task that comes alone may have another weight than 1."""
        return False

    @property
    def num_batches(self) -> int:
        """How many independent batches of every task a step takes; the combination is of the last one's rows."""
        return 1

    @property
    def needs_heads(self) -> bool:
        """Whether `with_heads` must be told of the gradients of the heads before a step."""
        return False

    @property
    def stops_at_zero_rows(self) -> bool:
        """Whether a task whose gradient is zero makes the combination zero."""
        return False

    @property
    def weighs_rows(self) -> bool:
        """Whether the combination is the sum of the rows with the weights that are reported."""
        return True

    def bound_to(self, tasks: tuple[str, ...]) -> Method:
        """The method for rows of these tasks, in this order; itself where it does not go by names.

        Raises:
            ValueError: it lacks something for one of them.
        """
        return self

    def with_heads(self, norms: Tensor) -> Method:
        """The method for a step in which the gradients of the tasks' heads have these norms, float64 ``[K]``."""
        return self

    def check_tasks(self, num_tasks: int) -> None:
        """Raise ValueError where the method is not for K = ``num_tasks`` tasks."""

    def solver_call(self, device: torch.device) -> SolverCall | None:
        """The solver of `mtl_kernels` that gives the weights, on ``device``; None if `solve` does it otherwise."""
        return None

    def solve(self, gram: Tensor, *, losses: Tensor | None = None, active: Tensor | None = None) -> Solution:
        """The weights with their certificate.

        Args:
            gram: ``[..., K, K]``, floating point.
            losses: ``[K]`` or ``[..., K]`` loss values, for methods that need them.
            active: bool ``[K]`` or ``[..., K]``; the other tasks get weight 0 and take no part.

        Returns:
            Tensors on the device of ``gram``; nothing is copied to the host.
        """
        check_gram(type(self).__name__, gram)
        self.check_tasks(gram.shape[-1])
        if (call := self.solver_call(gram.device)) is None:
            raise NotImplementedError(f"{type(self).__name__} defines neither solver_call() nor solve()")
        weights, certificate = ops.solve(gram, call._replace(active=active))
        return Solution.of(weights, certificate if call.certified else None)

    def weigh(
        self,
        rows: RowTable,
        *,
        groups: Sequence[int] | None = None,
        losses: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Weighted:
        """Gram matrix and weights of some rows; one launch on a GPU where the method is a `solver_call`.

        Args:
            rows, groups: as for `mtl_kernels.gram`.
            losses, active: as for `solve`.
        """
        self.check_tasks(rows.num_tasks)
        if (call := self.solver_call(rows.device)) is None:
            gram = mtl_kernels.gram(rows, groups=groups)
            if self.needs_gram:
                ranges.check_range(rows, gram, groups)
            weights, gap, iterations = self._solution(gram, self.solve(gram, losses=losses, active=active))
            if gap is None or iterations is None:
                return Weighted(gram, weights, None)
            return Weighted(gram, weights, torch.stack((gap, iterations.to(gap.dtype)), -1))
        gram, weights, certificate = mtl_kernels.gram_solve(rows, call._replace(active=active), groups=groups)
        return Weighted(gram, weights, certificate if call.certified else None)

    def weigh_batches(
        self,
        batches: Sequence[RowTable],
        *,
        groups: Sequence[int] | None = None,
        losses: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Weighted:
        """`weigh` with the rows of every batch of a step, in order; Gram matrix and weights are for those of the last.

        What a method with ``num_batches`` > 1 defines in place of `weigh`.
        """
        if len(batches) > 1:
            raise NotImplementedError(f"{type(self).__name__} has several batches and no weigh_batches() of its own")
        return self.weigh(batches[0], groups=groups, losses=losses, active=active)

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
        """The combination of some rows, and what there is to report of it: all that a training step asks for.

        Args:
            batches: the rows of every batch of the step, in order, `num_batches`; those of the last are combined.
            groups, out: as for `mtl_kernels.combine`.
            losses, active: as for `solve`. Where tasks are not active, their rows hold None.
            places: the number of each parameter, under which a method keeps what it keeps of it; None counts them.
        """
        found = self.weigh_batches(batches, groups=groups, losses=losses, active=active)
        return Combination(mtl_kernels.combine(batches[-1], found.weights, out, groups=groups), *found)

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, active: Tensor | None = None) -> Tensor:
        """One weight per original row, float64 ``[..., K]``; the arguments are those of `solve`."""
        return self._solution(gram, self.solve(gram, losses=losses, active=active)).weights

    def _solution(self, gram: Tensor, found: object) -> Solution:
        """What a subclass's `solve` returned, which may be the weights alone.

        Raises:
            TypeError, ValueError: it is neither, or not one weight per row.
        """
        solution = Solution(found) if isinstance(found, Tensor) else found
        if not isinstance(solution, Solution):
            raise TypeError(
                f"{type(self).__name__}.solve() returned {type(found).__name__}; expected a Solution, or a tensor of "
                "weights [..., K]"
            )
        if solution.weights.shape != gram.shape[:-1]:
            raise ValueError(
                f"{type(self).__name__}.solve() returned weights of shape {list(solution.weights.shape)}; expected "
                f"{list(gram.shape[:-1])}, one per row"
            )
        return solution

    def __call__(
        self,
        rows: Tensor | Sequence[Sequence[Tensor | None]] | RowTable,
        *more: Tensor | Sequence[Sequence[Tensor | None]] | RowTable,
        losses: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Any:
        """Combines the rows: d = J^T w with w = f(J J^T).

        Args:
            rows: a tensor ``[K, N]``, or K sequences of P tensors or ``None``; float32, float64, bfloat16,
                float16.
            more: the rows of further batches, for methods with ``num_batches`` > 1; the last ones are combined.
            losses, active: as for `solve`. Rows of tasks that are not active are not looked at, whatever they hold; for
                that the host waits for ``active`` on a GPU, and not at all where such rows are None.

        Returns:
            A tensor ``[N]``, or a list of P tensors (``None`` where no task reaches), in the dtype of the
            rows.

        Raises:
            TypeError: rows of more or fewer batches than the method takes.
        """
        tables = [one if isinstance(one, RowTable) else RowTable(one) for one in (rows, *more)]
        if len(tables) != self.num_batches:
            raise TypeError(
                f"{type(self).__name__} takes the rows of {self.num_batches} independent batch(es), found {len(tables)}"
            )
        dense = tables[-1].dense
        if active is not None:
            tables = [active_rows(self, table, active) for table in tables]
        combined = self.combine(tables, losses=losses, active=active).combined
        return combined[0] if dense and not isinstance(combined, Tensor) else combined

    def config(self) -> dict[str, Any]:
        """The hyper-parameters by name, as plain values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the state."""
        return {key: value.clone() for key, value in self.state.items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Replaces the state by a copy of ``state_dict``.

        Raises:
            TypeError: it is not a dict of tensors; the state stays as it was.
        """
        if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
            raise TypeError("expected a dict of tensors, as state_dict() of the same method returns it")
        loaded = {key: value.clone() for key, value in state_dict.items()}
        self.state.clear()
        self.state.update(loaded)

    def reset(self) -> None:
        """Clears the state: the next solve is like the first."""
        self.state.clear()

    def _rng(self, seed: int, device: torch.device) -> Tensor:
        """``state["rng"]``, (seed, step) on ``device``, from step 0 where there is none yet."""
        return self._kept("rng", device, lambda: mtl_kernels.rng_state(seed, device=device))

    def _kept(
        self,
        key: str,
        device: torch.device,
        new: Callable[[], Tensor],
        shape: Sequence[int] | None = None,
        per_task: int = 1,
    ) -> Tensor:
        """``state[key]`` on ``device``: moved there where it is elsewhere, ``new()`` where there is none yet.

        Args:
            per_task: numbers of a task in the last dimension of ``shape``.

        Raises:
            ValueError: it is not of the ``shape`` that the problem asks for.
        """
        kept = self.state.get(key)
        if kept is not None and shape is not None and kept.shape != torch.Size(shape):
            if kept.shape[-1] != shape[-1]:
                raise other_tasks(type(self).__name__, kept.shape[-1] // per_task, shape[-1] // per_task)
            raise ValueError(
                f"{type(self).__name__} keeps {key} of shape {list(kept.shape)} and was given a problem of "
                f"{list(shape)}; with one problem per parameter or param group the same ones have to be reached in "
                "every step. Call reset() before they change, or load_state_dict() with a state of that shape"
            )
        if kept is None or kept.device != device:
            refuse_capture(f"the {key} that {type(self).__name__} keeps would be set up")
            # A tensor made in inference mode could not be written to outside it.
            with torch.inference_mode(False):
                kept = self.state[key] = new() if kept is None else kept.to(device)
        return kept


def active_rows(method: Method, table: RowTable, active: Tensor) -> RowTable:
    """The rows of active tasks, with None for the others; as they are where no task is active."""
    like = torch.empty((table.num_tasks, table.num_tasks), device=table.device)
    check_active(type(method).__name__, like, active)
    refuse_capture(f"{type(method).__name__} would read which tasks are active", "pass rows of None for the others")
    there: list[bool] = active.tolist()
    if all(there) or not any(there):
        return table
    absent = [None] * table.num_params
    return RowTable([row if here else absent for row, here in zip(table.entries, there, strict=True)])


def other_tasks(owner: str, kept: int, found: int) -> ValueError:
    """The error of a method whose state is of another number of tasks."""
    return ValueError(
        f"{owner} keeps the state of {kept} tasks and was given {found}; name all tasks beforehand, "
        "MultiTaskOptimizer(..., tasks=[...]), where some are absent at first, or call reset() to start anew"
    )


def check_seed(owner: str, seed: object) -> None:
    """Raise unless ``seed`` is an integer in 0..2**63-1."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{owner}: expected an integer seed, found {seed!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"{owner}: expected a seed in 0..2**63-1, found {seed}")


def check_choice(owner: str, option: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{owner}: {option}={value!r} is unknown; choose one of {listed}")


def check_number(owner: str, option: str, value: object, expected: str, fits: Callable[[float], bool]) -> None:
    """Raise unless ``value`` is a finite number that ``fits``, which ``expected`` says in words."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: expected {option} as a number, found {value!r}")
    if not math.isfinite(value) or not fits(value):
        raise ValueError(f"{owner}: expected {option} {expected}, found {value}")


def check_rtol(owner: str, rtol: object) -> None:
    """Raise unless ``rtol`` is None or a number in (0, 1)."""
    if rtol is None:
        return
    if isinstance(rtol, bool) or not isinstance(rtol, (int, float)):
        raise TypeError(f"{owner}: expected rtol as a number, found {rtol!r}")
    if not 0 < rtol < 1:
        raise ValueError(f"{owner}: expected rtol in (0, 1), found {rtol}")


def check_gram(owner: str, gram: Tensor) -> None:
    """Raise unless ``gram`` is a floating point tensor ``[..., K, K]``."""
    if not isinstance(gram, Tensor):
        raise TypeError(f"{owner}: expected a Gram matrix as a tensor [..., K, K], found {type(gram).__name__}")
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(
            f"{owner}: expected a Gram matrix of shape [..., K, K], found {list(gram.shape)}; for rows of "
            "gradients call the method itself, method(rows)"
        )
    if not gram.is_floating_point():
        raise TypeError(f"{owner}: expected a Gram matrix of floating dtype, found {gram.dtype}")


def check_active(owner: str, gram: Tensor, active: Tensor | None) -> None:
    """Raise unless ``active`` is None or a bool tensor ``[K]`` or ``[..., K]`` that fits ``gram``, on its device."""
    if active is None:
        return
    if not isinstance(active, Tensor) or active.dtype != torch.bool:
        found = active.dtype if isinstance(active, Tensor) else type(active).__name__
        raise TypeError(f"{owner}: expected active as a bool tensor, found {found}")
    if active.shape not in (gram.shape[:-1], gram.shape[-1:]):
        raise ValueError(f"{owner}: expected active of shape {list(gram.shape[:-1])}, found {list(active.shape)}")
    if active.device != gram.device:
        raise ValueError(
            f"{owner}: expected active on {gram.device}, where the Gram matrix is, found it on {active.device}; "
            f"move it there with active.to({str(gram.device)!r})"
        )


def loss_values(owner: str, gram: Tensor, losses: Tensor | None) -> Tensor:
    """The losses as float64 ``[K]`` or ``[..., K]`` on the device of ``gram``.

    Raises:
        TypeError, ValueError: there are none, or not one per row.
    """
    if losses is None:
        raise ValueError(f"{owner} needs the values of the losses: pass losses=, a tensor [K]")
    if not isinstance(losses, Tensor):
        raise TypeError(f"{owner}: expected losses as a tensor [K], found {type(losses).__name__}")
    if losses.shape not in (gram.shape[:-1], gram.shape[-1:]):
        raise ValueError(f"{owner}: expected losses of shape [{gram.shape[-1]}], found {list(losses.shape)}")
    return losses.detach().to(gram.device, torch.float64)


def spread(owner: str, gram: Tensor, values: Tensor, active: Tensor | None) -> Tensor:
    """``values`` for every problem of the batch, 0 for tasks that are not active: float64 ``[..., K]``."""
    check_gram(owner, gram)
    check_active(owner, gram, active)
    weights = values.expand(gram.shape[:-1])
    return (weights if active is None else torch.where(active, weights, 0.0)).clone(
        memory_format=torch.contiguous_format
    )
