"""How gradients lie on the ranks of a run, from what the user says and what parameters are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from ..methods.base import check_choice
from ..methods.rows import RowMethod
from ..options import Options
from .local import Local
from .ranks import Ranks

OWNER = "MultiTaskOptimizer"


def find_ranks(data_parallel: Any, reduce: str, groups: Iterable[Mapping[str, Any]], owner: object) -> Ranks:
    """What a step goes by.

    Args:
        data_parallel, reduce: see `MultiTaskOptimizer`.
        groups: the param groups.
        owner: as long as it lives, the reducer of a DistributedDataParallel model is kept out.

    Raises:
        TypeError, ValueError, RuntimeError: neither a model nor a process group; parameters that are sharded and
            declared as replicated, or sharded in a way that is not handled.
    """
    check_choice(OWNER, "reduce", reduce, ("scatter", "all"))
    params = [param for group in groups if group.get("mtl", True) for param in group["params"]]
    for param in params:
        _refuse(param)
    if any(map(_is_dtensor, params)):
        return _sharded(data_parallel, [param for param in params if _is_dtensor(param)])
    if data_parallel is None or data_parallel is False:
        return Local(data_parallel is False)
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"{OWNER}: data_parallel= without a process group; call torch.distributed.init_process_group() first"
        )
    from torch.nn.parallel import DistributedDataParallel

    from .ddp import take_over
    from .replicated import Replicated

    data_parallel = getattr(data_parallel, "_orig_mod", data_parallel)  # of a model that was compiled
    if isinstance(data_parallel, DistributedDataParallel):
        known = set(map(id, data_parallel.parameters()))
        if params and not any(id(param) in known for param in params):
            raise ValueError(
                f"{OWNER}: data_parallel= is a model that holds none of the parameters of the optimizer; pass the "
                "DistributedDataParallel model that they are of"
            )
        if data_parallel.static_graph:
            raise ValueError(
                f"{OWNER}: data_parallel= is a model with static_graph=True, whose reducer does not let go of the "
                "first backward pass; build it without, which changes nothing here"
            )
        take_over(data_parallel, owner)
        return Replicated(data_parallel.process_group, reduce)
    if isinstance(data_parallel, dist.ProcessGroup):
        return Replicated(data_parallel, reduce)
    raise TypeError(
        f"{OWNER}: expected data_parallel as a DistributedDataParallel model, a process group, or False for ranks that "
        f"train apart, found {data_parallel!r}"
        + ("; wrap the model, or pass torch.distributed.group.WORLD" if isinstance(data_parallel, Module) else "")
    )


def check_several(ranks: Ranks, options: Options) -> None:
    """Raise ValueError for options that are not for several ranks."""
    if not ranks.several:
        return
    if options.capture == "factored" and ranks.hides:
        raise ValueError(
            f'{OWNER}: capture="factored" where parameters are sharded: the graphs do not show them, and the framework '
            'reduces their whole gradients; use capture="harvest"'
        )
    if isinstance(options.method, RowMethod):
        raise ValueError(
            f"{OWNER}: {type(options.method).__name__} combines elements of rows, of which a rank has a part; methods "
            "that go by the Gram matrix are handled on several ranks"
        )
    if ranks.hides and (options.outside == "keep" or options.capture == "arena"):
        raise ValueError(
            f'{OWNER}: outside="keep" and capture="arena" name parameters to passes that do not see sharded ones; '
            "leave them at their defaults"
        )


def check_added(ranks: Ranks, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise RuntimeError for parameters that lie on the ranks in another way than those that are there."""
    for group in groups:
        combined = group.get("mtl", True)
        for param in group["params"]:
            if combined:
                _refuse(param)
            # Those that are not combined are averaged over the ranks, where there are several.
            if _is_dtensor(param) and not ranks.hides and (combined or ranks.several):
                raise RuntimeError(
                    f"{OWNER}: a parameter of shape {list(param.shape)} is a DTensor beside plain tensors; build the "
                    f"optimizer with all parameters{'' if ranks.several else ', or add it with mtl=False'}"
                )


def _sharded(data_parallel: Any, params: Sequence[Any]) -> Ranks:
    from .sharded import Sharded

    if data_parallel is not None:
        raise ValueError(
            f"{OWNER}: data_parallel= is for replicated parameters, and these are DTensors, whose gradients the "
            "framework reduces; leave it out"
        )
    # Those of one mesh may lie beside it (FSDP2 around tensor parallel layers), but then others are on all ranks.
    held, world = max(param.device_mesh.size() for param in params), dist.get_world_size()
    if held < world:
        raise ValueError(
            f"{OWNER}: the parameters are sharded over {held} of {world} ranks, and nothing says whether the others "
            "train the same model; shard them over a mesh of all ranks (replicate and shard, for HSDP), or start the "
            "ranks of every model as a run of their own"
        )
    return Sharded()


def _is_dtensor(param: object) -> bool:
    return any(cls.__name__ == "DTensor" and cls.__module__.startswith("torch.") for cls in type(param).__mro__)


def _refuse(param: Tensor) -> None:
    """Raise RuntimeError for what other libraries shard."""
    if type(param).__name__ == "FlatParameter" or hasattr(param, "_is_flat_param"):
        raise RuntimeError(
            f"{OWNER}: parameters of FullyShardedDataParallel (FSDP1), which takes one backward pass a forward pass: a "
            "second one on the retained graph fails or is wrong. Use fully_shard (FSDP2)"
        )
    if hasattr(param, "ds_id") or hasattr(param, "ds_tensor"):
        raise RuntimeError(
            f"{OWNER}: parameters of a DeepSpeed ZeRO engine, which reduces gradients while a backward pass runs, so "
            "that those of several losses mix. Use fully_shard (FSDP2) or DistributedDataParallel"
        )
