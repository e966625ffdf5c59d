"""Lengths and angles of the rows, from their Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks


def norms(gram: Tensor) -> Tensor:
    """The length of every row, n_k = sqrt(G_kk): ``[..., K]`` from ``[..., K, K]``."""
    checks.check_gram(gram)
    return gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()


def cosines(gram: Tensor) -> Tensor:
    """The cosine of every pair of rows, G_ij / (n_i n_j), in [-1, 1]: ``[..., K, K]``.

    A zero row has cosine 0 with every row, itself included; the diagonal of any other row is exactly 1.
    """
    length = norms(gram)
    unit = torch.where(length > 0, length.reciprocal(), torch.zeros_like(length))
    scaled = (gram * unit.unsqueeze(-1) * unit.unsqueeze(-2)).clamp(-1, 1).tril()
    scaled = scaled + scaled.tril(-1).mT
    one = torch.where(length == 0, torch.zeros_like(length), length / length)
    return torch.where(
        torch.eye(gram.shape[-1], dtype=torch.bool, device=gram.device),
        one.unsqueeze(-1).expand_as(scaled),
        scaled,
    )
