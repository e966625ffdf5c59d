"""Checks of what users pass in; each raises with what was expected, what was found and what to do."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtl_kernels import MAX_TASKS

from .capture import CAPTURES
from .methods import Method, available
from .methods.base import check_choice


def check_optimizer_options(
    optimizer: object, method: object, head_scaling: str, granularity: str, capture: str, refresh_every: int
) -> None:
    """Raise TypeError or ValueError for what `MultiTaskOptimizer` cannot be built of."""
    owner = "MultiTaskOptimizer"
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{owner}: expected a torch.optim.Optimizer, found {optimizer!r}; build the optimizer first")
    if not isinstance(method, Method):
        raise TypeError(
            f"{owner}: expected an instance of a method such as PCGrad(), found {method!r}; known methods: "
            f"{', '.join(available())}"
        )
    check_choice(owner, "head_scaling", head_scaling, ("none", "weights"))
    check_choice(owner, "granularity", granularity, ("model", "group", "parameter"))
    check_choice(owner, "capture", capture, tuple(CAPTURES))
    if isinstance(refresh_every, bool) or not isinstance(refresh_every, int):
        raise TypeError(f"{owner}: expected refresh_every as an integer, found {refresh_every!r}")
    if refresh_every < 1:
        raise ValueError(f"{owner}: expected refresh_every >= 1, found {refresh_every}")
    if refresh_every > 1 and granularity != "model":
        raise ValueError(
            f"{owner}: refresh_every={refresh_every} reuses one weight per loss, which granularity={granularity!r} "
            'does not have; use granularity="model" or refresh_every=1'
        )
    check_param_groups(optimizer.param_groups)


def named_losses(losses: Any) -> dict[str, Tensor]:
    """The losses by task name; those of a list are named "0", "1", ...

    Raises:
        TypeError: not losses at all.
        ValueError: none, too many, one twice, one that is not a scalar or does not require grad.
    """
    named: dict[Any, Any]
    if isinstance(losses, Tensor):
        if losses.dim() > 1:
            raise ValueError(
                f"expected one scalar loss per task, found a tensor of shape {list(losses.shape)}; reduce it "
                "to one value per task, a tensor [K]"
            )
        parts = losses.unbind(0) if losses.dim() else (losses,)
        named = {str(k): loss for k, loss in enumerate(parts)}
    elif isinstance(losses, Mapping):
        named = dict(losses)
    elif isinstance(losses, Sequence) and not isinstance(losses, (str, bytes)):
        named = {str(k): loss for k, loss in enumerate(losses)}
    else:
        raise TypeError(
            f"expected a list, tuple or dict of scalar losses, or a tensor [K], found {type(losses).__name__}"
        )
    if not named:
        raise ValueError("expected at least one loss, found none; leave out backward() when no task is present")
    if len(named) > MAX_TASKS:
        raise ValueError(f"expected at most {MAX_TASKS} losses, found {len(named)}; sum some of them")
    first_name: dict[int, str] = {}
    for name, loss in named.items():
        check_task_name(name)
        _check_loss(name, loss)
        if id(loss) in first_name:
            raise ValueError(
                f"losses {first_name[id(loss)]!r} and {name!r} are the same tensor; pass each loss once, or "
                "multiply it by its weight"
            )
        first_name[id(loss)] = name
    return named


def check_loss_value(name: str, loss: object) -> None:
    """Raise TypeError or ValueError unless ``loss`` is a tensor with one real element."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss {name!r} is a {type(loss).__name__}; expected a scalar tensor")
    if loss.numel() != 1:
        raise ValueError(
            f"loss {name!r} has shape {list(loss.shape)}; expected a scalar: reduce it with .mean() or .sum()"
        )
    if loss.is_complex():
        raise ValueError(f"loss {name!r} is complex; expected a real scalar")


def _check_loss(name: str, loss: Tensor) -> None:
    check_loss_value(name, loss)
    if not loss.requires_grad:
        raise ValueError(
            f"loss {name!r} does not require grad; was it detached, computed under torch.no_grad(), or from "
            "frozen parameters only? Leave an absent task out instead"
        )


def is_stacked(losses: object) -> bool:
    """Whether several losses were put into one tensor just before."""
    if not isinstance(losses, Tensor) or losses.numel() < 2 or losses.grad_fn is None:
        return False
    return losses.grad_fn.name().startswith(("StackBackward", "CatBackward"))


def check_task_name(name: object) -> None:
    """Raise TypeError unless ``name`` is a string."""
    if not isinstance(name, str):
        raise TypeError(f"expected a task name as a string, found {name!r}")


def task_names(tasks: Iterable[str] | None) -> tuple[str, ...]:
    """The fixed task names given to the constructor; () for none."""
    if tasks is None:
        return ()
    if isinstance(tasks, (str, bytes)) or not isinstance(tasks, Iterable):
        raise TypeError(f"expected tasks as a sequence of names, found {tasks!r}")
    names = tuple(tasks)
    for name in names:
        check_task_name(name)
    if not names:
        raise ValueError("expected at least one name in tasks, found none; tasks=None takes names as they appear")
    if len(set(names)) != len(names):
        raise ValueError(f"expected distinct names in tasks, found {list(names)}")
    if len(names) > MAX_TASKS:
        raise ValueError(f"expected at most {MAX_TASKS} tasks, found {len(names)}")
    return names


def check_param_groups(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise for a param group whose ``mtl`` is not a bool, or that holds sharded parameters."""
    for g, group in enumerate(groups):
        mtl = group.get("mtl", True)
        if not isinstance(mtl, bool):
            raise TypeError(f"param group {g} has mtl={mtl!r}; expected True (combined) or False (plain sum)")
        params = group["params"]
        for param in [params] if isinstance(params, Tensor) else params:
            tensor = param[1] if isinstance(param, tuple) else param
            if mtl and _is_dtensor(tensor):
                raise RuntimeError(
                    "sharded parameters (DTensor: FSDP2, tensor parallel) are not handled in this version: "
                    "the Gram matrix of the local shards is not that of the whole gradients. Train without "
                    "sharding, or put them in a param group with mtl=False"
                )


def _is_dtensor(tensor: object) -> bool:
    return any(cls.__name__ == "DTensor" and cls.__module__.startswith("torch.") for cls in type(tensor).__mro__)


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


def check_saved(saved: Any, version: int, method: Method, tasks: Sequence[str] | None) -> None:
    """Raise ValueError unless the ``"mtl"`` entry of a state dict fits; warn about options that differ.

    Args:
        tasks: the fixed task names of the optimizer, None if they are free.
    """
    if not isinstance(saved, dict) or saved.get("version") != version:
        raise ValueError('the "mtl" entry of this state dict is of an unknown version; update mtl-kernels')
    if saved["method"] != type(method).__name__:
        raise ValueError(
            f"this state dict was saved with {saved['method']}, this optimizer uses {type(method).__name__}; "
            'build it with the same method, or drop the "mtl" entry to load the optimizer\'s part alone'
        )
    if tasks is not None and list(saved["tasks"]) != list(tasks):
        raise ValueError(
            f"this state dict has the tasks {saved['tasks']}, this optimizer {list(tasks)}; build it with "
            "the same tasks in the same order"
        )
    if saved["config"] != method.config():
        warnings.warn(
            f"this state dict was saved with {saved['method']} options {saved['config']}; going on with "
            f"{method.config()}",
            UserWarning,
            stacklevel=3,
        )
