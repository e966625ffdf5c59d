"""NYUv2 (Silberman et al. 2012) and Cityscapes (Cordts et al. 2016, arXiv 1604.01685) in the layout of MTAN and LibMTL.

Arrays ``train/KIND/0.npy``, ``train/KIND/1.npy``... and the same in ``val``, KIND being ``image`` (H x W x 3, 0 to
1), ``label`` (H x W, below 0 where unknown; of Cityscapes ``label_7`` where it is there), ``depth`` (H x W x 1, 0
where unknown), and of NYUv2 ``normal`` (H x W x 3, 0 where unknown). ``val`` is what results are of; a tenth of
``train`` is held out for tuning.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .folders import first
from .splits import DataMissingError, Files, Splits

NYUV2 = {"segments": ("label",), "depth": ("depth",), "normals": ("normal",)}
CITYSCAPES = {"segments": ("label_7", "label"), "depth": ("depth",)}
CLASSES = {"nyuv2": 13, "cityscapes": 7}


def load(name: str, folder: Path) -> Splits:
    """Scenes of "nyuv2" or "cityscapes", read when they are asked for: images ``[N, 3, H, W]``, labels by pixel.

    Raises:
        DataMissingError: a folder is not there, or empty.
    """
    kinds = {"nyuv2": NYUV2, "cityscapes": CITYSCAPES}[name]
    train, test = _scenes(folder / "train", kinds), _scenes(folder / "val", kinds)
    held = max(1, len(train) // 10)
    fit = Files(len(train) - held, train.read)
    valid = Files(held, lambda place: train.read(len(train) - held + place))
    return Splits(fit, valid, test, f"{name} ({len(train)} and {len(test)} scenes)")


def _scenes(folder: Path, kinds: dict[str, tuple[str, ...]]) -> Files:
    images = first(folder, "image")
    number = len(list(images.glob("*.npy")))
    if number == 0:
        raise DataMissingError(f"expected arrays 0.npy, 1.npy... in {images}, found none")
    places = {task: first(folder, *names) for task, names in kinds.items()}
    return Files(number, functools.partial(_read, images, places))


def _read(images: Path, places: dict[str, Path], place: int) -> tuple[Tensor, dict[str, Tensor]]:
    labels = {}
    for task, folder in places.items():
        values = torch.from_numpy(np.load(folder / f"{place}.npy"))
        labels[task] = values.long() if task == "segments" else values.float().movedim(-1, 0)
    return torch.from_numpy(np.load(images / f"{place}.npy")).float().movedim(-1, 0), labels
