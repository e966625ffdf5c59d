"""What a training step sends, holds and moves on a rank, as functions of its size: arithmetic, nothing measured.

K tasks over N shared parameters, H of single tasks, R ranks, F features of a rank's batch. Elements are those of
gradients; a Gram matrix is float64 and told apart. What is sent goes by rings, of which every rank sends (R - 1) / R of
what is reduced or gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """The sizes that a step goes by.

    Attributes:
        tasks, shared, heads, ranks: K, N, H and R.
        share: of the shared parameters that count in the Gram matrix, for "gram=False". every: ``refresh_every``.
        features: F.
    """

    tasks: int
    shared: float
    ranks: int
    heads: float = 0.0
    share: float = 0.1
    every: int = 10
    features: float = 1e6

    @property
    def ring(self) -> float:
        """What a rank sends of a tensor that is reduced or gathered."""
        return (self.ranks - 1) / self.ranks

    @property
    def both_ways(self) -> float:
        """Elements that the mean of one gradient sends, as an all-reduce."""
        return 2 * (self.shared + self.heads) * self.ring

    @property
    def gram_bytes(self) -> float:
        """Bytes that adding up a Gram matrix sends."""
        return 2 * 8 * self.tasks**2 * self.ring


@dataclass(frozen=True)
class Traffic:
    """Of a way to take a step, in elements.

    Attributes:
        sent: by a rank. held: of gradients and rows at most, above parameters and activations, from the second step on.
        moved: what sending, weighing and combining read and write in a rank's memory, backward passes aside.
    """

    sent: Callable[[Step], float]
    held: Callable[[Step], float]
    moved: Callable[[Step], float]


def _scattered(step: Step, share: float = 1.0) -> float:
    """Sent by the reduce-scatter of K rows, and the all-gather of what they combine to."""
    return (step.tasks + 1) * share * step.shared * step.ring


def _combined(step: Step, elements: float) -> float:
    """Read for the Gram matrix and for the combination, and written."""
    return (2 * step.tasks + 1) * elements


MODES: dict[str, Traffic] = {
    "plain sum": Traffic(lambda s: s.both_ways, lambda s: s.shared + s.heads, lambda s: 0.0),
    "scatter": Traffic(
        lambda s: _scattered(s) + 2 * s.heads * s.ring,
        # The gradient of the pass, and two on their way.
        lambda s: s.tasks * s.shared / s.ranks + 3 * s.shared + s.heads,
        lambda s: 2 * s.tasks * s.shared + _combined(s, s.shared / s.ranks) + 3 * s.shared,
    ),
    "all": Traffic(
        lambda s: 2 * s.tasks * s.shared * s.ring + 2 * s.heads * s.ring,
        lambda s: 2 * s.tasks * s.shared + s.heads,
        lambda s: 4 * s.tasks * s.shared + _combined(s, s.shared),
    ),
    "gram=False": Traffic(
        lambda s: _scattered(s, s.share) + 2 * ((1 - s.share) * s.shared + s.heads) * s.ring,
        lambda s: s.tasks * s.share * s.shared * (1 + 1 / s.ranks) + s.shared + s.heads,
        lambda s: 2 * s.tasks * s.share * s.shared + _combined(s, s.share * s.shared / s.ranks) + 4 * s.shared,
    ),
    "features": Traffic(
        lambda s: s.both_ways,
        lambda s: s.tasks * s.features + s.shared + s.heads,
        lambda s: _combined(s, s.features) + 4 * s.shared,
    ),
    "refresh_every": Traffic(
        lambda s: (MODES["scatter"].sent(s) + (s.every - 1) * s.both_ways) / s.every,
        lambda s: MODES["scatter"].held(s),
        lambda s: (MODES["scatter"].moved(s) + (s.every - 1) * 4 * s.shared) / s.every,
    ),
    "FSDP2, plain sum": Traffic(
        lambda s: 3 * (s.shared + s.heads) * s.ring, lambda s: (s.shared + s.heads) / s.ranks, lambda s: 0.0
    ),
    "FSDP2": Traffic(
        # Parameters are gathered for the forward pass and for every backward one, after which gradients are reduced.
        lambda s: ((2 * s.tasks + 1) * s.shared + 3 * s.heads) * s.ring,
        lambda s: (s.tasks * s.shared + s.heads) / s.ranks,
        lambda s: _combined(s, s.shared / s.ranks),
    ),
}
