"""The compiled CPU backend: hands addresses to the extension module `mtl_kernels._cpu`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..call import ColumnCall, SolverCall, StateCall
from ..rows import DTYPE_CODES, RowTable

_cpu: Any = None
_reason: str | None = None
try:
    _cpu = importlib.import_module("mtl_kernels._cpu")
except ModuleNotFoundError:
    _reason = (
        "the extension module mtl_kernels._cpu was not built; install a C++17 compiler (g++ 9 or clang++ 9 or newer) "
        "and reinstall mtl-kernels"
    )
except ImportError as error:
    _reason = f"the extension module mtl_kernels._cpu does not load ({error}); reinstall mtl-kernels"


class CpuBackend:
    """SIMD kernels chosen at run time for this processor, on as many threads as torch uses."""

    name = "cpu"
    fused = False

    def missing(self) -> str | None:
        return _reason

    def refusal(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "it runs on cpu tensors"

    def automatic_on(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def gram_into(self, table: RowTable, groups: Sequence[int], out: Tensor) -> None:
        _cpu.gram(
            table.pointers,
            table.numels,
            table.codes,
            groups,
            table.num_tasks,
            out.shape[0],
            out.data_ptr(),
            torch.get_num_threads(),
        )

    def combine_into(
        self,
        table: RowTable,
        weights: Tensor,
        groups: Sequence[int],
        out: Sequence[Tensor | None],
        accumulate: bool = False,
    ) -> None:
        _cpu.combine(
            table.pointers,
            table.numels,
            table.codes,
            groups,
            table.num_tasks,
            weights.data_ptr(),
            [0 if tensor is None else tensor.data_ptr() for tensor in out],
            [0 if tensor is None else DTYPE_CODES[tensor.dtype] for tensor in out],
            accumulate,
            torch.get_num_threads(),
        )

    def reduce_columns_into(self, table: RowTable, call: ColumnCall, out: Sequence[Tensor | None]) -> None:
        _cpu.reduce_columns(
            table.pointers,
            table.numels,
            table.codes,
            table.num_tasks,
            call.code,
            call.trim,
            0 if call.leak is None else call.leak.data_ptr(),
            0 if call.rng is None else call.rng.data_ptr(),
            [0 if tensor is None else tensor.data_ptr() for tensor in out],
            torch.get_num_threads(),
        )

    def update_state(
        self, table: RowTable, state: RowTable, call: StateCall, groups: Sequence[int], sums: Tensor
    ) -> None:
        _cpu.update_state(
            state.pointers,
            state.numels,
            state.codes,
            table.pointers,
            table.codes,
            groups,
            state.num_tasks,
            sums.shape[0],
            call.code,
            0 if call.keep is None else call.keep.data_ptr(),
            call.gain.data_ptr(),
            call.epsilon,
            sums.data_ptr(),
            torch.get_num_threads(),
        )

    def solve(self, call: SolverCall, gram: Tensor) -> tuple[Tensor, Tensor | None]:
        shape = gram.shape
        num_tasks = shape[-1]
        if len(shape) == 2:
            batch = 1
            weights = gram.new_empty(num_tasks)
            certificate = gram.new_empty(2) if call.certified else None
        else:
            batch = math.prod(shape[:-2])
            weights = gram.new_empty(shape[:-1])
            certificate = gram.new_empty((*shape[:-2], 2)) if call.certified else None
        active, rng, inputs, state = call.active, call.rng, call.inputs, call.state
        _cpu.solve(
            call.solver,
            batch,
            num_tasks,
            gram.data_ptr(),
            0 if active is None else active.data_ptr(),
            0 if active is None or active.dim() == 1 else num_tasks,
            0 if rng is None else rng.data_ptr(),
            call.options,
            0 if inputs is None else inputs.data_ptr(),
            0 if inputs is None or inputs.dim() == 1 else num_tasks,
            0 if state is None else state.data_ptr(),
            0 if state is None else state.shape[-1],
            weights.data_ptr(),
            0 if certificate is None else certificate.data_ptr(),
            1 if batch == 1 else torch.get_num_threads(),
        )
        return weights, certificate


def instruction_set() -> str | None:
    """The SIMD instruction set the kernels run with on this processor, None if they were not built."""
    return None if _cpu is None else _cpu.instruction_set()
