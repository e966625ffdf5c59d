"""TorchJD and LibMTL as they are trained with: the same model, data, seed and Adam, their own passes and combination.

TorchJD takes its `mtl_backward` where all heads read one tensor of features, else its `backward` for the shared
parameters, and a pass for the others. LibMTL's weightings are called with the losses, as its trainer does; what they
take from a model is filled in here.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import libraries
from ..workloads import registry
from ..workloads.workload import Objective, Workload
from .jobs import Job, recipe
from .steppers import Combined, Plain, Seconds, add_auxiliary, shared_of

KNOWN = {"torchjd": libraries.TORCHJD | libraries.TORCHJD_ON_ROWS, "libmtl": libraries.LIBMTL}
"""By peer and method, what its counterpart is."""
RANDOM = ("pcgrad", "gradvac", "randomweights", "graddrop")
"""Methods that draw an order or weights: with more than two tasks two libraries have no common result."""
WARM = 20
"""Plain steps before gradients are compared: at the start tasks hardly differ."""


def available(methods: list[str]) -> list[str]:
    """Specs of the peers' counterparts of some of our methods, where they are installed."""
    found = []
    if importlib.util.find_spec("torchjd") is not None:
        found += [f"torchjd/{name}" for name in methods if name in KNOWN["torchjd"]]
    if libraries.libmtl_weightings() is not None:
        found += [f"libmtl/{name}" for name in methods if name in KNOWN["libmtl"]]
    return found


def make(spec: str, workload: Workload, seed: int) -> TorchJD | LibMTL:
    """A stepper.

    Raises:
        ValueError: an unknown peer or method. ImportError: it is not installed.
    """
    check(spec)
    peer, _, method = spec.partition("/")
    return TorchJD(workload, method) if peer == "torchjd" else LibMTL(workload, method)


def check(spec: str) -> None:
    """Raise ValueError for an unknown peer, or a method of which no counterpart is known."""
    peer, _, method = spec.partition("/")
    if peer not in KNOWN:
        raise ValueError(f"unknown peer {peer!r} in {spec!r}; expected {' or '.join(KNOWN)}")
    if method not in KNOWN[peer]:
        raise ValueError(
            f"{peer} has no counterpart of {method!r} that is known here; {', '.join(sorted(KNOWN[peer]))} have"
        )


class Peer:
    """A library's way to the gradients of a step, in front of Adam."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.optimizer: Optimizer = torch.optim.Adam(workload.param_groups(), lr=workload.learning_rate)
        self.shared, self.own, _ = shared_of(workload, workload.batch(0))

    def step(self, number: int) -> Seconds:
        batch = self.workload.batch(number)
        self.optimizer.zero_grad()
        begin = perf_counter()
        objective = self.workload.objective(batch)
        computed = perf_counter()
        add_auxiliary(objective)
        captured = self.combine(objective)
        combined = perf_counter()
        self.optimizer.step()
        return Seconds(computed - begin, captured - computed, combined - captured, perf_counter() - combined)

    def combine(self, objective: Objective) -> float:
        """Leaves the combination in ``.grad``; when the gradients of the tasks were there."""
        raise NotImplementedError

    def monitor(self, steps: int) -> None:
        return None


class TorchJD(Peer):
    """`torchjd.autojac`, and one of its aggregators."""

    def __init__(self, workload: Workload, method: str) -> None:
        from torchjd import aggregation, autojac  # type: ignore[import-not-found]

        super().__init__(workload)
        found = KNOWN["torchjd"][method]
        options = dict(found.options) | ({"n_tasks": len(workload.tasks)} if found.name == "NashMTL" else {})
        self._autojac, self._aggregator = autojac, getattr(aggregation, found.name.removesuffix("Weighting"))(**options)

    def combine(self, objective: Objective) -> float:
        losses = list(objective.losses.values())
        if not self.shared:
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            return perf_counter()
        if objective.features is not None:
            self._autojac.mtl_backward(losses, features=objective.features, shared_params=self.shared)
        else:
            self._autojac.backward(losses, inputs=self.shared, retain_graph=bool(self.own))
            if self.own:
                torch.autograd.backward(torch.stack(losses).sum(), inputs=self.own)
        captured = perf_counter()
        self._autojac.jac_to_grad(self.shared, self._aggregator)
        return captured


class LibMTL(Peer):
    """One of LibMTL's weightings, with what it takes from a model."""

    def __init__(self, workload: Workload, method: str) -> None:
        super().__init__(workload)
        module, found = libraries.libmtl_weightings(), KNOWN["libmtl"][method]
        if module is None:
            raise ImportError("LibMTL, or what it needs, is not installed")
        self._options = dict(found.options)
        self._weighting = _with_model(getattr(module, found.name), self.shared, workload)

    def combine(self, objective: Objective) -> float:
        losses = torch.stack(list(objective.losses.values()))
        if not self.shared:
            losses.sum().backward()  # type: ignore[no-untyped-call]
            return perf_counter()
        before = [None if param.grad is None else param.grad.clone() for param in self.shared]
        for param in self.shared:  # its rows are what lies in .grad
            param.grad = None
        self._weighting.backward(losses, **self._options)
        for param, grad in zip(self.shared, before, strict=True):
            if grad is not None and param.grad is not None:
                param.grad += grad
        captured: float = self._weighting.captured
        return captured


def _with_model(weighting: type, shared: Sequence[Tensor], workload: Workload) -> Any:
    """An instance whose model is ``shared``."""

    class OnModel(weighting):  # type: ignore[misc]
        captured = 0.0

        def get_share_params(self) -> Sequence[Tensor]:
            return shared

        def zero_grad_share_params(self) -> None:
            for param in shared:
                if param.grad is not None:
                    param.grad.zero_()

        def _compute_grad(self, losses: Tensor, mode: str, rep_grad: bool = False) -> Any:
            found = super()._compute_grad(losses, mode, rep_grad)
            self.captured = perf_counter()
            return found

    made = OnModel()
    device = next(workload.model.parameters()).device
    made.task_num, made.device, made.rep_grad, made.epoch = len(workload.tasks), device, False, 0
    made.task_name = [task.name for task in workload.tasks]
    made.init_param()
    return made


def agreement(job: Job) -> dict[str, Any]:
    """Columns: how far a peer's combination is from ours after some plain steps, for the same batch.

    "apart" is the distance of the two directions, each of length 1, over the shared parameters; "longer" the ratio of
    the peer's length to ours. Empty where nothing is shared or two random methods have no common result.
    """
    method = job.method.partition("/")[2]
    workload = registry.build(job.workload, job.seed)
    if method in RANDOM and len(workload.tasks) > 2:
        return {"note": "random"}
    plain = Plain(workload)
    for number in range(WARM):
        plain.step(number)
    peer = make(job.method, workload, job.seed)
    if not peer.shared:
        return {"note": "nothing is shared"}
    ours = Combined(workload, recipe(Job(job.workload, method, job.seed, 1, 1), [t.name for t in workload.tasks]))

    def gradient(combine: Callable[[Objective], object]) -> Tensor:
        plain.optimizer.zero_grad()
        combine(workload.objective(workload.batch(WARM)))
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in peer.shared]
        return torch.cat([grad.flatten().double() for grad in grads])

    mine, theirs = gradient(lambda o: ours.optimizer.backward(o.losses)), gradient(peer.combine)
    apart = float(torch.dist(mine / mine.norm(), theirs / theirs.norm()))
    return {"apart": apart, "longer": float(theirs.norm() / mine.norm())}
