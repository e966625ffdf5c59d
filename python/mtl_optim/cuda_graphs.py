"""What a CUDA graph capture changes: no memory may be set up and no value read on the host while one runs."""

from __future__ import annotations

import torch

WARM_UP = "run three whole steps on a side stream before the capture, with the same tasks"


def capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_capture(what: str, advice: str = WARM_UP) -> None:
    """Raise RuntimeError if a capture runs: ``what`` cannot be part of a CUDA graph."""
    if capturing():
        raise RuntimeError(f"{what} while a CUDA graph is captured, which cannot be replayed; {advice}")
