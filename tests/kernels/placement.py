"""Tests that run on any device: tensors are created on the default one, and oracles run on the CPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only

import mtl_kernels as mk
from mtl_kernels.backends import BACKENDS


def here() -> torch.device:
    """The device on which tensors are created now."""
    return torch.empty(0).device


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its tensors on the CPU; tensors it returns go to the default device."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = here()
        args, kwargs = tree_map_only(Tensor, Tensor.cpu, (args, kwargs))
        with torch.device("cpu"):
            found = function(*args, **kwargs)
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), found)

    return run


def host(tensor: Tensor) -> np.ndarray:
    """The values as NumPy holds them."""
    found: np.ndarray = tensor.detach().cpu().numpy()
    return found


def rng_state(seed: int, step: int = 0) -> Tensor:
    """`mk.rng_state` on the default device."""
    return mk.rng_state(seed, step, device=here())


def runnable_backends() -> list[str]:
    """The names of the backends that run here at full speed on tensors of the default device."""
    device = here()
    compiled = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}[device.type]
    found = [name for name in (*compiled, "reference") if name in BACKENDS]
    return [name for name in found if BACKENDS[name].missing() is None and BACKENDS[name].refusal(device) is None]


backends = st.deferred(lambda: st.sampled_from(runnable_backends()))


def zero_pages(num_elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros of a 16-bit dtype; on the CPU the system maps their memory only where it is written to."""
    if here().type != "cpu":
        return torch.zeros(num_elements, dtype=dtype)
    return torch.from_numpy(np.zeros(num_elements, dtype=np.int16)).view(dtype)


def free_bytes() -> int:
    """Memory that is free on the default device."""
    if here().type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
