"""Who is measured on a GPU: for every kernel its providers, how each is called, and what its error is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import mtl_kernels as mk
from mtl_kernels import dispatch, ops
from mtl_kernels.backends import BACKENDS

from . import checks, peers
from .device import Call
from .plan import Case
from .results import OURS

SOLVERS: dict[str, tuple[str, tuple[float, ...]]] = {
    "pcgrad": ("pcgrad", (1.0, 0.0)),
    "min_norm": ("min_norm", (0.0, 0.0, 0.0)),
    "frank_wolfe": ("min_norm", (1.0, 250.0, 1e-6)),
}
"""Kernel names, and the solver with the options that each runs."""

STEPS = {"pcgrad_step": "pcgrad", "mgda_step": "min_norm"}
FUSED = {"gram_pcgrad": "pcgrad", "gram_min_norm": "min_norm"}

_SMALL = 10_000_000
_BASELINE = 2_000_000_000
_LOOP = 10_000_000_000
_OTHERS = ("triton", "reference")
_TRITON_TASKS = (2, 8, 32, 128)
_REFERENCE_TASKS = 16


@dataclass(frozen=True)
class Inputs:
    """One set of rows with the memory that its results go to."""

    rows: Tensor
    out: Tensor
    weights: Tensor
    rng: Tensor


@dataclass(frozen=True)
class Provider:
    """One way to compute a kernel: makes a call for a set of inputs, tells its error and the most that is accepted.

    What waits for the device, as the solvers of the reference and the published loops do, cannot be captured.
    """

    name: str
    make: Callable[[Inputs], Call]
    error: Callable[[Inputs], float]
    limit: float
    capturable: bool = True


def make_weights(num_tasks: int, device: torch.device) -> Tensor:
    """Weights of both signs, every seventh from the third on zero, exact in every dtype."""
    return (5 * torch.arange(num_tasks, dtype=torch.float64, device=device) % 7 - 3) / 4


def our_backends(case: Case, device: torch.device) -> dict[str, str | None]:
    """Provider name and backend: the automatic choice, and what else runs there and is affordable."""
    auto = dispatch.resolve(device, None).name
    found: dict[str, str | None] = {OURS: None}
    for name, backend in BACKENDS.items():
        if name == auto or name not in _OTHERS or backend.missing() is not None or backend.refusal(device) is not None:
            continue
        if name == "triton" and (case.num_tasks not in _TRITON_TASKS or device.type == "cpu"):
            continue
        if name == "reference" and (case.num_tasks > _REFERENCE_TASKS or case.num_tasks * case.num_columns > _SMALL):
            continue
        found[f"{OURS} {name}"] = name
    return found


def backend_of(provider: str, device: torch.device) -> str:
    """The backend behind a provider's name; empty for those that are not ours."""
    if provider == OURS:
        return dispatch.resolve(device, None).name
    return provider.removeprefix(f"{OURS} ") if provider.startswith(f"{OURS} ") else ""


def providers(case: Case, exact: Tensor, device: torch.device) -> list[Provider]:
    """Everything that computes the kernel of a case; ``exact`` is the Gram matrix of the rows that are checked."""
    if case.kernel == "gram":
        return _gram(case, exact, device)
    if case.kernel == "combine":
        return _combine(case, device)
    if case.kernel in FUSED:
        return _gram_solve(case, exact, device)
    return _step(case, exact, device)


def _gram(case: Case, exact: Tensor, device: torch.device) -> list[Provider]:
    num_tasks, dtype = case.num_tasks, case.dtype

    def provider(name: str, function: Callable[[Tensor], Tensor], limit: float) -> Provider:
        return Provider(
            name,
            lambda inputs: functools.partial(function, inputs.rows),
            lambda inputs: checks.gram_error(function(inputs.rows), exact),
            limit,
        )

    found = [
        provider(name, functools.partial(mk.gram, backend=backend), checks.gram_limit(True, num_tasks, dtype))
        for name, backend in our_backends(case, device).items()
    ]
    if case.num_tasks * case.num_columns > _BASELINE:
        return found
    loose = checks.gram_limit(False, num_tasks, dtype)
    found.append(provider("torch.mm", lambda rows: torch.mm(rows, rows.T), loose))
    if dtype is torch.bfloat16 and device.type == "cuda":
        wide = functools.partial(torch.mm, out_dtype=torch.float32)
        found.append(provider("torch.mm float32 out", lambda rows: wide(rows, rows.T), loose))
    found.append(
        Provider(
            "torch._foreach_norm, norms only",
            lambda inputs: functools.partial(torch._foreach_norm, list(inputs.rows.unbind())),
            lambda inputs: _norm_error(torch._foreach_norm(list(inputs.rows.unbind())), exact),
            1e-2 if dtype.itemsize < 4 else 1e-4,
        )
    )
    return found


def _norm_error(found: tuple[Tensor, ...] | list[Tensor], exact: Tensor) -> float:
    length = mk.norms(exact)
    return float(((torch.stack(list(found)).double() - length).abs() / length).max())


def _combine(case: Case, device: torch.device) -> list[Provider]:
    num_tasks, dtype = case.num_tasks, case.dtype

    def provider(name: str, function: Callable[[Inputs], object], ours: bool) -> Provider:
        def error(inputs: Inputs) -> float:
            inputs.out.fill_(math.nan)
            function(inputs)
            if not inputs.out.isfinite().all():
                return math.inf
            return checks.combine_error(inputs.out, inputs.rows, inputs.weights)

        limit = checks.combine_limit(ours, num_tasks, dtype)
        return Provider(name, lambda inputs: functools.partial(function, inputs), error, limit)

    def ours(backend: str | None) -> Callable[[Inputs], object]:
        return lambda inputs: mk.combine(inputs.rows, inputs.weights, out=inputs.out, backend=backend)

    found = [provider(name, ours(backend), True) for name, backend in our_backends(case, device).items()]
    if case.num_tasks * case.num_columns <= _BASELINE:
        narrow = make_weights(num_tasks, device).to(dtype)
        found.append(provider("torch.mv", lambda i: torch.mv(i.rows.T, narrow, out=i.out), False))
        row = narrow[None]
        found.append(provider("torch.mm", lambda i: torch.mm(row, i.rows, out=i.out[None]), False))
    return found


def _gram_solve(case: Case, exact: Tensor, device: torch.device) -> list[Provider]:
    kernel = FUSED[case.kernel]
    solver, options = SOLVERS[kernel]

    def provider(name: str, backend: str | None) -> Provider:
        def call(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
            return mk.gram_solve(inputs.rows, mk.SolverCall(solver, options, rng=inputs.rng), backend=backend)

        def error(inputs: Inputs) -> float:
            gram, weights, _ = call(inputs)
            limit = checks.gram_limit(True, case.num_tasks, case.dtype)
            if not checks.gram_error(gram, exact) <= limit:
                return math.inf
            return solver_error(kernel, weights, gram, inputs.rng)

        limit, graph = solver_limit(kernel), backend != "reference"
        return Provider(name, lambda inputs: functools.partial(call, inputs), error, limit, graph)

    return [provider(name, backend) for name, backend in our_backends(case, device).items()]


def solver_error(kernel: str, weights: Tensor, gram: Tensor, rng: Tensor, problem: int = 0) -> float:
    """The error of one problem's weights for the Gram matrix that they were found from."""
    if kernel == "pcgrad":
        orders = checks.our_orders(rng, gram.shape[0], problem)
        return checks.weights_error(weights, checks.pcgrad_weights(gram, orders))
    return checks.min_norm_error(weights, gram)


def solver_limit(kernel: str) -> float:
    return {"pcgrad": 1e-10, "min_norm": 1e-9, "frank_wolfe": 1e-2}[kernel]


def _step(case: Case, exact: Tensor, device: torch.device) -> list[Provider]:
    kernel = STEPS[case.kernel]
    solver, options = SOLVERS[kernel]

    @functools.cache
    def expected(rng: Tensor) -> Tensor:
        if kernel == "pcgrad":
            return checks.pcgrad_weights(exact, checks.our_orders(rng, case.num_tasks))
        return checks.min_norm_weights(exact)[0]

    def ours(name: str, backend: str | None) -> Provider:
        def call(inputs: Inputs) -> None:
            call = mk.SolverCall(solver, options, rng=inputs.rng)
            weights = mk.gram_solve(inputs.rows, call, backend=backend)[1]
            mk.combine(inputs.rows, weights, out=inputs.out, backend=backend)

        def error(inputs: Inputs) -> float:
            inputs.out.fill_(math.nan)
            call(inputs)
            if not inputs.out.isfinite().all():
                return math.inf
            return checks.direction_error(inputs.out, inputs.rows, expected(inputs.rng))

        graph = backend != "reference"
        limit = 1e-5 if case.dtype is torch.float32 else 1e-2
        return Provider(name, lambda inputs: functools.partial(call, inputs), error, limit, graph)

    found = [ours(name, backend) for name, backend in our_backends(case, device).items()]
    if case.dtype is torch.float32 and case.num_tasks**2 * case.num_columns <= _LOOP and case.num_tasks <= 16:
        found += _peers(case, expected)
    return found


def _peers(case: Case, expected: Callable[[Tensor], Tensor]) -> list[Provider]:
    """Public ways to take the step; they wait for the device, so that no graph can hold them."""
    found = []
    if case.kernel == "pcgrad_step":
        found.append(
            Provider(
                "torch PCGrad loop",
                lambda inputs: functools.partial(peers.pcgrad_loop, inputs.rows),
                lambda inputs: peers.pcgrad_loop_error(inputs.rows),
                1e-3,
                capturable=False,
            )
        )
    else:
        found.append(
            Provider(
                "torch frank_wolfe loop",
                lambda inputs: lambda: peers.frank_wolfe_loop(inputs.rows @ inputs.rows.T) @ inputs.rows,
                lambda inputs: checks.direction_error(
                    peers.frank_wolfe_loop(inputs.rows @ inputs.rows.T) @ inputs.rows,
                    inputs.rows,
                    expected(inputs.rng),
                ),
                2e-2,
                capturable=False,
            )
        )
    aggregator = peers.torchjd(case.kernel)
    if aggregator is None:
        return found

    def error(inputs: Inputs) -> float:
        if case.kernel == "pcgrad_step":
            return peers.torchjd_step_error(aggregator, inputs.rows)
        return checks.direction_error(aggregator(inputs.rows), inputs.rows, expected(inputs.rng))

    make = functools.partial(functools.partial, aggregator)
    limit = 1e-3 if case.kernel == "pcgrad_step" else 2e-2
    return [*found, Provider("torchjd", lambda inputs: make(inputs.rows), error, limit, capturable=False)]


def solver_calls(kernel: str, gram: Tensor, rng: Tensor) -> dict[str, tuple[Call, Callable[[], Tensor], bool]]:
    """For every provider of a solver the call, its weights, and whether a graph can hold it."""
    solver, options = SOLVERS[kernel]
    batch = gram.shape[0] if gram.dim() == 3 else 1
    found: dict[str, tuple[Call, Callable[[], Tensor], bool]] = {}

    def add(name: str, backend: str | None) -> None:
        def call() -> Tensor:
            return ops.solve(gram, mk.SolverCall(solver, options, rng=rng), backend=backend)[0]

        found[name] = (call, call, backend != "reference")

    for name, backend in our_backends(Case(kernel, gram.shape[-1], 0, torch.float64), gram.device).items():
        if backend != "reference" or (kernel == "pcgrad" and gram.shape[-1] <= 32):
            add(name, backend)
    if batch == 1 and (weighting := peers.torchjd("min_norm" if kernel == "frank_wolfe" else kernel)) is not None:
        found["torchjd"] = (lambda: weighting(gram), lambda: weighting(gram), False)
    return found
