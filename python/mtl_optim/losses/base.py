"""What every combination of losses shares: the losses as one tensor, and the checks of arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Losses = Tensor | Sequence[Tensor]
"""A floating-point tensor ``[K]``, or K floating-point tensors of one element and no dimensions."""


class LossCombination(nn.Module):
    """A rule that turns K losses into one scalar to call ``backward()`` on.

    State lies in buffers, float32 unless the module is cast (``.double()``); it changes in `forward` only in
    training mode. Nothing waits for the device. A subclass defines `combine`.

    Args:
        num_tasks: K, an integer >= 1; None takes any number of losses.

    Raises:
        TypeError, ValueError: ``num_tasks`` is no integer >= 1.
    """

    def __init__(self, num_tasks: int | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        if num_tasks is not None:
            if isinstance(num_tasks, bool) or not isinstance(num_tasks, int):
                raise TypeError(f"{name}: expected num_tasks as an integer, found {num_tasks!r}")
            if num_tasks < 1:
                raise ValueError(f"{name}: expected num_tasks >= 1, found {num_tasks}")
        self.num_tasks = num_tasks

    def forward(self, losses: Losses) -> Tensor:
        """The combined loss, a scalar of the dtype of the losses; 16-bit losses give float32.

        Args:
            losses: floating-point tensor ``[K]``, or a sequence of K scalar tensors.

        Raises:
            TypeError: something else than floating-point tensors.
            ValueError: another number of losses, or losses of another shape.
        """
        return self.combine(self.gather(losses))

    def combine(self, losses: Tensor) -> Tensor:
        """The combined loss of checked losses ``[K]``."""
        raise NotImplementedError(f"{type(self).__name__} defines no combine()")

    def gather(self, losses: Losses, what: str = "losses") -> Tensor:
        """The losses as one checked tensor ``[K]``, float32 or wider."""
        name = type(self).__name__
        if isinstance(losses, Tensor):
            if losses.dim() != 1:
                raise ValueError(
                    f"{name}: expected {what} of shape [K], found {list(losses.shape)}; reduce each loss first"
                )
        elif isinstance(losses, (list, tuple)):
            for index, loss in enumerate(losses):
                if not isinstance(loss, Tensor):
                    raise TypeError(
                        f"{name}: expected {what} as tensors, found {type(loss).__name__} at {index}; pass the tensor "
                        "itself, without .item()"
                    )
                if loss.dim() != 0:
                    raise ValueError(
                        f"{name}: expected scalar {what}, found shape {list(loss.shape)} at {index}; reduce "
                        "each loss first"
                    )
            if not losses:
                raise ValueError(f"{name}: expected at least one of {what}, found none")
            losses = torch.stack(list(losses))
        else:
            raise TypeError(
                f"{name}: expected {what} as a tensor [K] or K scalar tensors, found {type(losses).__name__}"
            )
        count = losses.shape[0]
        if count != self.num_tasks and (self.num_tasks is not None or count == 0):
            raise ValueError(
                f"{name}: expected {self.num_tasks or 'some'} {what}, found {count}; pass one per task, always in "
                "the same order"
            )
        if not losses.is_floating_point():
            raise TypeError(f"{name}: expected floating-point {what}, found {losses.dtype}; convert them with .float()")
        return losses.float() if losses.dtype.itemsize < 4 else losses

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


class WeightedLosses(LossCombination):
    """A weighted sum of the losses, whose weights no gradient reaches. A subclass defines `weigh`."""

    def weights(self, losses: Losses) -> Tensor:
        """The weights ``[K]`` that these losses would get, without gradient; no state changes.

        Raises:
            TypeError, ValueError: as for `forward`.
        """
        return self.weigh(self.gather(losses).detach())

    def combine(self, losses: Tensor) -> Tensor:
        """sum_k w_k L_k."""
        seen = losses.detach()
        if self.training:
            self.record(seen)
        return (self.weigh(seen).to(losses.dtype) * losses).sum()

    def weigh(self, losses: Tensor) -> Tensor:
        """The weights ``[K]`` for detached losses."""
        raise NotImplementedError(f"{type(self).__name__} defines no weigh()")

    def record(self, losses: Tensor) -> None:
        """Updates the state with detached losses; there is none unless a subclass says so."""


def number(owner: str, name: str, value: float, allowed: Callable[[float], bool], range_: str) -> float:
    """A finite hyper-parameter within its range.

    Raises:
        TypeError, ValueError: it is no number, not finite, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: expected {name} as a number, found {value!r}")
    if not math.isfinite(value) or not allowed(value):
        raise ValueError(f"{owner}: expected a finite {name} {range_}, found {value}")
    return float(value)


def positive(owner: str, name: str, value: float) -> float:
    """A finite number > 0; see `number`."""
    return number(owner, name, value, lambda v: v > 0, "> 0")


def non_negative(owner: str, name: str, value: float) -> float:
    """A finite number >= 0; see `number`."""
    return number(owner, name, value, lambda v: v >= 0, ">= 0")


def vector(owner: str, name: str, values: Tensor | Sequence[float], num_tasks: int | None = None) -> Tensor:
    """K finite numbers as a float32 tensor (float64 stays so); may wait for the device.

    Raises:
        TypeError, ValueError: no numbers, another number of them, or some that are not finite.
    """
    if not isinstance(values, Tensor):
        try:
            values = torch.tensor([float(value) for value in values], dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{owner}: expected {name} as a sequence of numbers, found {values!r}") from error
    if values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"{owner}: expected {name} of numbers, found {values.dtype}")
    if values.dim() != 1 or values.shape[0] == 0 or (num_tasks is not None and values.shape[0] != num_tasks):
        raise ValueError(
            f"{owner}: expected {name} with one number per task ({num_tasks or 'K'}), found shape {list(values.shape)}"
        )
    if not bool(values.isfinite().all()):
        raise ValueError(f"{owner}: expected finite numbers in {name}, found {values.tolist()}")
    return values.detach().clone() if values.dtype == torch.float64 else values.detach().float().clone()


def preference_vector(owner: str, values: Tensor | Sequence[float], num_tasks: int | None = None) -> Tensor:
    """A preference: K numbers >= 0, not all of them 0; see `vector`.

    Raises:
        TypeError, ValueError: it is none.
    """
    preference = vector(owner, "preference", values, num_tasks)
    if bool((preference < 0).any()) or not bool((preference > 0).any()):
        raise ValueError(
            f"{owner}: expected a preference of numbers >= 0, some of them > 0; found {preference.tolist()}"
        )
    return preference


def first_seen(initial: Tensor, losses: Tensor) -> Tensor:
    """Per task the initial loss; the given one where none was seen, nan where that is not positive and finite."""
    usable = torch.where((losses > 0) & losses.isfinite(), losses, torch.full_like(losses, math.nan))
    return torch.where(initial.isnan(), usable, initial)


def or_one(values: Tensor) -> Tensor:
    """The values, 1 where they are nan."""
    return torch.where(values.isnan(), torch.ones_like(values), values)
