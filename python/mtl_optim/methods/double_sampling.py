"""SDMGrad and MoDo: weights that go from step to step by what the gradients of independent batches tell."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

import mtl_kernels
from mtl_kernels import RowTable, Solution, ranges
from mtl_kernels.solvers.stochastic import modo_options, sdmgrad_options

from .base import About, Method, Weighted, check_gram
from .preference import Preferring


@dataclasses.dataclass(frozen=True, eq=False)
class DoubleSampling(Method):
    """A method whose weights come from A = J1 J2^T, the rows of two independent batches, and are for those of the last.

    The Gram matrix of one batch is on average that of the full gradients plus the covariance of the batch's noise; A is
    without it. Where other methods take a Gram matrix, `solve` and `weights` take A, which need not be symmetric.

    ``state["weights"]`` is w, float64 ``[..., K]``. Where A is not finite it stays as it was, and d is the mean of the
    last batch's rows. Its shape must not change: with one problem per parameter or param group, the same ones have to
    be reached in every step.
    """

    def weigh_batches(
        self,
        batches: Sequence[RowTable],
        *,
        groups: Sequence[int] | None = None,
        losses: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Weighted:
        """The weights of the last batch's rows, beside their Gram matrix; see `Method.weigh_batches`."""
        first, second, *_ = batches
        gram = mtl_kernels.gram(batches[-1], groups=groups)
        ranges.check_range(batches[-1], gram, groups)
        cross = mtl_kernels.cross_gram(first, second, groups=groups)
        return Weighted(gram, self.weights(cross, losses=losses, active=active), None)

    def _weights(self, gram: Tensor) -> Tensor:
        """``state["weights"]`` on the device of ``gram``, for the solver to change; 1 / K each at first.

        Raises:
            ValueError: K, or the number of problems, is not that of the state.
        """
        shape = gram.shape[:-1]
        new = functools.partial(torch.full, shape, 1 / gram.shape[-1], dtype=torch.float64, device=gram.device)
        return self._kept("weights", gram.device, new, shape)


@dataclasses.dataclass(frozen=True, eq=False)
class SDMGrad(DoubleSampling, Preferring):
    """Stochastic direction-oriented descent: d = J3^T (w + lam pref) / (1 + lam), with w from A = J1 J2^T.

    Xiao et al. 2023 (arXiv 2305.18409, Algorithm 1). In every step, n_iter times: b <- momentum b + A (w + lam pref)
    and w <- P(w - lr b), from b = 0 and the w of the last step, P the Euclidean projection onto the simplex. That is
    projected SGD on ||J^T (w + lam pref)||^2 / 2, which lam = 0 makes MGDA's objective, and whose minimiser gives
    nearly J^T pref where lam is large. J1, J2 and J3 are the gradients of three independent batches::

        for b, batch in enumerate(three_batches):
            opt.backward(losses(model, batch), batch=b)
        opt.step()

    Args:
        pref: see `Preferring`; None is 1 / K each. What counts is their proportion.
        lam: how much the preferred direction counts, >= 0.
        lr, momentum, n_iter: of the steps on w; > 0, in [0, 1), >= 1. The defaults are those of the published code;
            LibMTL takes lr 5. Steps so long overshoot: w jumps between corners and edges of the simplex, and with eight
            tasks or more the last bit of A decides, after some training steps, between which. With lr <= 1 w settles.
        normalize: A is divided by m^2, m the mean over the tasks of sqrt(max(A_ii, 0)), as in the published code, where
            ``lr`` is meant for that. Its 1e-8 on top is here relative to the largest entry of A, so that the weights do
            not depend on the scale of the losses. False takes A as it is; ``lr`` must then fit the gradients, and
            GradScaler is refused.

    Raises:
        TypeError, ValueError: an option of another type, or out of range.
    """

    name: ClassVar[str] = "sdmgrad"
    about: ClassVar[About] = About(
        "Gram of two batches, rows of a third", "weights", "on average as MGDA, near the mean", "O(K^2) an iteration"
    )
    num_batches: ClassVar[int] = 3

    lam: float = 0.3
    lr: float = 10.0
    momentum: float = 0.5
    n_iter: int = 20
    normalize: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _checked("SDMGrad", sdmgrad_options, self.lam, self.lr, self.momentum, self.n_iter, self.normalize)

    @property
    def scales_with_gradient(self) -> bool:
        """True where A is normalised."""
        return self.normalize

    def solve(self, gram: Tensor, *, losses: Tensor | None = None, active: Tensor | None = None) -> Solution:
        """The weights after this step's iterations, for the rows of the last batch; see `Method.solve`.

        Raises:
            ValueError: K, or the number of problems, is not that of the state; or ``pref`` does not fit.
        """
        check_gram("SDMGrad", gram)
        self.check_tasks(gram.shape[-1])
        weights = mtl_kernels.sdmgrad_weights(
            gram,
            state=self._weights(gram),
            lam=self.lam,
            lr=self.lr,
            momentum=self.momentum,
            n_iter=self.n_iter,
            normalize=self.normalize,
            pref=self._preference(gram.device),
            active=active,
        )
        return Solution(weights)


@dataclasses.dataclass(frozen=True, eq=False)
class MoDo(DoubleSampling):
    """Multi-objective gradient with double sampling: d = J3^T w, with w <- P(w - gamma (A w + rho w)), A = J1 J2^T.

    Chen et al. 2023 (arXiv 2305.20057, Algorithm 1). One step a training step, from w = 1 / K, of stochastic gradient
    descent on ||J^T w||^2 / 2 + rho |w|^2 / 2 over the simplex, P the Euclidean projection onto it: on average towards
    MGDA's weights. J1, J2 and J3 are the gradients of three independent batches, as for `SDMGrad`.

    The step on w is as long as the gradients squared, as published: where they are small w hardly leaves 1 / K, where
    they are large it jumps from task to task. Public codes take gamma 0.1 or 1e-3. GradScaler, which scales them, is
    refused.

    Args:
        gamma: the step size of w, > 0. rho: the regularisation towards equal weights, >= 0.
        num_batches: 3 as in the paper; or 2, where d is of the second batch again, which w then depends on. (Published
            code for two takes the mean of both.)

    Raises:
        TypeError, ValueError: an option of another type, or out of range.
    """

    name: ClassVar[str] = "modo"
    about: ClassVar[About] = About("Gram of two batches, rows of a third", "weights", "on average as MGDA", "O(K^2)")
    scales_with_gradient: ClassVar[bool] = False

    gamma: float = 0.1
    rho: float = 0.1
    num_batches: int = 3

    def __post_init__(self) -> None:
        _checked("MoDo", modo_options, self.gamma, self.rho)
        if self.num_batches not in (2, 3) or isinstance(self.num_batches, bool):
            raise ValueError(f"MoDo: expected num_batches 2 or 3, found {self.num_batches!r}")

    def solve(self, gram: Tensor, *, losses: Tensor | None = None, active: Tensor | None = None) -> Solution:
        """The weights after one step, for the rows of the last batch; see `Method.solve`.

        Raises:
            ValueError: K, or the number of problems, is not that of the state.
        """
        check_gram("MoDo", gram)
        weights = mtl_kernels.modo_weights(
            gram, state=self._weights(gram), gamma=self.gamma, rho=self.rho, active=active
        )
        return Solution(weights)


def _checked(owner: str, options: Callable[..., object], *values: object) -> None:
    try:
        options(*values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{owner}: {error}") from None
