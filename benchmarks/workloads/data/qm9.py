"""QM9 (Ramakrishnan et al. 2014): 133,885 small molecules with computed properties, eleven of them as tasks.

The folder holds the published ``dsgdb9nsd_*.xyz``, or ``qm9.csv`` with a column ``smiles``. A molecule is a vector:
how many atoms of every element and the sorted eigenvalues of its Coulomb matrix (Rupp et al. 2012, arXiv 1109.2618);
from the table, which has no positions, how often every character is in its SMILES.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch

from .splits import DataMissingError, Part, Splits, split, standardized

PROPERTIES = ("A", "B", "C", "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "u0", "u298", "h298", "g298", "cv")
"""In the order of the second line of a file."""
TASKS = ("mu", "alpha", "homo", "lumo", "r2", "zpve", "u0", "u298", "h298", "g298", "cv")
ELEMENTS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
MOST_ATOMS = 29
CHARACTERS = "CNOF[]()=#+-123456@Hcno/\\"


def load(folder: Path, seed: int, most: int = 20_000) -> Splits:
    """Vectors and properties, all standardized, of at most ``most`` random molecules.

    Raises:
        DataMissingError: neither files nor table are there.
        ValueError: a file or table in another format.
    """
    rng = np.random.default_rng(seed)
    files = sorted(folder.rglob("*.xyz"))
    if files:
        chosen = rng.permutation(len(files))[:most]
        found = [read_xyz(files[place]) for place in sorted(chosen)]
    elif (table := folder / "qm9.csv").is_file():
        found = _table(table)
        found = [found[place] for place in sorted(rng.permutation(len(found))[:most])]
    else:
        raise DataMissingError(f"expected dsgdb9nsd_*.xyz or qm9.csv in {folder}, found neither")
    inputs = torch.tensor(np.stack([vector for vector, _ in found]), dtype=torch.float32)
    labels = {t: torch.tensor([values[t] for _, values in found], dtype=torch.float64) for t in TASKS}
    splits = split(Part(inputs, labels), seed, f"QM9 ({len(found):,} molecules)")
    scaled = standardized(splits, TASKS)
    parts = (scaled.train, scaled.valid, scaled.test)
    single = [Part(one[:].inputs, {t: v.float() for t, v in one[:].labels.items()}) for one in parts]
    return Splits(*single, scaled.source)


def read_xyz(path: Path) -> tuple[np.ndarray, dict[str, float]]:
    """The vector and the properties of a file.

    Raises:
        ValueError: another format.
    """
    lines = path.read_text().splitlines()
    try:
        number = int(lines[0])
        properties = [_number(value) for value in lines[1].split()[2:]]
        atoms = [line.split()[:4] for line in lines[2 : 2 + number]]
        charges = np.array([ELEMENTS[atom[0]] for atom in atoms], dtype=np.float64)
        positions = np.array([[_number(value) for value in atom[1:]] for atom in atoms])
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path}: expected the xyz format of QM9, found {error}") from error
    if len(properties) != len(PROPERTIES) or not 0 < number == len(atoms) <= MOST_ATOMS:
        raise ValueError(f"{path}: expected {len(PROPERTIES)} properties and 1 to {MOST_ATOMS} atoms")
    counts = [float((charges == charge).sum()) for charge in ELEMENTS.values()]
    return np.concatenate((counts, coulomb(charges, positions))), dict(zip(PROPERTIES, properties, strict=True))


def coulomb(charges: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The eigenvalues, by size and filled up with zeros, ``[29]``: M_ii = Z_i^2.4 / 2, M_ij = Z_i Z_j / |R_i - R_j|."""
    apart = np.linalg.norm(positions[:, None] - positions, axis=2)
    np.fill_diagonal(apart, 1.0)
    matrix = np.outer(charges, charges) / apart
    np.fill_diagonal(matrix, 0.5 * charges**2.4)
    values = np.linalg.eigvalsh(matrix)
    padded = np.zeros(MOST_ATOMS)
    padded[: len(values)] = values[np.argsort(-np.abs(values))]
    return padded


def _number(text: str) -> float:
    """As Mathematica wrote some of them: 1.5*^-6."""
    return float(text.replace("*^", "e"))


def _table(path: Path) -> list[tuple[np.ndarray, dict[str, float]]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if missing := {"smiles", *TASKS} - set(reader.fieldnames or ()):
            raise ValueError(f"{path}: expected columns smiles and {', '.join(TASKS)}; missing {', '.join(missing)}")
        return [
            (np.array([row["smiles"].count(c) for c in CHARACTERS], float), {t: float(row[t]) for t in TASKS})
            for row in reader
        ]
