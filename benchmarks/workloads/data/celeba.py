"""CelebA (Liu et al. 2015, arXiv 1411.7766): 202,599 aligned faces with 40 binary attributes.

The folder holds ``img_align_celeba/*.jpg``, ``list_attr_celeba.txt`` and ``list_eval_partition.txt``, the lists also in
``Anno`` and ``Eval``, as the authors publish them.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .folders import first
from .splits import Files, Splits

SIDE = 64


def load(folder: Path, side: int = SIDE) -> Splits:
    """Images ``[N, 3, side, side]`` in [0, 1], read when they are asked for; 40 attributes of 0 and 1.

    Raises:
        DataMissingError: a file is not there.
        ValueError: a list that is not as published.
    """
    names, attributes = _attributes(first(folder, "list_attr_celeba.txt", "Anno/list_attr_celeba.txt"))
    listed = first(folder, "list_eval_partition.txt", "Eval/list_eval_partition.txt")
    images = first(folder, "img_align_celeba", "Img/img_align_celeba")
    parts: list[list[str]] = [[], [], []]
    for line in listed.read_text().splitlines():
        file, part = line.split()
        if file not in attributes or part not in ("0", "1", "2"):
            raise ValueError(f"{listed}: expected an image of the list of attributes and 0, 1 or 2, found {line!r}")
        parts[int(part)].append(file)

    def read(files: list[str], place: int) -> tuple[Tensor, dict[str, Tensor]]:
        row = attributes[files[place]]
        return read_image(images / files[place], side), dict(zip(names, row, strict=True))

    train, valid, test = (Files(len(files), functools.partial(read, files)) for files in parts)
    return Splits(train, valid, test, f"CelebA ({len(attributes):,} faces, {side} x {side})")


def _attributes(path: Path) -> tuple[list[str], dict[str, Tensor]]:
    lines = path.read_text().splitlines()
    names, found = lines[1].split(), {}
    for line in lines[2:]:
        file, *values = line.split()
        if len(values) != len(names) or not set(values) <= {"1", "-1"}:
            raise ValueError(f"{path}: expected {len(names)} times 1 or -1 for {file}, found {len(values)} values")
        found[file] = torch.tensor([float(value == "1") for value in values])
    return names, found


def read_image(path: Path, side: int) -> Tensor:
    """The middle square of a picture, float32 ``[3, side, side]``."""
    from PIL import Image

    with Image.open(path) as image:
        square = min(image.size)
        left, top = (image.width - square) // 2, (image.height - square) // 2
        cut = image.convert("RGB").resize((side, side), box=(left, top, left + square, top + square))
    return torch.from_numpy(np.asarray(cut, dtype=np.float32) / 255).permute(2, 0, 1)
