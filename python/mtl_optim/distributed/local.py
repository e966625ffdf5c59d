"""One process with whole parameters, which is all that is handled in this version."""

from __future__ import annotations

import torch


def check_single_rank() -> None:
    """Raise RuntimeError in a distributed run."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and (ranks := distributed.get_world_size()) > 1:
        raise RuntimeError(
            f"this process is one of {ranks} ranks, and gradients across ranks are not handled in this "
            "version: the Gram matrix of one rank's gradients is not that of the mean gradient, so every "
            "rank would combine differently. Run on one rank, or call loss.backward() on the summed loss and "
            "step the wrapped optimizer"
        )


def check_whole(param: object) -> None:
    """Raise RuntimeError for a sharded parameter."""
    if any(cls.__name__ == "DTensor" and cls.__module__.startswith("torch.") for cls in type(param).__mro__):
        raise RuntimeError(
            "sharded parameters (DTensor: FSDP2, tensor parallel) are not handled in this version: "
            "the Gram matrix of the local shards is not that of the whole gradients. Train without "
            "sharding, or put them in a param group with mtl=False"
        )
