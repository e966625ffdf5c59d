"""What the last combination looked like, as device tensors: nothing reaches the host until it is read."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import mtl_kernels


@dataclasses.dataclass(frozen=True, eq=False)
class GramShare:
    """How a Gram matrix over some parameters compares with the one over all shared ones.

    Attributes:
        trace: of the squared norms of all rows, the share that lies in the parameters that count; float64 ``[]``.
        cosine_error: the largest difference of a cosine between two active tasks; float64 ``[]``.
        flips: how many pairs of active tasks conflict in one and not in the other; int64 ``[]``.
        age: steps since it was taken.
    """

    trace: Tensor
    cosine_error: Tensor
    flips: Tensor
    age: int = 0

    @classmethod
    def of(cls, partial: Tensor, rest: Tensor, active: Tensor) -> GramShare:
        """From the Gram matrices over the parameters that count and over the others, ``[K, K]``, and bool ``[K]``."""
        whole = partial + rest
        pairs = (active.unsqueeze(-1) & active.unsqueeze(-2)).triu(diagonal=1)
        error = (mtl_kernels.cosines(partial) - mtl_kernels.cosines(whole)).abs()
        trace, traces = partial.diagonal().sum(), whole.diagonal().sum()
        return cls(
            torch.where(traces > 0, trace / traces, 1.0),
            torch.where(pairs, error, 0.0).max(),
            (pairs & ((partial < 0) != (whole < 0))).sum(),
        )


@dataclasses.dataclass(frozen=True)
class Factoring:
    """How the rows of a step with ``capture="factored"`` were taken.

    Attributes:
        passes: "loop", one backward pass a task, or "batched", one for all of them.
        how: per parameter (of those combined that count in the Gram matrix, in the order of the optimizer) "factored",
            "dense", "one task" or "not reached", and after a colon the number of rows or the reason.
    """

    passes: str
    how: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Report:
    """The Gram matrix, the weights and the certificate of one step.

    Everything is over the shared parameters. With ``granularity="group"`` or ``"parameter"`` the tensors
    have a leading dimension S, one problem per group or parameter that holds shared parameters.

    Attributes:
        tasks: the K task names, in the order of the rows.
        gram: float64 ``[K, K]`` or ``[S, K, K]``; of the last batch, where a step takes several.
        weights: float64 ``[K]`` or ``[S, K]``, of the original rows; None for methods whose combination has none
            (`GradDrop`, `TrimmedMean`). Those of `MoCo` and `DBMTL` are of the averages that they keep.
        mask: `active` itself, which later steps and captured graphs go on reading: not to be written to.
        certificate: float64 ``[2]`` or ``[S, 2]``, `gap` and `iterations`; None for methods without one.
        problems: the S param group indices, or indices of parameters (counting those combined, in the order
            of the optimizer); empty for ``granularity="model"``.
        age: steps since the weights were computed (above 0 only with ``refresh_every``).
        gram_share: with ``share_every``, what the last comparison with a Gram matrix over all parameters gave.
        factoring: with ``capture="factored"``, which rows were coordinates; None where all were whole, because the
            graph hides parameters.
    """

    tasks: tuple[str, ...]
    gram: Tensor
    weights: Tensor | None
    mask: Tensor
    certificate: Tensor | None = None
    problems: tuple[int, ...] = ()
    age: int = 0
    gram_share: GramShare | None = None
    factoring: Factoring | None = None

    @property
    def active(self) -> Tensor:
        """The tasks that reached a shared parameter of the problem: bool ``[K]`` or ``[S, K]``, a copy.

        Where no parameter was shared, the tasks that were present (weight 1).
        """
        return self.mask.clone()

    @property
    def norms(self) -> Tensor:
        """The length of every row, float64 ``[..., K]``."""
        return mtl_kernels.norms(self.gram)

    @property
    def cosines(self) -> Tensor:
        """The cosine of every pair of rows, float64 ``[..., K, K]``; 0 for a zero row."""
        return mtl_kernels.cosines(self.gram)

    @property
    def gap(self) -> Tensor | None:
        """The duality gap, float64 ``[]`` or ``[S]``; None without a certificate."""
        return None if self.certificate is None else self.certificate[..., 0]

    @property
    def iterations(self) -> Tensor | None:
        """The iterations of the solver, int64 ``[]`` or ``[S]``; None without a certificate."""
        return None if self.certificate is None else self.certificate[..., 1].to(torch.int64)

    @property
    def conflict_fraction(self) -> Tensor:
        """The share of active pairs with a negative cosine, over all problems (0 if there are none)."""
        pairs = (self.mask.unsqueeze(-1) & self.mask.unsqueeze(-2)).triu(diagonal=1)
        conflicts = (pairs & (self.gram < 0)).sum()
        return conflicts.double() / pairs.sum().clamp(min=1)

    def summary(self) -> str:
        """A table for reading; copies the numbers to the host."""
        lines = [f"{len(self.tasks)} tasks, {100 * float(self.conflict_fraction):.0f}% of the pairs in conflict"]
        if self.age:
            lines[0] += f", weights {self.age} step(s) old"
        gram, weights = self.gram, self.weights
        if gram.dim() == 3:
            lines.append(f"{gram.shape[0]} problems: norms and cosines over all, weights averaged")
            count = self.mask.sum(0).clamp(min=1)
            gram, weights = gram.sum(0), None if weights is None else (weights * self.mask).sum(0) / count
        shown = ["none"] * len(self.tasks) if weights is None else [f"{weight:.4g}" for weight in weights.tolist()]
        norms, cosines = mtl_kernels.norms(gram).tolist(), mtl_kernels.cosines(gram).tolist()
        width = max(4, *(len(name) for name in self.tasks))
        lines.append(f"{'task':<{width}}  {'norm':>10}  {'weight':>10}  cosines")
        for name, norm, weight, row in zip(self.tasks, norms, shown, cosines, strict=True):
            values = " ".join(f"{value:+.2f}" for value in row)
            lines.append(f"{name:<{width}}  {norm:>10.4g}  {weight:>10}  {values}")
        if self.gap is not None and self.iterations is not None and self.gap.numel():
            worst, most = float(self.gap.max()), int(self.iterations.max())
            lines.append(f"duality gap {worst:.3g} after {most} iterations")
        if (share := self.gram_share) is not None:
            lines.append(
                f"parameters in the Gram matrix: {100 * float(share.trace):.0f}% of its trace over all, cosines off by "
                f"up to {float(share.cosine_error):.2g}, {int(share.flips)} pair(s) of another sign, {share.age} "
                "step(s) ago"
            )
        if (factoring := self.factoring) is not None:
            shared = [how for how in factoring.how if how.startswith(("factored", "dense"))]
            factored = [how for how in shared if how.startswith("factored")]
            lines.append(f"{len(factored)} of {len(shared)} shared parameters factored, passes: {factoring.passes}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        where = f"{list(self.gram.shape)} on {self.gram.device}"
        return f"Report(tasks={list(self.tasks)}, gram={where}, age={self.age})"

    def aged(self) -> Report:
        """The same report one step later."""
        return dataclasses.replace(self, age=self.age + 1).with_share_of(self)

    def with_share_of(self, before: Report | None) -> Report:
        """With what the report of the step before says of the Gram matrix over all parameters, a step older."""
        share = None if before is None else before.gram_share
        if share is None:
            return self
        return dataclasses.replace(self, gram_share=dataclasses.replace(share, age=share.age + 1))
