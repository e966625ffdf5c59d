"""Which backend runs an operation: the argument, else `use_backend`, else MTL_KERNELS_BACKEND, else the best there is.

An explicit request that cannot be met raises; only the automatic choice falls back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from .backends import BACKENDS, Backend

ENVIRONMENT_VARIABLE = "MTL_KERNELS_BACKEND"

_forced: ContextVar[str | None] = ContextVar("mtl_kernels_backend", default=None)
_resolved: dict[tuple[torch.device, str], Backend] = {}


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with ``None`` if it can be used and otherwise the reason why it cannot."""
    return {name: backend.missing() for name, backend in BACKENDS.items()}


def check_name(name: str) -> str:
    """Raise ValueError unless ``name`` is a backend or "auto"."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; expected one of {', '.join(['auto', *BACKENDS])}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the operations of a ``with`` block on one backend ("auto" lifts an outer choice).

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend is known but not available; the text says what is missing.
    """
    if check_name(name) != "auto" and (reason := BACKENDS[name].missing()) is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def resolve(device: torch.device, backend: str | None) -> Backend:
    """The backend that runs an operation on tensors of ``device``.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend asked for by name that is not available, or does not run on the device.
    """
    name = backend
    if name is None:
        name = _forced.get() or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    key = (device, name)
    found = _resolved.get(key)
    if found is None:
        found = _resolved[key] = _choose(device, name)
    return found


def _choose(device: torch.device, name: str) -> Backend:
    if check_name(name) == "auto":
        # By the type of the device first: asking for a driver starts it, and a process that did cannot fork for it.
        for backend in BACKENDS.values():
            if backend.automatic_on(device) and backend.missing() is None and backend.refusal(device) is None:
                return backend
        raise RuntimeError(
            f"no backend takes {device.type} tensors; reference: {BACKENDS['reference'].refusal(device)}"
        )
    backend = BACKENDS[name]
    if (reason := backend.missing()) is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    if (reason := backend.refusal(device)) is not None:
        others = "" if BACKENDS["reference"].refusal(device) else "; or choose another backend (reference takes them)"
        raise RuntimeError(f"backend {name!r} cannot take {device.type} tensors: {reason}{others}")
    return backend
