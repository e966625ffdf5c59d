"""The implementations behind the operations, best first."""

from __future__ import annotations

from .cpu import CpuBackend
from .cuda import CudaBackend
from .protocol import Backend, FusedBackend, is_fused
from .reference import ReferenceBackend
from .triton import TritonBackend

__all__ = ["BACKENDS", "Backend", "FusedBackend", "is_fused"]

BACKENDS: dict[str, Backend] = {b.name: b for b in (CudaBackend(), TritonBackend(), CpuBackend(), ReferenceBackend())}
"""In the order in which the automatic choice tries them."""
