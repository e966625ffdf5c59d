"""The compiled CUDA kernels: gram with the solver behind it in one launch, combine with its epilogues in another.

What a launch needs besides the rows is kept per device and stream: the plan of a set of sizes, the table of addresses
(copied to the device only when one changed), and the workspace. Threads that share a stream take turns, from the plan
to the last of a call's launches. A CUDA graph may be replayed beside other work, so while one is captured a launch gets
memory of its own, filled at once instead of by the graph: a replay is the kernels alone.
"""

from __future__ import annotations

import functools
import importlib
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import ColumnCall, SolverCall, StateCall
from ..rows import DTYPE_CODES, RowTable
from ..uploads import Cache, capturing, on_host, packed

_cuda: Any = None
_reason: str | None = None
try:
    _cuda = importlib.import_module("mtl_kernels._cuda")
except ModuleNotFoundError:
    _reason = (
        "the extension module mtl_kernels._cuda was not built; install the CUDA toolkit (nvcc 12.0 or newer) and "
        "reinstall mtl-kernels from source with MTL_KERNELS_CUDA=1"
    )
except ImportError as error:
    _reason = f"the extension module mtl_kernels._cuda does not load ({error}); reinstall mtl-kernels"


class _Launch(NamedTuple):
    """What a launch needs beside its results: a plan, and tables on the device, which it keeps alive."""

    plan: Any
    addresses: tuple[int, ...]
    memory: tuple[Any, ...]


class _Stream:
    """What is kept for launches on one stream of one device; to be used by who holds its lock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.RLock()
        self._plans = Cache()
        self._tables = Cache()
        self._workspace: dict[torch.dtype, Tensor] = {}

    def upload(self, values: Tensor) -> Any:
        """A copy on the device, without waiting for it. Torch keeps pinned memory until it was read."""
        return values if self.device.type == "cpu" else values.pin_memory().to(self.device, non_blocking=True)

    def table(self, words: bytes, codes: Sequence[int], check: Callable[[bytes, Sequence[int]], None]) -> Any:
        """A table of addresses of elements of these dtypes, checked and copied to the device when it is new.

        The caller holds on to it until its launch: it may not be kept for longer.
        """

        def checked() -> Any:
            check(words, codes)
            return self.upload(on_host(words))

        return self._tables.find((words, tuple(codes)), checked, len(words))

    def plan(self, key: Hashable, make: Callable[[], Any]) -> tuple[Any, Any]:
        """A plan, and its words on the device."""

        def both() -> tuple[Any, Any, int]:
            made = make()
            words: bytes = made.words
            return made, self.upload(on_host(words)), len(words)

        made, words, _ = self._plans.find(key, both, lambda found: found[2])
        return made, words

    def doubles(self, size: int) -> Tensor:
        """float64 workspace of at least ``size``; what is in it means nothing."""
        return self._workspace_of(size, torch.float64)

    def counters(self, size: int) -> Any:
        """int32 zeros, at least ``size``; every launch leaves them zero."""
        return self._workspace_of(size, torch.int32)

    def forget_counters(self) -> None:
        """After a launch that failed: it may have counted some of its blocks."""
        self._workspace.pop(torch.int32, None)

    def _workspace_of(self, size: int, dtype: torch.dtype) -> Tensor:
        found = self._workspace.get(dtype)
        if found is None or found.numel() < size:
            found = self._workspace[dtype] = torch.zeros(max(size, 1), dtype=dtype, device=self.device)
        return found

    def launch_of(self, table: RowTable, kind: str, key: Hashable, make: Callable[[], _Launch]) -> _Launch:
        """What the last launch of a kind over this table needed, if the key is the same; the table keeps it."""
        found = table.kept.get(kind)
        if found is None or found[0] != key:
            found = table.kept[kind] = (key, make())
        launch: _Launch = found[1]
        return launch


class _Capture(_Stream):
    """The same for one launch that goes into a CUDA graph."""

    def __init__(self, device: torch.device, copy: Callable[[int, int, int], Any], kept: list[Any]) -> None:
        super().__init__(device)
        self._copy, self._kept = copy, kept

    def upload(self, values: Tensor) -> Any:
        self._kept.append(self._copy(self.device.index, values.data_ptr(), values.numel() * values.itemsize))
        return self._kept[-1]

    def launch_of(self, table: RowTable, kind: str, key: Hashable, make: Callable[[], _Launch]) -> _Launch:
        return make()

    def doubles(self, size: int) -> Tensor:
        return torch.empty(max(size, 1), dtype=torch.float64, device=self.device)

    def counters(self, size: int) -> Any:
        return self.upload(torch.zeros(size, dtype=torch.int32, device="cpu"))


_WEIGHTED_SUM, _GRADDROP, _LEAKY_GRADDROP, _TRIMMED_MEAN = range(4)
"""What is made of a column, at the numbers that the module knows."""


def _address(memory: Any) -> int:
    """Of a tensor or of a copy made by the module; 0 for None."""
    if memory is None:
        return 0
    return memory.data_ptr() if isinstance(memory, Tensor) else int(memory.address)


class CudaBackend:
    """The kernels of ``csrc/cuda``.

    Args:
        module: the extension module, or the same sources compiled for the host.
        device_type: of the tensors whose memory it works on.
    """

    fused = True

    def __init__(self, name: str = "cuda", module: Any = None, device_type: str = "cuda") -> None:
        self.name = name
        self._module = _cuda if module is None else module
        self._device_type = device_type
        self._missing: str | None = None
        self._asked = False
        self._unsupported: dict[int, str | None] = {}
        self._streams: dict[tuple[int, int], _Stream] = {}
        self._captured: list[Any] = []
        """What captured launches read, about K * P addresses each; no one says when their graph is gone."""

    def missing(self) -> str | None:
        if self._module is None:
            return _reason
        if not self._asked:
            self._missing, self._asked = self._module.missing(), True
        return self._missing

    def refusal(self, device: torch.device) -> str | None:
        if device.type != self._device_type:
            return f"it runs on {self._device_type} tensors"
        index = self._index(device)
        if index not in self._unsupported:
            self._unsupported[index] = self._module.unsupported(index)
        return self._unsupported[index]

    def automatic_on(self, device: torch.device) -> bool:
        return device.type == self._device_type

    def gram_into(self, table: RowTable, groups: Sequence[int], out: Tensor) -> None:
        self._gram(table, groups, out)

    def statistics_into(
        self, table: RowTable, groups: Sequence[int], gram: Tensor, norms: Tensor, cosines: Tensor
    ) -> None:
        self._gram(table, groups, gram, norms, cosines)

    def fuses(self, solver: str) -> bool:
        return solver in self._module.fused_solvers

    def gram_solve_into(
        self, table: RowTable, groups: Sequence[int], gram: Tensor, call: SolverCall
    ) -> tuple[Tensor, Tensor]:
        weights = gram.new_empty(gram.shape[:-1])
        certificate = gram.new_empty((*gram.shape[:-2], 2))
        self._gram(table, groups, gram, solver=self._solver(call, gram, weights, certificate))
        return weights, certificate

    def combine_into(
        self,
        table: RowTable,
        weights: Tensor,
        groups: Sequence[int],
        out: Sequence[Tensor | None],
        accumulate: bool = False,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        self._combine(_WEIGHTED_SUM, table, groups, weights, out, scale, found_inf, accumulate)

    def reduce_columns_into(self, table: RowTable, call: ColumnCall, out: Sequence[Tensor | None]) -> None:
        if call.operation == "trimmed_mean":
            combination = _TRIMMED_MEAN
        else:
            combination = _GRADDROP if call.leak is None else _LEAKY_GRADDROP
        self._combine(combination, table, [0] * table.num_params, call.leak, out, rng=call.rng, trim=call.trim)

    def _combine(
        self,
        combination: int,
        table: RowTable,
        groups: Sequence[int],
        weights: Tensor | None,
        out: Sequence[Tensor | None],
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        accumulate: bool = False,
        rng: Tensor | None = None,
        trim: int = 0,
    ) -> None:
        stream, handle = self._stream(table.device)
        outputs = tuple([-1 if tensor is None else DTYPE_CODES[tensor.dtype] for tensor in out])
        targets = packed([0 if tensor is None else tensor.data_ptr() for tensor in out])
        num_groups = 1 if weights is None or weights.dim() == 1 else weights.shape[0]

        def make() -> _Launch:
            check = functools.partial(self._module.check_aligned, of_outputs=True)
            sizes = (groups, num_groups, outputs, combination)
            return self._prepare(stream, self._module.CombinePlan, table, sizes, stream.table(targets, outputs, check))

        with stream.lock:
            key = (handle, _grouping(groups, num_groups), targets, outputs, combination)
            launch = stream.launch_of(table, "combine", key, make)
            self._module.combine(
                launch.plan,
                *launch.addresses,
                _address(weights),
                _address(scale),
                _address(found_inf),
                accumulate,
                _address(rng),
                trim,
                handle,
            )

    def update_state(
        self, table: RowTable, state: RowTable, call: StateCall, groups: Sequence[int], sums: Tensor
    ) -> None:
        stream, handle = self._stream(state.device)
        num_groups, row_codes = sums.shape[0], tuple(table.codes)

        def make() -> _Launch:
            rows = stream.table(table.addresses, table.codes, self._module.check_aligned)
            return self._prepare(
                stream, self._module.StatePlan, state, (groups, num_groups, row_codes, call.code), rows
            )

        with stream.lock:
            key = (handle, _grouping(groups, num_groups), table.addresses, row_codes, call.code)
            launch = stream.launch_of(state, "state", key, make)
            states, rows, words = launch.addresses
            workspace, counters = stream.doubles(launch.plan.sum_doubles), stream.counters(launch.plan.num_counters)
            try:
                self._module.update_state(
                    launch.plan,
                    rows,
                    states,
                    words,
                    workspace.data_ptr(),
                    _address(counters),
                    call.code,
                    _address(call.keep),
                    call.gain.data_ptr(),
                    call.epsilon,
                    sums.data_ptr(),
                    handle,
                )
            except RuntimeError:
                stream.forget_counters()
                raise

    def solve(self, call: SolverCall, gram: Tensor) -> tuple[Tensor, Tensor | None]:
        stream, handle = self._stream(gram.device)
        weights = gram.new_empty(gram.shape[:-1])
        certificate = gram.new_empty((*gram.shape[:-2], 2))
        arguments = self._solver(call._replace(advance_rng=False), gram, weights, certificate)
        batch, index = math.prod(gram.shape[:-2]), self._index(gram.device)
        needed = self._module.solve_scratch(index, arguments, batch)
        with stream.lock:
            scratch = stream.doubles(needed) if needed else None
            self._module.solve(index, arguments, gram.data_ptr(), batch, _address(scratch), handle)
        return weights, certificate

    def _gram(
        self,
        table: RowTable,
        groups: Sequence[int],
        gram: Tensor,
        norms: Tensor | None = None,
        cosines: Tensor | None = None,
        solver: Any = None,
    ) -> None:
        stream, handle = self._stream(table.device)
        num_groups = 1 if gram.dim() == 2 else gram.shape[0]

        def make() -> _Launch:
            return self._prepare(stream, self._module.GramPlan, table, (groups, num_groups))

        with stream.lock:
            launch = stream.launch_of(table, "gram", (handle, _grouping(groups, num_groups)), make)
            plan = launch.plan
            scratch_doubles = 0 if solver is None else plan.scratch_doubles(solver)
            doubles = stream.doubles(plan.sum_doubles + scratch_doubles)
            counters = stream.counters(plan.num_counters)
            try:
                self._module.gram(
                    plan,
                    *launch.addresses,
                    doubles.data_ptr(),
                    _address(counters),
                    gram.data_ptr(),
                    _address(norms),
                    _address(cosines),
                    solver,
                    doubles[plan.sum_doubles :].data_ptr() if scratch_doubles else 0,
                    handle,
                )
            except RuntimeError:
                stream.forget_counters()
                raise

    def _prepare(self, stream: _Stream, make: Any, table: RowTable, sizes: tuple[Any, ...], *tables: Any) -> _Launch:
        """What a launch over a table needs: its plan, and on the device addresses, other tables, and its work."""
        index = self._index(table.device)
        groups, num_groups, *rest = sizes
        key = (make, table.sizes, _grouping(groups, num_groups), num_groups, *rest)
        plan, words = stream.plan(key, lambda: make(index, *table.sizes, *sizes))
        memory = (stream.table(table.addresses, table.codes, self._module.check_aligned), *tables, words)
        return _Launch(plan, tuple(map(_address, memory)), memory)

    def _solver(self, call: SolverCall, gram: Tensor, weights: Tensor, certificate: Tensor) -> Any:
        num_tasks = gram.shape[-1]
        active, inputs, state = call.active, call.inputs, call.state
        return self._module.SolverArguments(
            call.solver,
            num_tasks,
            _address(active),
            0 if active is None or active.dim() == 1 else num_tasks,
            _address(call.rng),
            call.advance_rng,
            call.options,
            _address(inputs),
            0 if inputs is None or inputs.dim() == 1 else num_tasks,
            _address(state),
            0 if state is None else state.shape[-1],
            weights.data_ptr(),
            certificate.data_ptr(),
        )

    def _index(self, device: torch.device) -> int:
        if device.type == "cpu":
            return 0
        return torch.cuda.current_device() if device.index is None else device.index

    def _stream(self, device: torch.device) -> tuple[_Stream, int]:
        """What is kept for the current stream of the device, and its handle."""
        if device.type == "cpu":
            return self._kept(device, 0), 0
        device = torch.device(device.type, self._index(device))
        handle = torch._C._cuda_getCurrentRawStream(device.index)
        if capturing(device):
            return _Capture(device, self._module.DeviceCopy, self._captured), handle
        return self._kept(device, handle), handle

    def _kept(self, device: torch.device, handle: int) -> _Stream:
        key = (self._index(device), handle)
        found = self._streams.get(key)
        return self._streams.setdefault(key, _Stream(device)) if found is None else found


def _grouping(groups: Sequence[int], num_groups: int) -> Hashable:
    """The groups as a key; where there is one, all parameters are in it."""
    return None if num_groups == 1 else tuple(groups)


def architectures() -> str | None:
    """The GPU architectures the kernels were compiled for, None if they were not built."""
    return None if _cuda is None else _cuda.architectures
