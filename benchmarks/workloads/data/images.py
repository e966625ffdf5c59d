"""Images of two things: digits of scikit-learn (Multi-MNIST), items of Fashion-MNIST (Multi-Fashion), scenes of digits.

Multi-MNIST: one at the top left, one at the bottom right, overlapping, combined by the maximum (Sabour et al. 2017,
arXiv 1710.09829; as two tasks Sener & Koltun 2018, arXiv 1810.04650). Multi-Fashion: the same of Fashion-MNIST (Lin
et al. 2019, arXiv 1912.12854).
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import pad

from mtl_optim.demo import data as demo

from . import fashion
from .splits import Part, Splits

DIGITS = "scikit-learn's digits (1,797 of 8 x 8)"
FASHION = "Fashion-MNIST (Debian's dataset-fashion-mnist)"
BACKGROUND = 10
"""The class of a pixel that shows no digit."""


@functools.lru_cache(maxsize=4)
def digit_pairs(seed: int, tasks: tuple[str, ...] = ("top-left", "bottom-right"), size: int = 6000) -> Splits:
    """Two digits in 12 x 12, ``[N, 1, 12, 12]``; tasks of "top-left", "bottom-right" (10 classes) and "sum" (19)."""
    train, test = _digit_pairs(seed, size)
    parts = []
    for pairs in (train, test):
        labels = dict(zip(("top-left", "bottom-right", "sum"), pairs.labels.values(), strict=True))
        parts.append(Part(pairs.images, {task: labels[task] for task in tasks}))
    return _held_out(*parts, f"Multi-MNIST of {DIGITS}")


@functools.lru_cache(maxsize=4)
def _digit_pairs(seed: int, size: int) -> tuple[demo.Pairs, demo.Pairs]:
    return demo.load(seed, size + size // 4, size // 6)


def _held_out(train: Part, test: Part, source: str) -> Splits:
    """The last fifth of the training examples becomes the validation part."""
    held = len(train) // 5
    return Splits(train[slice(0, len(train) - held)], train[slice(len(train) - held, None)], test, source)


@functools.lru_cache(maxsize=4)
def fashion_pairs(seed: int, size: int = 6000) -> Splits:
    """Two items in 36 x 36, ``[N, 1, 36, 36]``; tasks "top-left" and "bottom-right".

    Raises:
        DataMissingError: Fashion-MNIST is not installed.
    """
    rng = np.random.default_rng(seed)

    def compose(part: str, number: int) -> Part:
        images, classes = fashion.load(part)
        first, second = rng.integers(len(images), size=(2, number))
        chosen = [torch.from_numpy(images[index]).float() / 255 for index in (first, second)]
        canvas = torch.maximum(pad(chosen[0], (0, 8, 0, 8)), pad(chosen[1], (8, 0, 8, 0)))
        labels = (torch.from_numpy(classes[index].astype(np.int64)) for index in (first, second))
        return Part(canvas.unsqueeze(1), dict(zip(("top-left", "bottom-right"), labels, strict=True)))

    return _held_out(compose("train", size + size // 4), compose("t10k", size // 6), f"Multi-Fashion of {FASHION}")


@functools.lru_cache(maxsize=4)
def digit_scenes(seed: int, size: int = 3000) -> Splits:
    """The pairs as scenes ``[N, 1, 12, 12]`` with a label at every pixel, three tasks like those of NYUv2.

    "segments": the digit that a pixel shows, of two the brighter, or `BACKGROUND`. "depth": how far the stroke is,
    2 - brightness of the top-left digit alone, which the other one hides in part. "edges": the direction of the
    image's gradient, two numbers of length 1, or 0 where there is none.
    """
    train, test = _digit_pairs(seed, size)
    images, digits = load_digits(return_X_y=True)
    scaled = torch.from_numpy((images / 16).astype(np.float32)).view(-1, 1, 8, 8)

    def part(pairs: demo.Pairs) -> Part:
        canvas = pairs.images.squeeze(1)
        first = _placed(scaled[pairs.sources[:, 0]], canvas)
        shows_first = (first == canvas).int()
        owners = torch.from_numpy(digits)[pairs.sources]
        owner = torch.where(shows_first.bool(), owners[:, 0, None, None], owners[:, 1, None, None])
        segments = torch.where(canvas > 0.1, owner, BACKGROUND)
        return Part(pairs.images, {"segments": segments, "depth": (2 - first).unsqueeze(1), "edges": _edges(canvas)})

    return _held_out(part(train), part(test), f"scenes of two of {DIGITS}")


def _placed(images: Tensor, canvas: Tensor) -> Tensor:
    """Every image ``[N, 1, 8, 8]`` at that of the four places at the top left where it is nowhere above its canvas."""
    places = torch.stack([pad(images[:, 0], (x, 4 - x, y, 4 - y)) for y in range(2) for x in range(2)], 1)
    excess = (places - canvas.unsqueeze(1)).clamp(min=0).sum((2, 3))
    return places[torch.arange(len(images)), excess.argmin(1)]


def _edges(canvas: Tensor) -> Tensor:
    """Directions ``[N, 2, H, W]`` of central differences."""
    framed = pad(canvas, (1, 1, 1, 1))
    slopes = torch.stack((framed[:, 1:-1, 2:] - framed[:, 1:-1, :-2], framed[:, 2:, 1:-1] - framed[:, :-2, 1:-1]), 1)
    length = slopes.norm(dim=1, keepdim=True)
    return torch.where(length > 0.1, slopes / length.clamp(min=1e-6), 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Single:
    """Images of one thing: float32 ``[N, side, side]`` in [0, 1], classes int64 ``[N]``, how many train."""

    images: Tensor
    classes: Tensor
    train: int
    source: str


def single_digits(seed: int) -> Single:
    """The digits in a random order, 80 % of them for training and validation."""
    images, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    pixels = torch.from_numpy((images / 16).astype(np.float32)).view(-1, 8, 8)[order]
    return Single(pixels, torch.from_numpy(digits)[order], int(0.8 * len(digits)), DIGITS)


def single_fashion(seed: int, size: int = 8000) -> Single:
    """Random images of Fashion-MNIST, a fifth of them of its test part."""
    rng = np.random.default_rng(seed)
    found = [(*fashion.load(part), number) for part, number in (("train", size * 4 // 5), ("t10k", size // 5))]
    chosen = [rng.choice(len(images), number, replace=False) for images, _, number in found]
    pixels = np.concatenate([images[index] for (images, _, _), index in zip(found, chosen, strict=True)])
    classes = np.concatenate([of[index] for (_, of, _), index in zip(found, chosen, strict=True)])
    source = f"{len(pixels):,} images of {FASHION}"
    return Single(
        torch.from_numpy(pixels).float() / 255, torch.from_numpy(classes.astype(np.int64)), size * 4 // 5, source
    )
