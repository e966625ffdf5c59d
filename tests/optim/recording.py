"""CUDA graphs, and what stands in for them on a CPU: a step recorded as its operations and run again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item"}


class Recording(TorchDispatchMode):
    """Keeps every operation with its tensors; `replay` runs them again into the same memory, as a CUDA graph does.

    Nothing of Python runs in a replay: an address that changes from step to step, or state that lives on the host,
    shows as a wrong result. Operations that read a value on the host, or fetch one from it, raise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name in HOST_READS or name == "lift_fresh":
            raise AssertionError(f"{name} in a step that is recorded")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, recorded in self.calls:
                for old, new in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.detach().copy_(new)


def record(device: str, run: Callable[[], Any]) -> Callable[[], None]:
    """Runs a step once while recording it; the function returned runs it again."""
    if device == "cpu":
        with (recording := Recording()):
            run()
        return recording.replay
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()  # a capture runs nothing
    return graph.replay


def warm_up(device: str, run: Callable[[], Any], steps: int = 3) -> None:
    """Runs a step a few times, on a side stream as a later capture needs it."""
    if device == "cpu":
        for _ in range(steps):
            run()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(steps):
            run()
    torch.cuda.current_stream().wait_stream(stream)
