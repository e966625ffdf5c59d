"""Methods around a method: `Normalized` and `CRMOGM`."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

import mtl_kernels
from mtl_kernels import Solution

from .base import About, Method, check_active, check_choice, check_gram
from .rows import RowMethod
from .shares import equal_shares, finite_among

_INNER = "method."
_W = TypeVar("_W", bound="Wrapper")


@dataclasses.dataclass(frozen=True, eq=False)
class Wrapper(Method):
    """A method that goes by the weights of another one, whose state is saved, loaded and reset with its own.

    In a state dict the tensors of the wrapped method have names that begin with "method.".

    Args:
        method: the method that is wrapped, an instance.

    Raises:
        TypeError: it is no method, or one that needs the rows.
        ValueError: it takes several batches a step.
    """

    method: Method

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(
                f"{type(self).__name__}: expected a method such as MGDA(), found {self.method!r}; of a name, "
                "methods.get(name)() makes one"
            )
        if self.method.num_batches > 1:
            raise ValueError(
                f"{type(self).__name__}: {type(self.method).__name__} goes by the products of two batches, which are "
                "no Gram matrix, and its weights change slowly by themselves; use it without a wrapper"
            )
        if isinstance(self.method, RowMethod):
            raise TypeError(
                f"{type(self).__name__}: {type(self.method).__name__} needs the rows themselves, and a wrapped method "
                "is given their Gram matrix; use it by itself"
            )

    def check_tasks(self, num_tasks: int) -> None:
        """Raise ValueError where the wrapped method is not for K tasks."""
        self.method.check_tasks(num_tasks)

    @property
    def refresh_every(self) -> int:
        """That of the wrapped method."""
        return self.method.refresh_every

    @property
    def needs_losses(self) -> bool:
        """Whether the wrapped method needs them."""
        return self.method.needs_losses

    @property
    def stops_at_zero_rows(self) -> bool:
        """Whether the wrapped method stops there; averaged over steps, a row that stays zero still stops the others."""
        return self.method.stops_at_zero_rows

    def bound_to(self: _W, tasks: tuple[str, ...]) -> _W:
        """A wrapper, with this one's state, of the wrapped method bound to the tasks; see `Method.bound_to`."""
        return self._around(self.method.bound_to(tasks))

    @property
    def needs_heads(self) -> bool:
        """Whether the wrapped method does."""
        return self.method.needs_heads

    def with_heads(self: _W, norms: Tensor) -> _W:
        """A wrapper, with this one's state, of the wrapped method told of the heads; see `Method.with_heads`."""
        return self._around(self.method.with_heads(norms))

    def _around(self: _W, method: Method) -> _W:
        if method is self.method:
            return self
        bound = dataclasses.replace(self, method=method)
        object.__setattr__(bound, "state", self.state)
        return bound

    def config(self) -> dict[str, Any]:
        """The hyper-parameters by name; those of the wrapped method under its class name, in ``"method"``."""
        return {**super().config(), "method": {type(self.method).__name__: self.method.config()}}

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the state, that of the wrapped method included."""
        inner = {_INNER + key: value for key, value in self.method.state_dict().items()}
        return {**super().state_dict(), **inner}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Replaces the state, that of the wrapped method included; see `Method.load_state_dict`."""
        if not isinstance(state_dict, dict) or not all(isinstance(key, str) for key in state_dict):
            raise TypeError("expected a dict of tensors, as state_dict() of the same method returns it")
        inner = {key.removeprefix(_INNER): value for key, value in state_dict.items() if key.startswith(_INNER)}
        own = {key: value for key, value in state_dict.items() if not key.startswith(_INNER)}
        before = self.method.state_dict()
        self.method.load_state_dict(inner)
        try:
            super().load_state_dict(own)
        except BaseException:
            self.method.load_state_dict(before)
            raise

    def reset(self) -> None:
        """Clears the state, that of the wrapped method included."""
        super().reset()
        self.method.reset()

    def _inner(self, gram: Tensor, losses: Tensor | None, active: Tensor | None) -> Solution:
        found = self.method._solution(gram, self.method.solve(gram, losses=losses, active=active))
        return found._replace(weights=found.weights.double())


@dataclasses.dataclass(frozen=True, eq=False)
class Normalized(Wrapper):
    """A method on unit rows: w_k = v_k / n_k with v = f(G_ij / (n_i n_j)) and n_k = ||g_k||.

    So d is the combination that ``method`` finds for the gradients g_k / n_k. A zero row stays zero, and gets weight 0.
    The certificate is that of the normalised problem. The step does not scale with the gradients; it therefore refuses
    to run with GradScaler.

    Args:
        method: the method that is wrapped; ``Normalized(MGDA())`` is ``MGDA(normalize="l2")``. Losses reach it as
            they are.

    Raises:
        TypeError, ValueError: it is no method, or one that takes several batches a step.
    """

    name: ClassVar[str] = "normalized"
    about: ClassVar[About] = About(
        "Gram, and what the method needs", "the method's", "the method's, for unit rows", "the method's"
    )
    scales_with_gradient: ClassVar[bool] = False
    weighs_alone: ClassVar[bool] = True

    def solve(self, gram: Tensor, *, losses: Tensor | None = None, active: Tensor | None = None) -> Solution:
        """The weights of the wrapped method on unit rows, for the original rows; see `Method.solve`."""
        check_gram("Normalized", gram)
        check_active("Normalized", gram, active)
        gram = gram.double()
        finite = finite_among(gram, active)
        # nan rather than whatever cosines are left of an infinity: the wrapped method is to see it and keep its state.
        cosines = torch.where(finite.unsqueeze(-1), mtl_kernels.cosines(gram), torch.nan)
        found = self._inner(cosines, losses, active)
        length = mtl_kernels.norms(gram)
        weights = torch.where(length > 0, found.weights / length, 0.0)
        if active is not None:
            weights = torch.where(active, weights, 0.0)
        return found._replace(weights=torch.where(finite, weights, equal_shares(gram, active)))


@dataclasses.dataclass(frozen=True, eq=False)
class CRMOGM(Wrapper):
    """Weights averaged over the steps: w_t = alpha w_{t-1} + (1 - alpha) f(G_t).

    Zhou et al. 2022 (On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond, NeurIPS): the
    weights of a step are then not determined by its own stochastic gradients alone. Here alpha is a constant.

    Args:
        method: the method that is wrapped.
        alpha: how much of the last weights stays, in [0, 1]; 0 is the method itself.
        start: what a task starts from, w_0, in the first step in which it is active: "first", f(G) of that step, which
            fits weights of any size; or "uniform", 1 / (number of active tasks), which fits those that lie in the
            simplex. The weights of `Sum`, or of a method that divides by norms (`Normalized`), lie elsewhere, and
            from there many steps go by until the start is forgotten.

    A task that is not active has weight 0, and its average stays as it was.

    ``state["weights"]`` is w_t, float64 ``[..., K]``, nan for a task that was never active. A Gram matrix that is not
    finite leaves it as it was. Its shape must not change: with one problem per parameter or param group, the same ones
    have to be reached in every step. There is no certificate: the average does not solve the wrapped method's problem.

    Raises:
        TypeError, ValueError: no method, one that takes several batches a step, alpha is not a number in [0, 1], or an
            unknown start.
    """

    name: ClassVar[str] = "crmogm"
    about: ClassVar[About] = About(
        "what the method needs", "last weights, the method's", "the method's, on average", "the method's"
    )

    alpha: float = 0.9
    start: Literal["first", "uniform"] = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)):
            raise TypeError(f"CRMOGM: expected alpha as a number, found {self.alpha!r}")
        if not math.isfinite(self.alpha) or not 0 <= self.alpha <= 1:
            raise ValueError(f"CRMOGM: expected alpha in [0, 1], found {self.alpha}")
        check_choice("CRMOGM", "start", self.start, ("first", "uniform"))

    @property
    def needs_gram(self) -> bool:
        """Whether the wrapped method does."""
        return self.method.needs_gram

    @property
    def scales_with_gradient(self) -> bool:
        """Whether the wrapped method's combination does."""
        return self.method.scales_with_gradient

    @property
    def weighs_alone(self) -> bool:
        """Whether the wrapped method does."""
        return self.method.weighs_alone

    def solve(self, gram: Tensor, *, losses: Tensor | None = None, active: Tensor | None = None) -> Solution:
        """The averaged weights; see `Method.solve`.

        Raises:
            ValueError: K, or the number of problems, is not that of the state.
        """
        check_gram("CRMOGM", gram)
        check_active("CRMOGM", gram, active)
        state = self._weights(gram)
        found = self._inner(gram, losses, active).weights
        finite, equal = finite_among(gram, active), equal_shares(gram, active)
        last = torch.where(state.isnan(), found if self.start == "first" else equal, state)
        smooth = self.alpha * last + (1 - self.alpha) * found
        there = equal > 0
        state.copy_(torch.where(there & finite & found.isfinite().all(-1, keepdim=True), smooth, state))
        return Solution(torch.where(finite, torch.where(there, smooth, 0.0), equal))

    def _weights(self, gram: Tensor) -> Tensor:
        """``state["weights"]`` on the device of ``gram``; nan, not known yet, at the first call."""
        shape = gram.shape[:-1]
        new = functools.partial(torch.full, shape, torch.nan, dtype=torch.float64, device=gram.device)
        return self._kept("weights", gram.device, new, shape)
