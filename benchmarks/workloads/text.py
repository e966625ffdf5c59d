"""Hard sharing on text: a bidirectional LSTM, and a transformer encoder, with linear heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .data import docstrings
from .parts import HardSharing
from .tasks import Task
from .workload import Supervised


class Recurrent(nn.Module):
    """Words ``[N, L]`` to the largest state of a bidirectional LSTM over them, ``[N, 2 width]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(docstrings.WORDS, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width, batch_first=True, bidirectional=True)

    def forward(self, text: Tensor) -> Tensor:
        states = self.lstm(self.words(text))[0]
        return states.masked_fill((text == 0).unsqueeze(-1), -1.0).amax(1)


class Attentive(nn.Module):
    """Words ``[N, L]`` to the mean state of transformer layers over them, ``[N, width]`` (Vaswani et al. 2017)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(docstrings.WORDS, width, padding_idx=0)
        self.places = nn.Parameter(0.02 * torch.randn(docstrings.LENGTH, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, text: Tensor) -> Tensor:
        empty = text == 0
        states = self.words(text) + self.places
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=empty)
        there = (~empty).unsqueeze(-1)
        return (self.norm(states) * there).sum(1) / there.sum(1)


class RecurrentNetwork(HardSharing):
    """An LSTM trunk."""

    def __init__(self, tasks: Sequence[Task], width: int = 32) -> None:
        super().__init__(tasks, Recurrent(width), 2 * width)


class AttentiveNetwork(HardSharing):
    """A transformer trunk."""

    def __init__(self, tasks: Sequence[Task], width: int = 48, layers: int = 2) -> None:
        super().__init__(tasks, Attentive(width, layers), width)


def lstm(seed: int) -> Supervised:
    """What a docstring is about (topic), and whether its code raises: the place of a sentiment."""
    return _workload(seed, ("topic", "raises"), RecurrentNetwork, quick_steps=60)


def transformer(seed: int) -> Supervised:
    """An encoder with four heads."""
    return _workload(seed, tuple(docstrings.TASKS), AttentiveNetwork, quick_steps=40)


def _workload(seed: int, names: tuple[str, ...], network: type[nn.Module], quick_steps: int) -> Supervised:
    tasks = [Task(name, "classes", docstrings.TASKS[name]) for name in names]
    workload = Supervised(tasks, docstrings.load(seed, names), network, seed)
    workload.learning_rate, workload.batch_size, workload.quick_steps = 2e-3, 32, quick_steps
    return workload
