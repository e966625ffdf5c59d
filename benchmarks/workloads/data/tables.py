"""Small tables that scikit-learn bundles, with several things to predict."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_diabetes, load_linnerud

from .images import single_digits
from .splits import Part, Splits, split, standardized


def diabetes(seed: int) -> Splits:
    """442 patients (Efron et al. 2004): from nine measurements the tasks "progression" (a value) and "sex" (0 or 1)."""
    table, target = load_diabetes(return_X_y=True)
    values = torch.from_numpy(table.astype(np.float32))
    labels = {
        "progression": torch.from_numpy(target.astype(np.float32)),
        "sex": (values[:, 1] > 0).float(),
    }
    inputs = torch.cat((values[:, :1], values[:, 2:]), 1)
    return standardized(split(Part(inputs, labels), seed, "scikit-learn's diabetes (442 rows)"), ("progression",))


def linnerud(seed: int) -> Splits:
    """20 men (Tenenhaus 1998): from three exercises the tasks "weight", "waist" and "pulse". Tiny, and only that."""
    found = load_linnerud()
    target = torch.from_numpy(found.target.astype(np.float32))
    labels = {name.lower(): target[:, k] for k, name in enumerate(found.target_names)}
    part = Part(torch.from_numpy(found.data.astype(np.float32)), labels)
    return standardized(split(part, seed, "scikit-learn's linnerud (20 rows)"), tuple(labels))


def digit_properties(seed: int) -> Splits:
    """Digits as 64 numbers; tasks "digit" (10 classes), "odd", "above four" and "loop" (0, 6, 8 and 9), each 0 or 1."""
    single = single_digits(seed)
    digits = single.classes
    labels = {
        "digit": digits,
        "odd": (digits % 2).float(),
        "above four": (digits > 4).float(),
        "loop": torch.isin(digits, torch.tensor([0, 6, 8, 9])).float(),
    }
    return split(Part(single.images.flatten(1), labels), seed, single.source)
