"""The weightings of TorchJD and LibMTL on a Gram matrix or on rows, where they are installed.

Their public classes, called as they are; what LibMTL takes from a trainer is filled in here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Peer(NamedTuple):
    """A class of a library: its name, and the options that make its definition ours."""

    name: str
    options: Mapping[str, Any] = {}


TORCHJD = {
    "alignedmtl": Peer("AlignedMTLWeighting"),
    "cagrad": Peer("CAGradWeighting", {"c": 0.4}),
    "dualproj": Peer("DualProjWeighting"),
    "fairgrad": Peer("FairGradWeighting", {"alpha": 1.0}),
    "gradvac": Peer("GradVacWeighting"),
    "imtlg": Peer("IMTLGWeighting"),
    "krum": Peer("KrumWeighting", {"n_byzantine": 1}),
    "mean": Peer("MeanWeighting"),
    "mgda": Peer("MGDAWeighting"),
    "modo": Peer("MoDoWeighting"),
    "pcd": Peer("PCDWeighting"),
    "pcgrad": Peer("PCGradWeighting"),
    "randomweights": Peer("RandomWeighting"),
    "sdmgrad": Peer("SDMGradWeighting"),
    "sum": Peer("SumWeighting"),
    "upgrad": Peer("UPGradWeighting"),
}
TORCHJD_ON_ROWS = {
    "config": Peer("ConFIG"),
    "graddrop": Peer("GradDrop"),
    "nashmtl": Peer("NashMTL"),
    "trimmedmean": Peer("TrimmedMean", {"trim_number": 1}),
}
LIBMTL = {
    "cagrad": Peer("CAGrad", {"calpha": 0.4, "rescale": 0}),
    "gradvac": Peer("GradVac", {"beta": 0.5}),
    "mgda": Peer("MGDA", {"mgda_gn": "none"}),
    "pcgrad": Peer("PCGrad"),
}


def torchjd(method: str, gram: Tensor, rows: Tensor) -> Callable[[], object] | None:
    """A call of TorchJD's counterpart of a method; None where there is none, or it is not installed."""
    on_gram, on_rows = TORCHJD.get(method), TORCHJD_ON_ROWS.get(method)
    peer = on_gram or on_rows
    if peer is None or importlib.util.find_spec("torchjd") is None:
        return None
    module = importlib.import_module("torchjd.aggregation")
    found = getattr(module, peer.name, None)
    if found is None:
        return None
    options = dict(peer.options)
    if peer.name == "NashMTL":
        options["n_tasks"] = len(rows)
    try:
        made = found(**options)
    except (ImportError, NameError):  # an extra that the class needs is not there: then the class is not either
        return None
    given = gram if on_gram is not None else rows
    return lambda: made(given)


def libmtl(method: str, rows: Tensor) -> Callable[[], object] | None:
    """A call of LibMTL's counterpart on rows; None where there is none, or it is not installed."""
    peer = LIBMTL.get(method)
    if peer is None or (module := libmtl_weightings()) is None or not hasattr(module, peer.name):
        return None
    num_tasks = len(rows)

    class OnRows(getattr(module, peer.name)):  # type: ignore[misc]
        """The weighting with rows that are there instead of those of a model."""

        def _compute_grad_dim(self) -> None:
            self.grad_index, self.grad_dim = [rows.shape[1]], rows.shape[1]

        def _compute_grad(self, losses: object, mode: str, rep_grad: bool = False) -> Tensor:
            return rows.clone()

        def _reset_grad(self, new_grads: Tensor) -> None:
            self.found = new_grads

    made = OnRows()
    made.task_num, made.device, made.rep_grad, made.epoch = num_tasks, rows.device, False, 0
    made.task_name = [str(k) for k in range(num_tasks)]
    made.init_param()
    losses = torch.ones(num_tasks, dtype=rows.dtype)
    return lambda: made.backward(losses, **peer.options)


def libmtl_weightings() -> Any:
    """LibMTL's weightings without the models beside them, whose import needs an old torchvision."""
    if "LibMTL" not in sys.modules:
        if (spec := importlib.util.find_spec("LibMTL")) is None:
            return None
        sys.modules["LibMTL"] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module("LibMTL.weighting")
    except ImportError:  # what it needs in turn is not there: then the library is not either
        return None
