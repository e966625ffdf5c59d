"""Where data sets lie that nobody may bundle: a folder each, named on the command line or in the environment."""

from __future__ import annotations

import os
from pathlib import Path

from .splits import DataMissingError

VARIABLES = {"celeba": "CELEBA", "nyuv2": "NYUV2", "cityscapes": "CITYSCAPES", "qm9": "QM9"}
"""The variable of the environment for each set."""


def find(name: str) -> Path:
    """The folder of a set.

    Raises:
        DataMissingError: none was named, or it is not there.
    """
    variable = VARIABLES[name]
    given = os.environ.get(variable)
    if not given:
        raise DataMissingError(
            f"{name} has to be given as a folder: set {variable}=FOLDER, or pass --data {name}=FOLDER"
        )
    if not Path(given).is_dir():
        raise DataMissingError(f"expected the folder of {name} in {variable}, found no folder {given}")
    return Path(given)


def first(folder: Path, *candidates: str) -> Path:
    """The first of some files or folders that is there.

    Raises:
        DataMissingError: none is.
    """
    for name in candidates:
        if (folder / name).exists():
            return folder / name
    raise DataMissingError(f"expected {' or '.join(candidates)} in {folder}, found neither")
