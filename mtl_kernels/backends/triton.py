"""The Triton backend: GPUs of any maker, without a compiled extension; see `mtl_kernels.triton_kernels`.

Triton is imported on first use. Solvers without a Triton kernel run on the host, see `backends.host`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..call import ColumnCall, SolverCall, StateCall
from ..definitions import solving
from ..rows import RowTable
from . import host

SOLVERS = ("min_norm", "pcgrad")
"""Those that have a kernel."""

_OLDEST_NVIDIA = (7, 0)
_OLDEST_TRITON = (3, 5)
"""The first whose `tl.dot` multiplies float64."""


@functools.cache
def _kernels(name: str) -> Any:
    return importlib.import_module(f"mtl_kernels.triton_kernels.{name}")


def _too_old(version: str) -> str | None:
    if tuple(map(int, version.split(".")[:2])) >= _OLDEST_TRITON:
        return None
    oldest = ".".join(map(str, _OLDEST_TRITON))
    return f"expected triton {oldest} or newer, found {version}; it comes with torch 2.9 or newer: use a newer torch"


@functools.cache
def _import_error() -> str | None:
    try:
        if (reason := _too_old(importlib.import_module("triton").__version__)) is not None:
            return reason
        for name in ("common", "gram", "combine", "state", *SOLVERS):
            _kernels(name)
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return (
                "the package triton is not installed; pip install triton (it is part of the GPU builds of torch for "
                "Linux)"
            )
        return f"the package triton does not load ({error}); install what it misses, or reinstall it"
    except Exception as error:  # whatever the body of a module raises: a broken triton stops no other backend
        return f"the package triton does not load ({type(error).__name__}: {error}); reinstall it"
    return None


def _missing_compiler() -> str | None:
    """None if what Triton compiles its launchers with, when a kernel first runs, is there; looked for as it does."""
    if os.name != "posix" or importlib.import_module("triton").knobs.build.impl is not None:
        return None
    needs = "triton compiles its launchers with a C compiler when a kernel first runs"
    named = os.environ.get("CC")
    if named is not None and shutil.which(named) is None:
        return f"{needs}, and CC names {named!r}, which is not there; set it to a compiler, without options"
    if named is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return f"{needs}, and there is none; install gcc or clang, or set CC to one"
    scheme = sysconfig.get_default_scheme()
    headers = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    if not os.path.exists(os.path.join(headers, "Python.h")):
        return f"{needs}, and it needs Python.h in {headers}; install Python's headers (python3-dev)"
    return None


class TritonBackend:
    """Kernels compiled on first use for the GPU at hand; on a CPU only in Triton's interpreter, for tests."""

    name = "triton"
    fused = False

    def missing(self) -> str | None:
        no_gpu = (
            "torch finds no GPU; on a CPU the kernels run only in Triton's interpreter, for tests: "
            "set TRITON_INTERPRET=1 before triton is imported"
        )
        # Where nothing could come of it, triton is not imported: the automatic choice asks here on every machine.
        idle = "triton" not in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
        if idle and not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
            return no_gpu
        if (reason := _import_error()) is not None:
            return reason
        if _kernels("common").INTERPRETED:
            return None
        return _missing_compiler() if torch.cuda.is_available() else no_gpu

    def refusal(self, device: torch.device) -> str | None:
        expected = "cpu" if _kernels("common").INTERPRETED else "cuda"
        if device.type != expected:
            return f"it runs on {expected} tensors" + (" in the interpreter" if expected == "cpu" else "")
        if expected == "cuda" and torch.version.hip is None:
            capability = torch.cuda.get_device_capability(device)
            if capability < _OLDEST_NVIDIA:
                return "triton needs compute capability {}.{} or newer, this GPU has {}.{}".format(
                    *_OLDEST_NVIDIA, *capability
                )
        return None

    def automatic_on(self, device: torch.device) -> bool:
        """Never the interpreter, which is there to be asked for by name."""
        return device.type == "cuda"

    def gram_into(self, table: RowTable, groups: Sequence[int], out: Tensor) -> None:
        with _on(table.device):
            _kernels("gram").gram_into(table, groups, out)

    def combine_into(
        self,
        table: RowTable,
        weights: Tensor,
        groups: Sequence[int],
        out: Sequence[Tensor | None],
        accumulate: bool = False,
    ) -> None:
        with _on(table.device):
            _kernels("combine").combine_into(table, weights, groups, out, accumulate)

    def reduce_columns_into(self, table: RowTable, call: ColumnCall, out: Sequence[Tensor | None]) -> None:
        with _on(table.device):
            _kernels("combine").reduce_columns_into(table, call, out)

    def update_state(
        self, table: RowTable, state: RowTable, call: StateCall, groups: Sequence[int], sums: Tensor
    ) -> None:
        with _on(state.device):
            _kernels("state").update_state(table, state, call, groups, sums)

    def solve(self, call: SolverCall, gram: Tensor) -> tuple[Tensor, Tensor | None]:
        solving.check(call, gram.shape[-1])
        if call.solver not in SOLVERS:
            return host.solve(call, gram)
        weights = gram.new_empty(gram.shape[:-1])
        certificate = gram.new_zeros((*gram.shape[:-2], 2))
        if weights.numel() > 0:
            with _on(gram.device):
                _kernels(call.solver).solve(weights, certificate, gram, call)
        return weights, certificate


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
