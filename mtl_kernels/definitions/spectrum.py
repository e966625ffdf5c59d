"""What a symmetric matrix holds beyond its rounding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..angles import cosines, norms


class Spectrum(NamedTuple):
    """Eigenvalues ``[r]``, ascending, those that count as zero left out; eigenvectors ``[n, r]``.

    ``rounding`` is how much of a vector of length 1 may leave their space, or enter it, by the rounding of the matrix;
    below 1, and 0 where all n eigenvalues count.
    """

    values: Tensor
    vectors: Tensor
    rounding: float


def spectrum(matrix: Tensor, rtol: float) -> Spectrum:
    """The eigenvalues above ``rtol`` times the largest one, or n * eps times, if that is more."""
    share = max(rtol, len(matrix) * torch.finfo(torch.float64).eps)
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > share * values.max().clamp(min=0)
    values, vectors = values[kept], vectors[:, kept]
    return Spectrum(values, vectors, share * (values[-1] / values[0]).item() if len(values) else 0.0)


class Nearest(NamedTuple):
    """The rows that are not zero, bool ``[n]``; their lengths; y; C y; and the rounding of C, see `Spectrum`."""

    rows: Tensor
    lengths: Tensor
    y: Tensor
    image: Tensor
    rounding: float


def nearest(gram: Tensor, b: Tensor, rtol: float) -> Nearest:
    """y = C^+ b, C the cosines of the rows that are not zero; 0 where C y is nothing but rounding."""
    lengths = norms(gram)
    rows = lengths > 0
    lengths, b = lengths[rows], b[rows]
    if len(b) == 0:
        return Nearest(rows, lengths, b, b, 0.0)
    values, vectors, rounding = spectrum(cosines(gram)[rows][:, rows], rtol)
    coefficients = vectors.T @ b
    if len(values) < len(b) and coefficients.norm() <= rounding * b.norm():
        coefficients = torch.zeros_like(coefficients)
    return Nearest(rows, lengths, vectors @ (coefficients / values), vectors @ coefficients, rounding)
