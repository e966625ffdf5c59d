"""What every combination of losses shares: the losses as one tensor, their terms, and their weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .checks import Tasks, task_names

Losses = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""A floating-point tensor ``[K]``, K scalar floating-point tensors, or a dict of such scalars by the names of tasks."""


class LossAbout(NamedTuple):
    """What a reader wants to know of a combination before choosing it, in a few words each.

    Attributes:
        value: the combined loss.
        state: what is kept between calls; "none".
        calls: what the training loop calls besides the module itself; "none".
    """

    value: str
    state: str
    calls: str


class LossCombination(nn.Module):
    """A rule that turns K losses into one scalar to call ``backward()`` on.

    State lies in buffers, float32 unless the module is cast (``.double()``); it changes in `forward` only in
    training mode. Nothing waits for the device. A subclass defines `combine`.

    Args:
        tasks: how many tasks there are, K >= 1; or their names, so that losses can come as a dict. None, where a
            subclass takes it, is any number of losses, by any names.

    Attributes:
        tasks: the names; None where none were given. num_tasks: K; None for any.

    Raises:
        TypeError, ValueError: ``tasks`` is neither an integer >= 1 nor a list of distinct names.
    """

    about: ClassVar[LossAbout]

    scales_with_losses: ClassVar[bool] = False
    """Whether scaling every loss by c scales the result by c and changes no state, as GradScaler takes for granted."""

    takes_some: ClassVar[bool] = False
    """Whether a dict may leave tasks out, which then take no part."""

    instead: ClassVar[str] = ""
    """What to take in front of a method, where this class couples the losses and cannot stand there."""

    def __init__(self, tasks: Tasks | None = None) -> None:
        super().__init__()
        self.tasks, self.num_tasks = task_names(type(self).__name__, tasks)
        self._last: Tensor | None = None
        self._calls = 0

    def __repr__(self) -> str:
        tasks = self.num_tasks if self.tasks is None else list(self.tasks)
        return f"{type(self).__name__}({'' if tasks is None else tasks})"

    def forward(self, losses: Losses) -> Tensor:
        """The combined loss, a scalar of the dtype of the losses; 16-bit losses give float32.

        Args:
            losses: floating-point tensor ``[K]``, or K scalar tensors, in a sequence or in a dict by the names of the
                tasks, in any order.

        Raises:
            TypeError: something else than floating-point tensors.
            ValueError: another number of losses, losses of another shape or of other tasks, or a dict where the module
                was built without names.
        """
        return self.combine(self._seen(self.gather(losses)))

    def terms(self, losses: Losses) -> Losses:
        """The combined loss as one term per task: here an error, for a combination that couples the losses.

        Raises:
            TypeError: always; the classes that are a `SumOfTerms` have terms.
        """
        raise TypeError(self.coupling())

    @classmethod
    def coupling(cls) -> str:
        """Why there are no terms."""
        return (
            f"{cls.__name__} couples the losses: it is no sum of one term per task, as a transform in front of a "
            f"method must be{'; ' + cls.instead if cls.instead else ''}. Without a method, call backward() on its value"
        )

    def combine(self, losses: Tensor) -> Tensor:
        """The combined loss of checked losses ``[K]``."""
        raise NotImplementedError(f"{type(self).__name__} defines no combine()")

    def weights(self, losses: Losses | None = None) -> Tensor:
        """The derivative of the combined loss by each loss, ``[K]``: the weights that the gradients get.

        With the state as it is now, which does not change.

        Args:
            losses: as for `forward`; None for those of the last call, for logging. The weight of a task that they leave
                out is nan.

        Raises:
            RuntimeError: None before the first call.
            TypeError, ValueError: as for `forward`.
        """
        if losses is None and self._last is None:
            raise RuntimeError(f"{type(self).__name__}: weights() before the first call; pass losses to it")
        training, self.training = self.training, False
        try:
            with torch.inference_mode(False), torch.enable_grad():
                absent = math.nan if self.takes_some else None
                seen = self._last if losses is None else self.gather(losses, absent=absent)
                leaf = seen.detach().clone().requires_grad_()  # type: ignore[union-attr]
                (found,) = torch.autograd.grad(self.combine(leaf), leaf)
        finally:
            self.training = training
        return found

    def gather(self, losses: Losses, what: str = "losses", absent: float | None = None) -> Tensor:
        """The losses as one checked tensor ``[K]``, float32 or wider.

        Args:
            what: what they are called in errors.
            absent: stands for the tasks that a dict leaves out; None raises there.
        """
        name = type(self).__name__
        if isinstance(losses, Tensor):
            if losses.dim() != 1:
                raise ValueError(
                    f"{name}: expected {what} of shape [K], found {list(losses.shape)}; reduce each loss first"
                )
            self._check_count(losses.shape[0], what)
            self._check_dtype(losses, what)
            return _widened(losses)
        return self._stacked(self.listed(losses, what), what, absent)

    def listed(self, losses: Losses, what: str = "losses") -> list[Tensor | None]:
        """The losses of a sequence or dict one by one, checked, in the order of the tasks; None where one has none."""
        name = type(self).__name__
        found: list[Tensor | None]
        pairs: list[tuple[int | str, Tensor]]
        if isinstance(losses, Mapping):
            pairs = [*losses.items()]
            found = self._in_order(losses, what)
        elif isinstance(losses, (list, tuple)):
            pairs = [*enumerate(losses)]
            found = list(losses)
            self._check_count(len(found), what)
        else:
            raise TypeError(
                f"{name}: expected {what} as a tensor [K], K scalar tensors or a dict of them, found "
                f"{type(losses).__name__}"
            )
        if not pairs:
            raise ValueError(f"{name}: expected at least one of {what}, found none")
        for key, loss in pairs:
            if not isinstance(loss, Tensor):
                raise TypeError(
                    f"{name}: expected {what} as tensors, found {type(loss).__name__} at {key!r}; pass the tensor "
                    "itself, without .item()"
                )
            if loss.dim() != 0:
                raise ValueError(
                    f"{name}: expected scalar {what}, found shape {list(loss.shape)} at {key!r}; reduce each loss first"
                )
            self._check_dtype(loss, what)
        return found

    def require_positive(self, losses: Tensor, why: str, *, or_zero: bool = False) -> None:
        """Refuses losses <= 0 (< 0) that lie on a CPU; elsewhere, and in compiled code, nan or inf flows."""
        if losses.device.type != "cpu" or torch.compiler.is_compiling():
            return
        bad = losses.detach() < 0 if or_zero else losses.detach() <= 0
        if bool(bad.any()):
            raise ValueError(
                f"{type(self).__name__}: expected losses {'>=' if or_zero else '>'} 0, of which {why}; found "
                f"{losses.tolist()}; shift the losses, or choose another combination"
            )

    def remind(self, limit: int | None, what: str, when: str) -> None:
        """Counts a call, and warns at the ``limit``-th since `_calls` was set to 0; compiled code is not counted."""
        if not torch.compiler.is_compiling():
            self._calls += 1
            if self._calls == limit:
                warnings.warn(
                    f"{type(self).__name__}: {limit} calls without {what}, where alone the weights change; call it "
                    f"{when}",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def _seen(self, losses: Tensor) -> Tensor:
        """Keeps the losses for `weights`."""
        self._last = losses.detach()
        return losses

    def _count(self) -> int:
        """K.

        Raises:
            TypeError: it was not given.
        """
        if self.num_tasks is None:
            raise TypeError(f"{type(self).__name__}: expected the number of tasks or a list of their names, found None")
        return self.num_tasks

    def _in_order(self, losses: Mapping[str, Tensor], what: str) -> list[Tensor | None]:
        name = type(self).__name__
        if self.tasks is None and self.num_tasks is not None:
            raise ValueError(
                f"{name} was built without the names of its tasks, and found {what} as a dict: build it with names, "
                f"{list(losses)} in place of {self.num_tasks} (or {{name: number}} in place of a list of numbers)"
            )
        known = self.tasks or tuple(losses)
        if unknown := [task for task in losses if task not in known]:
            raise ValueError(f"{name}: found {what} of task {unknown[0]!r}; expected those of {list(known)}")
        return [losses.get(task) for task in known]

    def _stacked(self, listed: Sequence[Tensor | None], what: str, absent: float | None) -> Tensor:
        """One tensor of what `listed` returns."""
        there = [loss for loss in listed if loss is not None]
        if len(there) == len(listed):
            return _widened(torch.stack(there))
        if absent is None:
            left_out = [task for task, loss in zip(self.tasks or (), listed, strict=True) if loss is None]
            raise ValueError(
                f"{type(self).__name__}: found no {what} of task {left_out[0]!r}; it goes by those of all tasks, always"
            )
        gap = torch.full((), absent, dtype=there[0].dtype, device=there[0].device)
        return _widened(torch.stack([gap if loss is None else loss for loss in listed]))

    def _check_count(self, count: int, what: str) -> None:
        if count != self.num_tasks and (self.num_tasks is not None or count == 0):
            raise ValueError(
                f"{type(self).__name__}: expected {self.num_tasks or 'some'} {what}, found {count}; pass one per task, "
                "always in the same order, or a dict by the names that the module was built with"
            )

    def _check_dtype(self, losses: Tensor, what: str) -> None:
        if not losses.is_floating_point():
            raise TypeError(
                f"{type(self).__name__}: expected floating-point {what}, found {losses.dtype}; convert them with "
                ".float()"
            )


class SumOfTerms(LossCombination):
    """A sum of one term per task, each a function of its own loss and of numbers for its task.

    Such a combination can stand in front of a method, which then combines the gradients of the terms:
    ``MultiTaskOptimizer(optimizer, method, transform=...)``. A subclass defines `term` and `factors`.
    """

    takes_some: ClassVar[bool] = True

    def forward(self, losses: Losses) -> Tensor:
        """The sum of the terms; a dict may leave tasks out. See `LossCombination.forward`."""
        if isinstance(losses, Mapping) and self.tasks is not None and 0 < len(losses) < self._count():
            return torch.stack([*self._terms(losses)]).sum()
        return super().forward(losses)

    def terms(self, losses: Losses) -> Losses:
        """The terms, whose sum is what `forward` returns; the graph of each leads to its own loss alone.

        Calling it counts as a call of the module: use either for the losses of a step.

        Args:
            losses: as for `forward`.

        Returns:
            A tensor ``[K]``, a list, or a dict, as the losses came: the graph of a tensor leads to all losses.

        Raises:
            TypeError, ValueError: as for `forward`.
        """
        if isinstance(losses, Tensor):
            seen = self._seen(self.gather(losses))
            return self.term(seen, _together(self.factors(seen.detach())))
        found = self._terms(losses)
        return dict(zip(self._names_in(losses), found, strict=True)) if isinstance(losses, Mapping) else found

    def combine(self, losses: Tensor) -> Tensor:
        """The sum of the terms."""
        return self.term(losses, _together(self.factors(losses.detach()))).sum()

    def factors(self, losses: Tensor) -> Tensor | Sequence[Tensor]:
        """What each term depends on beside its loss, ``[K, ...]`` or K tensors.

        Args:
            losses: ``[K]``, detached; nan for a task that is absent. In training mode state may change.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no factors()")

    def term(self, losses: Tensor, factors: Tensor) -> Tensor:
        """The terms of losses ``[K]`` with factors ``[K, ...]``, or that of a single one of each."""
        raise NotImplementedError(f"{type(self).__name__} defines no term()")

    def _terms(self, losses: Losses) -> list[Tensor]:
        """The terms of a sequence or dict, in the order of the tasks; none for a task that is absent."""
        listed = self.listed(losses)
        seen = self._seen(self._stacked(listed, "losses", math.nan if self.takes_some else None)).detach()
        pairs = zip(listed, self.factors(seen), strict=True)
        return [self.term(_widened(loss), factor) for loss, factor in pairs if loss is not None]

    def _names_in(self, losses: Mapping[str, Tensor]) -> list[str]:
        return list(losses) if self.tasks is None else [task for task in self.tasks if task in losses]


class WeightedLosses(SumOfTerms):
    """A weighted sum of the losses, whose weights no gradient reaches. A subclass defines `weigh`."""

    def factors(self, losses: Tensor) -> Tensor:
        """The weights ``[K]``; in training mode the losses are recorded first."""
        if self.training:
            self.record(losses)
        return self.weigh(losses)

    def term(self, losses: Tensor, factors: Tensor) -> Tensor:
        """w_k L_k."""
        return factors.to(losses.dtype) * losses

    def weigh(self, losses: Tensor) -> Tensor:
        """The weights ``[K]`` for detached losses."""
        raise NotImplementedError(f"{type(self).__name__} defines no weigh()")

    def record(self, losses: Tensor) -> None:
        """Updates the state with detached losses, nan where a task is absent; none unless a subclass says so."""


def first_seen(initial: Tensor, losses: Tensor) -> Tensor:
    """Per task the initial loss; the given one where none was seen, nan where that is not positive and finite.

    What it is in the dtype of ``initial``, where it is kept, counts.
    """
    losses = losses.to(initial.dtype)
    usable = torch.where((losses > 0) & losses.isfinite(), losses, torch.full_like(losses, math.nan))
    return torch.where(initial.isnan(), usable, initial)


def or_one(values: Tensor) -> Tensor:
    """The values, 1 where they are nan."""
    return torch.where(values.isnan(), torch.ones_like(values), values)


def _widened(losses: Tensor) -> Tensor:
    return losses.float() if losses.dtype.itemsize < 4 else losses


def _together(factors: Tensor | Sequence[Tensor]) -> Tensor:
    return factors if isinstance(factors, Tensor) else torch.stack(list(factors))
