"""The definitions of the solvers: one problem at a time, and the loop that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import SolverCall


class Problem(NamedTuple):
    """One problem as its definition sees it: over its active tasks alone, finite, on the CPU.

    Attributes:
        gram: float64 ``[n, n]``.
        tasks: the numbers of the n active tasks among all K.
        num_tasks: K. position: the problem's place in the batch.
        options, rng: as in `SolverCall`. inputs: float64 ``[n]``, or None.
        state: float64 ``[m]``, of all K tasks, for the definition to change; or None.
    """

    gram: Tensor
    tasks: list[int]
    num_tasks: int
    position: int
    options: Sequence[float]
    rng: Tensor | None
    inputs: Tensor | None
    state: Tensor | None


class Answer(NamedTuple):
    """What a definition finds: weights float64 ``[n]`` of the active tasks, gap or residual, iterations."""

    weights: Tensor
    gap: float = 0.0
    iterations: int = 0


class Definition(NamedTuple):
    """A solver in plain PyTorch, and what it is called with, as in its header.

    Attributes:
        answer: solves one problem.
        num_options: the length of ``options``.
        needs_rng: whether these options need an rng state.
        state_doubles: how many numbers it keeps of a problem of K tasks.
        scale_free: whether the weights are the same for G and c^2 G.
        gap_of_gram: whether the gap is in units of the Gram matrix; else it has no unit.
    """

    answer: Callable[[Problem], Answer]
    num_options: int
    needs_rng: Callable[[Sequence[float]], bool]
    state_doubles: Callable[[int], int]
    scale_free: bool
    gap_of_gram: bool


DEFINITIONS: dict[str, Definition] = {}
"""By the name of the solver."""


def defines(
    solver: str,
    *,
    num_options: int,
    needs_rng: Callable[[Sequence[float]], bool] = lambda options: False,
    state_doubles: Callable[[int], int] = lambda num_tasks: 0,
    scale_free: bool = True,
    gap_of_gram: bool = False,
) -> Callable[[Callable[[Problem], Answer]], Callable[[Problem], Answer]]:
    """Registers the decorated function as the definition of a solver; see `Definition` for the arguments."""

    def register(answer: Callable[[Problem], Answer]) -> Callable[[Problem], Answer]:
        DEFINITIONS[solver] = Definition(answer, num_options, needs_rng, state_doubles, scale_free, gap_of_gram)
        return answer

    return register


def check(call: SolverCall, num_tasks: int) -> Definition:
    """The definition of the solver. Raise as the compiled backends do where the call does not fit it."""
    found = DEFINITIONS.get(call.solver)
    if found is None:
        raise ValueError(f"unknown solver {call.solver!r}; expected one of {', '.join(sorted(DEFINITIONS))}")
    if len(call.options) != found.num_options:
        raise ValueError(f"solver {call.solver!r} takes {found.num_options} options, found {len(call.options)}")
    if call.rng is None and found.needs_rng(call.options):
        raise ValueError(f"solver {call.solver!r} needs an rng state with these options")
    kept, given = found.state_doubles(num_tasks), 0 if call.state is None else call.state.shape[-1]
    if given != kept:
        raise ValueError(f"solver {call.solver!r} keeps a state of {kept} numbers for {num_tasks} tasks, found {given}")
    return found


def solve(call: SolverCall, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``[..., K]`` and certificates ``[..., 2]`` of ``gram`` ``[..., K, K]``, float64, on its device.

    A problem without active tasks gets weights 0; one that is not finite 1 / n for each of n, and the gap nan.

    Raises:
        ValueError: a call that does not fit the solver, or weights that float64 does not hold for a finite Gram matrix.
    """
    lead, num_tasks = gram.shape[:-2], gram.shape[-1]
    definition = check(call, num_tasks)
    problems = gram.cpu().reshape(-1, num_tasks, num_tasks)
    active = torch.ones(num_tasks, dtype=torch.bool, device="cpu") if call.active is None else call.active.cpu()
    active = active.expand(*lead, num_tasks).reshape(-1, num_tasks)
    inputs = None if call.inputs is None else call.inputs.cpu().expand(*lead, num_tasks).reshape(-1, num_tasks)
    rng = None if call.rng is None else call.rng.cpu()
    states = None if call.state is None else call.state.to("cpu", copy=True).reshape(problems.shape[0], -1)
    weights = problems.new_zeros(problems.shape[:2])
    certificate = problems.new_zeros((problems.shape[0], 2))
    for index, problem in enumerate(problems):
        tasks = active[index].nonzero().flatten()
        if len(tasks) == 0:
            continue
        among = problem[tasks][:, tasks]
        if not among.isfinite().all():
            weights[index, tasks] = 1.0 / len(tasks)
            certificate[index, 0] = torch.nan
            continue
        own = None if inputs is None else inputs[index][tasks]
        state = None if states is None else states[index]
        found = definition.answer(Problem(among, tasks.tolist(), num_tasks, index, call.options, rng, own, state))
        if not found.weights.isfinite().all():
            raise ValueError(
                f"solver {call.solver!r} has no finite weights for problem {index} although its Gram matrix is finite: "
                "the norms of its rows differ too much for float64; scale the losses to similar sizes"
            )
        weights[index, tasks] = found.weights
        certificate[index] = torch.tensor([found.gap, found.iterations], dtype=torch.float64, device="cpu")
    if call.state is not None and states is not None:
        call.state.copy_(states.view(call.state.shape))
    return weights.reshape(*lead, num_tasks).to(gram.device), certificate.reshape(*lead, 2).to(gram.device)
