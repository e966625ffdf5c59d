"""Binary attributes of images, in the place of CelebA's 40 where no faces can be had.

An image of one thing (Fashion-MNIST, or digits where it is not installed) has, in this order:

    10  whether it is of class c
    18  whether its class is in a set of five of the ten, drawn once for all seeds
    12  whether a measure of its pixels is above the median of the training images: the ink in all, in the upper, left,
        and middle part, of the rows and columns that have any, symmetry in two directions, roughness, contrast, and
        where the ink's centre is

So tasks are related in part: sets overlap, measures go along with classes, and some of them with each other.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import fashion
from .images import Single, single_digits, single_fashion
from .splits import Part, Splits

MOST = 40
_CLASSES, _SETS = 10, 18
_MEASURES = (
    "ink", "ink above", "ink left", "ink in the middle", "height", "width", "same left and right", "same up and down",
    "rough", "contrast", "centre low", "centre right",
)  # fmt: skip


@functools.lru_cache(maxsize=4)
def load(seed: int, number: int = MOST) -> Splits:
    """Images ``[N, 1, side, side]`` and ``number`` attributes, float32 ``[N]`` of 0 and 1.

    Fewer than 40 are spread over the list, so that all kinds are there.

    Raises:
        ValueError: a number out of range.
    """
    if not 2 <= number <= MOST:
        raise ValueError(f"expected 2 to {MOST} attributes, found {number}")
    single = single_fashion(seed) if fashion.installed() else single_digits(seed)
    every = _attributes(single)
    names = list(every)
    kept = [names[round(place * (MOST - 1) / (number - 1))] for place in range(number)]
    whole = Part(single.images.unsqueeze(1), {name: every[name] for name in kept})
    held = single.train // 5
    return Splits(
        whole[slice(0, single.train - held)],
        whole[slice(single.train - held, single.train)],
        whole[slice(single.train, None)],
        f"{number} derived attributes of {single.source}",
    )


def _attributes(single: Single) -> dict[str, Tensor]:
    found = {f"class {c}": (single.classes == c).float() for c in range(_CLASSES)}
    generator = torch.Generator().manual_seed(40)
    for _ in range(_SETS):
        members = torch.randperm(_CLASSES, generator=generator)[: _CLASSES // 2].sort().values
        name = "in " + "".join(str(c) for c in members.tolist())
        while name in found:  # the complement has other members, an equal set is drawn anew
            members = torch.randperm(_CLASSES, generator=generator)[: _CLASSES // 2].sort().values
            name = "in " + "".join(str(c) for c in members.tolist())
        found[name] = torch.isin(single.classes, members).float()
    for name, values in zip(_MEASURES, _measures(single.images), strict=True):
        found[name] = (values > values[: single.train].median()).float()
    return found


def _measures(images: Tensor) -> list[Tensor]:
    """Of images ``[N, side, side]``, each ``[N]``, in the order of their names."""
    side = images.shape[-1]
    half, quarter = side // 2, side // 4
    total = images.sum((1, 2)).clamp(min=1e-6)
    place = torch.arange(side, dtype=images.dtype)
    rows, columns = images.sum(2), images.sum(1)
    return [
        images.mean((1, 2)),
        rows[:, :half].sum(1) / total,
        columns[:, :half].sum(1) / total,
        images[:, quarter:-quarter, quarter:-quarter].sum((1, 2)) / total,
        (rows / rows.amax(1, keepdim=True).clamp(min=1e-6)).sum(1),
        (columns / columns.amax(1, keepdim=True).clamp(min=1e-6)).sum(1),
        -(images - images.flip(2)).abs().mean((1, 2)),
        -(images - images.flip(1)).abs().mean((1, 2)),
        images.diff(dim=2).abs().mean((1, 2)) + images.diff(dim=1).abs().mean((1, 2)),
        images.std((1, 2)),
        (rows * place).sum(1) / total,
        (columns * place).sum(1) / total,
    ]
