"""AlignedMTL: the gradients nearest to the given ones that are orthogonal and of one length."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..call import SolverCall
from ..checks import preferences, rtol_option
from ..definitions.solving import Answer, Problem, defines
from ..definitions.spectrum import spectrum
from ..solution import Solution

__all__ = ["aligned_mtl_weights"]

_SCALE_MODES = ("min", "median", "rmse")


def aligned_mtl_weights(
    gram: Tensor,
    *,
    pref: Tensor | None = None,
    scale_mode: Literal["min", "median", "rmse"] = "min",
    rtol: float | None = None,
    active: Tensor | None = None,
    backend: str | None = None,
) -> Solution:
    """w = sqrt(scale) V S^(-1/2) V' pref with G = V S V' (Senushkin et al. 2023, arXiv 2305.19000, Algorithm 1).

    With B = sqrt(scale) V S^(-1/2) V', the rows of BJ are those nearest to J whose singular values are all
    sqrt(scale), so that on independent rows they are orthogonal and of that length; d = J'w is their combination by
    pref. On dependent rows that holds in the space that the rows span.

    Args:
        gram: ``[..., K, K]``, used in float64. Not finite among the active tasks: 1 / K_active for each.
        pref: ``[K]`` or ``[..., K]`` on the device of ``gram``, used as it is; default 1 / K_active.
            Values are not looked at: the methods check theirs.
        scale_mode: which eigenvalue becomes the square of the common length: "min" as published, the "median", of two
            the lower one, or "rmse", their mean; of those that count.
        rtol: an eigenvalue up to rtol times the largest one counts as zero, in (0, 1); default, and least, is
            K_active * 2.2e-16. G of float32 rows that depend on each other keeps eigenvalues of about 1e-14 of the
            largest one, which "min" then takes for the scale: an rtol of 1e-7 K leaves them out, as the published
            code does. w jumps where an eigenvalue passes it.
        active: bool ``[K]`` or ``[..., K]``; other tasks take no part and get weight 0.
        backend: see `mtl_kernels.use_backend`.

    Returns:
        `Solution`: weights, pref where all rows are zero; a zero row has weight 0 otherwise. gap: the residual of the
        eigen-decomposition, relative to G (Frobenius norm of what is left off the diagonal); iterations: sweeps.

    Raises:
        ValueError, TypeError: an unknown scale_mode, an rtol out of range, or tensors of the wrong shape, dtype or
            device.
    """
    call = SolverCall("aligned_mtl", aligned_mtl_options(scale_mode, rtol), active, inputs=preferences(pref, gram))
    return Solution.of(*ops.solve(gram, call, backend=backend))


def aligned_mtl_options(scale_mode: str, rtol: float | None = None) -> tuple[float, ...]:
    """The options of solver "aligned_mtl". Raise ValueError for those that `aligned_mtl_weights` refuses."""
    if scale_mode not in _SCALE_MODES:
        raise ValueError(f"expected scale_mode as one of {', '.join(_SCALE_MODES)}, found {scale_mode!r}")
    return (float(_SCALE_MODES.index(scale_mode)), rtol_option(rtol))


@defines("aligned_mtl", num_options=2)
def definition(problem: Problem) -> Answer:
    """sqrt(scale) V S^(-1/2) V' pref by LAPACK; options: (scale_mode, rtol or 0)."""
    mode, rtol = problem.options
    pref = problem.inputs
    if pref is None:
        pref = torch.full_like(problem.gram[0], 1 / len(problem.gram))
    values, vectors, _ = spectrum(problem.gram, rtol)
    if len(values) == 0:
        return Answer(pref)
    scale = {"min": values.min(), "median": values.median(), "rmse": values.mean()}[_SCALE_MODES[int(mode)]]
    return Answer(vectors @ (vectors.T @ pref * (scale / values).sqrt()))
