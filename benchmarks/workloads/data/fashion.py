"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747) as Debian's package `dataset-fashion-mnist` lays it.

70,000 grey images of 28 x 28 with ten classes, in the four gzipped files of the MNIST format.
"""

from __future__ import annotations

import functools
import gzip
import os
from pathlib import Path

import numpy as np

from .splits import DataMissingError

FOLDER = Path("/usr/share/datasets/fashion-mnist")
VARIABLE = "FASHION_MNIST"
"""Of the environment: another folder with the same files."""
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def folder() -> Path:
    """Where the files are looked for."""
    return Path(os.environ.get(VARIABLE) or FOLDER)


def installed() -> bool:
    """Whether the files are there."""
    return (folder() / "train-images-idx3-ubyte.gz").is_file()


@functools.lru_cache
def load(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[N, 28, 28]`` and classes uint8 ``[N]`` of ``part``, "train" (60,000) or "t10k" (10,000).

    Raises:
        DataMissingError: the files are not there.
        ValueError: a file in another format.
    """
    if not installed():
        raise DataMissingError(
            f"expected Fashion-MNIST in {folder()}; install Debian's package dataset-fashion-mnist, or set "
            f"{VARIABLE} to a folder with its four .gz files"
        )
    images = read_idx(folder() / f"{part}-images-idx3-ubyte.gz")
    return images, read_idx(folder() / f"{part}-labels-idx1-ubyte.gz")


def read_idx(path: Path) -> np.ndarray:
    """A gzipped file of unsigned bytes in the MNIST format: two zeros, type 8, dimensions, sizes, values.

    Raises:
        ValueError: another format, or another number of values than its sizes say.
    """
    with gzip.open(path) as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"{path}: expected the MNIST format with unsigned bytes, found {content[:4]!r} at its start")
    begin = 4 + 4 * content[3]
    shape = tuple(int(size) for size in np.frombuffer(content[4:begin], ">u4"))
    values = np.frombuffer(content, np.uint8, offset=begin)
    if values.size != int(np.prod(shape)):
        raise ValueError(f"{path}: expected {shape} values, found {values.size}")
    return values.reshape(shape)
