"""IMTL-G: the direction whose projections on all unit gradients are equal."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..call import SolverCall
from ..checks import rtol_option
from ..definitions.solving import Answer, Problem, defines
from ..definitions.spectrum import nearest
from ..solution import Solution

__all__ = ["imtl_g_weights"]


def imtl_g_weights(
    gram: Tensor, *, rtol: float | None = None, active: Tensor | None = None, backend: str | None = None
) -> Solution:
    """w = a / sum a with a_k = (C^+ 1)_k / n_k, C the cosines and n the lengths of the rows (Liu et al. 2021).

    On independent rows a = G^-1 n, and d = J'w has the same product 1 / sum a with every unit row g_k / n_k. Weights
    may be negative, and so may that product be.

    On dependent rows, where TorchJD has a = G^+ n, C^+ 1 is what independent rows come to on their way there: two equal
    directions g and 2 g get weights 2/3 and 1/3. Where no d has equal projections, it is the d for which they are
    as near to equal as can be, in the sum of squares over all tasks alike.

    Args:
        gram: ``[..., K, K]``, used in float64. Not finite among the active tasks: 1 / K_active for each.
        rtol: an eigenvalue of C up to rtol times the largest one counts as zero, in (0, 1); default, and least, is
            K * 2.2e-16 with K the number of active rows that are not zero.
        active: bool ``[K]`` or ``[..., K]``; other tasks take no part and get weight 0.
        backend: see `mtl_kernels.use_backend`.

    Returns:
        `Solution`: weights that sum to 1, 0 for zero rows; all of them 0 where sum a is zero up to the rounding of C,
        as for opposite rows. gap: the residual of the eigen-decomposition, relative to C (Frobenius norm of what is
        left off the diagonal); iterations: sweeps.

    Raises:
        ValueError, TypeError: an rtol out of range, or tensors of the wrong shape, dtype or device.
    """
    call = SolverCall("imtl_g", imtl_g_options(rtol), active)
    return Solution.of(*ops.solve(gram, call, backend=backend))


def imtl_g_options(rtol: float | None = None) -> tuple[float, ...]:
    """The options of solver "imtl_g". Raise ValueError for those that `imtl_g_weights` refuses."""
    return (rtol_option(rtol),)


@defines("imtl_g", num_options=1)
def definition(problem: Problem) -> Answer:
    """a / sum a with a_k = (C^+ 1)_k / n_k by LAPACK; options: (rtol or 0,)."""
    found = nearest(problem.gram, torch.ones_like(problem.gram[0]), problem.options[0])
    w = torch.zeros_like(problem.gram[0])
    if len(found.lengths) == 0:
        return Answer(w)
    a = found.y * (found.lengths.min() / found.lengths)
    if a.sum().abs() > found.rounding * a.abs().sum():
        w[found.rows] = a / a.sum()
    return Answer(w)
