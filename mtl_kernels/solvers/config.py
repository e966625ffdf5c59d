"""ConFIG: the direction that makes the same angle with all gradients, or angles in a given ratio."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..call import SolverCall
from ..checks import preferences, rtol_option
from ..definitions.solving import Answer, Problem, defines
from ..definitions.spectrum import nearest
from ..solution import Solution

__all__ = ["config_weights"]

Length = Literal["projection", "min", "max", "harmonic", "arithmetic", "geometric"]
_LENGTHS = ("projection", "min", "max", "harmonic", "arithmetic", "geometric")


def config_weights(
    gram: Tensor,
    *,
    pref: Tensor | None = None,
    length: Length = "projection",
    rtol: float | None = None,
    active: Tensor | None = None,
    backend: str | None = None,
) -> Solution:
    """Weights of d = l b / ||b||, b = U^+ pref, U the unit rows (Liu et al. 2025, arXiv 2408.11104, eq. 2 and 3).

    With C = UU' and n the lengths of the rows: y = C^+ pref, b = U'y, w_k = l y_k / (||b|| n_k). On independent rows
    the cosines of d with them are in the ratio of pref, so that with pref > 0 there is no conflict.

    Args:
        gram: ``[..., K, K]``, used in float64. Not finite among the active tasks: 1 / K_active for each.
        pref: ``[K]`` or ``[..., K]`` on the device of ``gram``; its size does not matter. Default 1 for all.
            Values are not looked at: the methods check theirs.
        length: "projection" as published, l = sum_k g_k'b / ||b||; or l = m sum_k u_k'b / ||b|| with m the "min",
            "max", "harmonic", "arithmetic" or "geometric" mean of n.
        rtol: an eigenvalue of C up to rtol times the largest one counts as zero, in (0, 1); default, and least, is
            K * 2.2e-16 with K the number of active rows that are not zero.
        active: bool ``[K]`` or ``[..., K]``; other tasks take no part and get weight 0.
        backend: see `mtl_kernels.use_backend`.

    Returns:
        `Solution`: weights; 0 for zero rows, which are left out of b, l and m; all of them 0 where b is zero up to the
        rounding of C, as for opposite rows. gap: the residual of the eigen-decomposition, relative to C (Frobenius
        norm of what is left off the diagonal); iterations: sweeps.

    Raises:
        ValueError, TypeError: an unknown length, an rtol out of range, or tensors of the wrong shape, dtype or device.
    """
    call = SolverCall("config", config_options(length, rtol), active, inputs=preferences(pref, gram))
    return Solution.of(*ops.solve(gram, call, backend=backend))


def config_options(length: str, rtol: float | None = None) -> tuple[float, ...]:
    """The options of solver "config". Raise ValueError for those that `config_weights` refuses."""
    if length not in _LENGTHS:
        raise ValueError(f"expected length as one of {', '.join(_LENGTHS)}, found {length!r}")
    return (float(_LENGTHS.index(length)), rtol_option(rtol))


@defines("config", num_options=2)
def definition(problem: Problem) -> Answer:
    """l y_k / (||b|| n_k) by LAPACK; options: (length, rtol or 0)."""
    length, rtol = problem.options
    pref = torch.ones_like(problem.gram[0]) if problem.inputs is None else problem.inputs
    rows, n, y, products, _ = nearest(problem.gram, pref, rtol)  # products: U b
    w = torch.zeros_like(problem.gram[0])
    square = y @ products  # ||b||^2
    if square > 0:
        name = _LENGTHS[int(length)]
        along = n @ products if name == "projection" else _mean(n, name) * products.sum()
        w[rows] = along / square * y / n
    return Answer(w)


def _mean(n: Tensor, name: str) -> Tensor:
    if name == "harmonic":
        return 1 / n.reciprocal().mean()
    if name == "geometric":
        return n.log().mean().exp()
    return {"min": n.min(), "max": n.max(), "arithmetic": n.mean()}[name]
