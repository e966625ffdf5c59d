"""Two objectives by policy gradient: Deep Sea Treasure (Vamplew et al. 2011), with REINFORCE (Williams 1992).

A submarine starts at the surface of a grid and moves by one cell in four directions; every step costs one unit of
time, and the treasure at which it ends is worth the more the farther away it is. A stochastic policy is trained on
the two returns, treasure and time, each with its own policy-gradient loss over the same episodes; all parameters are
shared.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .workload import Objective, Workload, seeded

VALUES = (1.0, 2.0, 3.0, 5.0, 8.0, 16.0, 24.0, 50.0, 74.0, 124.0)
DEPTHS = (1, 2, 3, 4, 4, 4, 7, 7, 9, 10)
"""Of the treasure in every column."""
ROWS, COLUMNS = 11, len(VALUES)
LONGEST = 40
"""Steps after which an episode ends without a treasure."""
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))


class Goal(NamedTuple):
    """One of the objectives; treasure is counted in tenths of the largest."""

    name: str
    metric: str
    higher: bool


class Policy(nn.Module):
    """Logits of the four moves at places ``[N, 2]`` (row and column): ``[N, 4]``."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(ROWS + COLUMNS, width), nn.Tanh(), nn.Linear(width, len(MOVES)))

    def forward(self, places: Tensor) -> Tensor:
        rows = nn.functional.one_hot(places[:, 0], ROWS)
        columns = nn.functional.one_hot(places[:, 1], COLUMNS)
        found: Tensor = self.layers(torch.cat((rows, columns), 1).float())
        return found


class Episodes(NamedTuple):
    """Of E episodes, T steps.

    Attributes:
        places: int64 ``[T, E, 2]``. moves: int64 ``[T, E]``. alive: bool ``[T, E]``, whether a step was made.
        treasure, time: ``[E]``, what an episode brought and how long it took.
    """

    places: Tensor
    moves: Tensor
    alive: Tensor
    treasure: Tensor
    time: Tensor


class Treasure(Workload):
    """The two losses of a batch of episodes, each with the mean return as its baseline."""

    tasks = (Goal("treasure", "mean treasure", True), Goal("time", "mean steps", False))
    source = "Deep Sea Treasure, episodes played"
    learning_rate = 5e-3
    quick_steps = 40
    single_task: ClassVar[bool] = True

    def __init__(self, seed: int) -> None:
        self.model = seeded(Policy, seed)
        self._seed = seed

    def batch(self, step: int) -> Episodes:
        return self._play(torch.Generator().manual_seed(1_000_003 * self._seed + step), self.batch_size)

    @torch.no_grad()
    def _play(self, generator: torch.Generator, number: int) -> Episodes:
        depths, values = torch.tensor(DEPTHS), torch.tensor(VALUES)
        directions, edge = torch.tensor(MOVES), torch.tensor([ROWS - 1, COLUMNS - 1])
        place, alive = torch.zeros(number, 2, dtype=torch.int64), torch.ones(number, dtype=torch.bool)
        treasure, time = torch.zeros(number), torch.zeros(number)
        told: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(LONGEST):
            move = torch.multinomial(self.model(place).softmax(1), 1, generator=generator).squeeze(1)
            told.append((place, move, alive))
            place = torch.where(alive.unsqueeze(1), (place + directions[move]).clamp(min=0).minimum(edge), place)
            time = time + alive
            found = alive & (place[:, 0] >= depths[place[:, 1]])
            treasure = torch.where(found, values[place[:, 1]], treasure)
            alive = alive & ~found
        places, moves, steps = (torch.stack(values) for values in zip(*told, strict=True))
        return Episodes(places, moves, steps, treasure, time)

    def objective(self, batch: Episodes) -> Objective:
        logits = self.model(batch.places.flatten(0, 1)).log_softmax(1)
        chosen = logits.gather(1, batch.moves.flatten().unsqueeze(1)).view_as(batch.moves)
        likely = (chosen * batch.alive).sum(0)

        def loss(returns: Tensor) -> Tensor:
            return -(likely * (returns - returns.mean())).mean()

        return Objective({"treasure": loss(batch.treasure / 10), "time": loss(-batch.time / 10)})

    def metrics(self, part: str = "test") -> dict[str, float]:
        played = self._play(torch.Generator().manual_seed({"test": 1, "valid": 2}[part]), 256)
        return {"treasure": float(played.treasure.mean()), "time": float(played.time.mean())}


def build(seed: int) -> Treasure:
    """Deep Sea Treasure."""
    return Treasure(seed)
