"""Tiny data sets in the layout of the published ones."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from PIL import Image

ATTRIBUTES = 40


def fashion(folder: Path, train: int = 40, test: int = 20) -> Path:
    """Fashion-MNIST's four files; an image of class c is c everywhere."""
    for part, number in (("train", train), ("t10k", test)):
        classes = (np.arange(number) % 10).astype(np.uint8)
        images = np.repeat(classes, 28 * 28)
        for kind, shape, values in (("images-idx3", (number, 28, 28), images), ("labels-idx1", (number,), classes)):
            head = bytes([0, 0, 8, len(shape)]) + b"".join(int(size).to_bytes(4, "big") for size in shape)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    return folder


def celeba(folder: Path, number: int = 12) -> Path:
    """Faces of one colour; attribute a of face f holds where f + a is even."""
    (folder / "img_align_celeba").mkdir()
    rows, parts = [], []
    for face in range(number):
        name = f"{face + 1:06d}.jpg"
        Image.new("RGB", (178, 218), (20 * face, 0, 255)).save(folder / "img_align_celeba" / name, quality=95)
        rows.append(f"{name} " + " ".join("1" if (face + a) % 2 == 0 else "-1" for a in range(ATTRIBUTES)))
        parts.append(f"{name} {0 if face < number - 4 else 1 if face < number - 2 else 2}")
    names = " ".join(f"Attribute_{a}" for a in range(ATTRIBUTES))
    (folder / "list_attr_celeba.txt").write_text("\n".join([str(number), names, *rows]) + "\n")
    (folder / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    return folder


def rooms(folder: Path, name: str, train: int = 6, test: int = 3) -> Path:
    """Scenes of 8 x 12, with a column of unknown labels; depth d of scene d + 1."""
    rng = np.random.default_rng(0)
    for part, number in (("train", train), ("val", test)):
        kinds = ("image", "label_7" if name == "cityscapes" else "label", "depth", "normal")
        for kind in kinds[: 3 if name == "cityscapes" else 4]:
            (folder / part / kind).mkdir(parents=True)
        for place in range(number):
            label = rng.integers(7, size=(8, 12)).astype(np.float64)
            label[:, 0] = -1
            normal = rng.standard_normal((8, 12, 3)).astype(np.float32)
            arrays = (rng.random((8, 12, 3)).astype(np.float32), label, np.full((8, 12, 1), place + 1.0), normal)
            for kind, values in zip(kinds, arrays, strict=True):
                if (folder / part / kind).is_dir():
                    np.save(folder / part / kind / f"{place}.npy", values)
    return folder


WATER = [("O", 0.0, 0.0, 0.0), ("H", 0.0, 0.0, 0.95), ("H", 0.92, 0.0, -0.24)]


def qm9(folder: Path, number: int = 10) -> Path:
    """Water in QM9's own format; property p of molecule m is m + p."""
    for molecule in range(number):
        properties = "\t".join(f"{molecule + p}" for p in range(15))
        atoms = [f"{e}\t{x}\t{y}\t{z}\t-1.5*^-6" for e, x, y, z in WATER]
        text = "\n".join(["3", f"gdb {molecule + 1}\t{properties}", *atoms, "1 2 3", "O\tO", "InChI"])
        (folder / f"dsgdb9nsd_{molecule + 1:06d}.xyz").write_text(text + "\n")
    return folder


def qm9_table(folder: Path, number: int = 10) -> Path:
    """The same as a table, with ethanol instead."""
    tasks = ("mu", "alpha", "homo", "lumo", "r2", "zpve", "u0", "u298", "h298", "g298", "cv")
    lines = [",".join(("mol_id", "smiles", *tasks))]
    lines += [f"gdb_{m},CCO," + ",".join(str(m + p) for p in range(len(tasks))) for m in range(number)]
    (folder / "qm9.csv").write_text("\n".join(lines) + "\n")
    return folder
