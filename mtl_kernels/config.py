"""What this installation can do, and what is missing."""

from __future__ import annotations

import platform

import torch

from . import dispatch
from .backends import cpu, cuda, triton
from .version import __version__


def config() -> dict[str, str]:
    """The facts of `show_config`, by name."""
    facts = {
        "mtl-kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "instruction set": cpu.instruction_set() or "none (no compiled CPU backend)",
        "CUDA architectures": cuda.architectures() or "none (no compiled CUDA backend)",
        "threads": str(torch.get_num_threads()),
    }
    for name, reason in dispatch.available_backends().items():
        facts[f"backend {name}"] = "available" if reason is None else f"not available: {reason}"
    facts["solvers on triton"] = (
        f"{', '.join(triton.SOLVERS)} on the GPU; others on the host, one wait a step, not in a CUDA graph"
    )
    return facts


def show_config() -> str:
    """Versions, instruction set, threads, and for every backend whether it can be used or why it cannot."""
    facts = config()
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items())
