"""Scalarisations by a preference vector: STCH, COSMOS and PBI."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import LossAbout, LossCombination
from .checks import Tasks, Vector, non_negative, positive, preference_vector, tasks_of, vector


class STCH(LossCombination):
    """Smooth Tchebycheff: mu logsumexp(lam (L - z*) / mu).

    Lin et al. 2024 (arXiv 2402.19078). The smaller mu, the closer to max_k lam_k (L_k - z*_k).

    With ``warmup`` = n > 0, the first n calls in training mode return sum_k log L_k and average the losses into a
    nadir; after them L is replaced by log(L / nadir), as public code does. Losses <= 0 then raise ValueError on a
    CPU; on other devices and in compiled code nan or -inf flows.

    Args:
        tasks: how many tasks there are, or their names.
        mu: smoothing, a finite number > 0.
        preference: lam, K numbers >= 0, some of them > 0; None is 1 / K each. It is used as given.
        reference: z*, K finite numbers; None is 0.
        warmup: calls to average the nadir over, an integer >= 0; calls with losses that are not finite do not count.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    about: ClassVar[LossAbout] = LossAbout("mu logsumexp(lam (L - z*) / mu)", "nadir, with warmup", "none")
    instead: ClassVar[str] = "LogSum is one"

    preference: Tensor
    reference: Tensor
    nadir: Tensor
    seen: Tensor

    def __init__(
        self,
        tasks: Tasks,
        mu: float = 1.0,
        preference: Vector | None = None,
        reference: Vector | None = None,
        warmup: int = 0,
    ) -> None:
        super().__init__(tasks)
        num_tasks = self._count()
        self.mu = positive("STCH", "mu", mu)
        if isinstance(warmup, bool) or not isinstance(warmup, int):
            raise TypeError(f"STCH: expected warmup as an integer, found {warmup!r}")
        self.warmup = int(non_negative("STCH", "warmup", warmup))
        if preference is None:
            self.register_buffer("preference", torch.full((num_tasks,), 1 / num_tasks))
        else:
            self.register_buffer("preference", preference_vector("STCH", preference, tasks))
        self.register_buffer("reference", _reference("STCH", reference, tasks))
        self.register_buffer("nadir", torch.zeros(num_tasks))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def combine(self, losses: Tensor) -> Tensor:
        """The definition, or the sum of logarithms during the warm-up."""
        if self.warmup == 0:
            return self._smooth_maximum(losses)
        self.require_positive(losses, "the logarithm is taken")
        warming = self.seen < self.warmup
        if self.training:
            seen = self.seen + 1
            mean = self.nadir + (losses.detach().to(self.nadir.dtype) - self.nadir) / seen
            counts = warming & losses.detach().isfinite().all()
            self.nadir.copy_(torch.where(counts, mean, self.nadir))
            self.seen.copy_(torch.where(counts, seen, self.seen))
        logs = losses.log()
        # Before the first call in training mode there is no nadir, and the branch below is not the one taken.
        nadir = torch.where(self.nadir > 0, self.nadir, torch.ones_like(self.nadir))
        return torch.where(warming, logs.sum(), self._smooth_maximum(logs - nadir.log()))

    def _smooth_maximum(self, values: Tensor) -> Tensor:
        scaled = self.preference.to(values.dtype) * (values - self.reference.to(values.dtype))
        return self.mu * torch.logsumexp(scaled / self.mu, 0)


class COSMOS(LossCombination):
    """lam^T L - mu cos(lam, L), which rewards losses in the direction of the preference.

    Ruchte & Grabocka 2021 (arXiv 2103.13392).

    Args:
        preference: lam, K numbers >= 0, some of them > 0, or a dict of them by the names of the tasks. It is used as
            given.
        mu: weight of the cosine, a finite number >= 0.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    about: ClassVar[LossAbout] = LossAbout("lam L - mu cos(lam, L)", "none", "none")
    instead: ClassVar[str] = "FixedWeights, its first part, is one"

    preference: Tensor

    def __init__(self, preference: Vector, mu: float) -> None:
        lam = preference_vector("COSMOS", preference)
        super().__init__(tasks_of(preference))
        self.mu = non_negative("COSMOS", "mu", mu)
        self.register_buffer("preference", lam)

    def combine(self, losses: Tensor) -> Tensor:
        """The definition; the cosine counts as 0 where every loss is 0."""
        lam = self.preference.to(losses.dtype)
        largest = losses.detach().abs().amax()  # so that no square leaves the range
        scaled = losses / torch.where(largest > 0, largest, 1.0)
        length = torch.linalg.vector_norm(scaled)
        direction = lam / lam.amax()
        product = (direction / torch.linalg.vector_norm(direction) * scaled).sum()
        cosine = torch.where(length > 0, product / torch.where(length > 0, length, 1.0), 0.0)
        combined: Tensor = (lam * losses).sum() - self.mu * cosine
        return combined


class PBI(LossCombination):
    """Penalty-based boundary intersection: d1 + theta d2, of L - z* along the direction of the preference.

    Zhang & Li 2007 (IEEE TEVC, "MOEA/D"). d1 is the signed length of the projection on lam / ||lam||, d2 the distance
    to it. At d2 = 0 the gradient of d2 is taken as 0.

    Args:
        preference: lam, K numbers >= 0, some of them > 0, or a dict of them by the names of the tasks; its length does
            not matter.
        theta: penalty, a finite number >= 0.
        reference: z*, K finite numbers; None is 0.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    about: ClassVar[LossAbout] = LossAbout("d1 + theta d2", "none", "none")
    instead: ClassVar[str] = "FixedWeights, as d1 is, is one"

    preference: Tensor
    reference: Tensor

    def __init__(self, preference: Vector, theta: float, reference: Vector | None = None) -> None:
        lam = preference_vector("PBI", preference)
        super().__init__(tasks_of(preference))
        self.theta = non_negative("PBI", "theta", theta)
        self.register_buffer("preference", lam)
        self.register_buffer("reference", _reference("PBI", reference, tasks_of(preference)))

    def combine(self, losses: Tensor) -> Tensor:
        """The definition."""
        lam = self.preference.to(losses.dtype)
        direction = lam / torch.linalg.vector_norm(lam)
        offset = losses - self.reference.to(losses.dtype)
        along = (offset * direction).sum()
        across: Tensor = torch.linalg.vector_norm(offset - along * direction)
        combined: Tensor = along + self.theta * across
        return combined


def _reference(owner: str, values: Vector | None, tasks: Tasks) -> Tensor:
    if values is None:
        return torch.zeros(tasks if isinstance(tasks, int) else len(tasks))
    return vector(owner, "reference", values, tasks)
