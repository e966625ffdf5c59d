"""Two-digit images out of the 8x8 handwritten digits that scikit-learn bundles; nothing is downloaded.

The construction is MultiMNIST: one digit at the top left, one at the bottom right, overlapping, combined by
the maximum (Sabour et al. 2017, arXiv 1710.09829; as tasks Sener & Koltun 2018, arXiv 1810.04650).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from .tasks import TASKS

NUM_TRAIN = 20_000
NUM_TEST = 4_000
TEST_SHARE = 0.25
DIGIT = 8
CANVAS = 12
JITTER = 2
"""Each digit stands at one of JITTER x JITTER positions in its corner."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Composed images and the label of every task.

    Attributes:
        images: float32 ``[N, 1, 12, 12]`` in [0, 1].
        labels: for each task int64 ``[N]``.
        sources: int64 ``[N, 2]``, the two digits of each image as indices into scikit-learn's set.
    """

    images: Tensor
    labels: dict[str, Tensor]
    sources: Tensor

    def __len__(self) -> int:
        return len(self.images)


def load(seed: int, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST) -> tuple[Pairs, Pairs]:
    """Training and test images; no handwritten digit is part of both."""
    images, digits = load_digits(return_X_y=True)
    scaled = (images / 16).astype(np.float32).reshape(-1, DIGIT, DIGIT)
    train, test = train_test_split(
        np.arange(len(digits)), test_size=TEST_SHARE, random_state=seed % 2**32, stratify=digits
    )
    rng = np.random.default_rng(seed)
    return compose(scaled, digits, train, num_train, rng), compose(scaled, digits, test, num_test, rng)


def compose(
    images: np.ndarray, digits: np.ndarray, choices: np.ndarray, num_pairs: int, rng: np.random.Generator
) -> Pairs:
    """Random pairs of the digits ``choices``, indices into images ``[M, 8, 8]`` and digits ``[M]``."""
    sources = rng.choice(choices, size=(num_pairs, 2))
    corners = np.array([0, CANVAS - DIGIT - JITTER + 1])
    offsets = corners[:, None] + rng.integers(JITTER, size=(num_pairs, 2, 2))
    canvas = np.zeros((num_pairs, CANVAS, CANVAS), dtype=np.float32)
    which = np.arange(num_pairs)[:, None, None]
    pixel = np.arange(DIGIT)
    for place in range(2):
        rows = offsets[:, place, 0, None, None] + pixel[:, None]
        columns = offsets[:, place, 1, None, None] + pixel
        canvas[which, rows, columns] = np.maximum(canvas[which, rows, columns], images[sources[:, place]])
    first, second = digits[sources[:, 0]], digits[sources[:, 1]]
    labels = {
        task: torch.from_numpy(values.astype(np.int64))
        for task, values in zip(TASKS, (first, second, first + second), strict=True)
    }
    return Pairs(torch.from_numpy(canvas).unsqueeze(1), labels, torch.from_numpy(sources))
