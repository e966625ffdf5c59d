"""Backward passes: weighted ones, and what to do about errors of autograd."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .compiled import OVERWRITES

Pass = Callable[..., None]
"""A backward pass that takes ``retain_graph``."""


def weighted_passes(
    losses: Sequence[Tensor], weights: Sequence[Tensor], weighted: list[Tensor] | None, plain: list[Tensor]
) -> list[Pass]:
    """The passes that give some leaves (None: all) the weighted sum of the gradients, and others the plain sum.

    The latter go no further down the graph than they must.
    """
    backward = functools.partial(torch.autograd.backward, losses)
    passes: list[Pass] = [functools.partial(backward, inputs=plain)] if plain else []
    if weighted is None or weighted:
        scales = [w.to(loss.device, loss.dtype).reshape(loss.shape) for w, loss in zip(weights, losses, strict=True)]
        passes.append(functools.partial(backward, scales, inputs=weighted))
    return passes


def run_passes(passes: Sequence[Pass], retain_graph: bool) -> None:
    """Runs them in turn, over one graph; see `run_backward`."""
    for k, one in enumerate(passes):
        run_backward(functools.partial(one, retain_graph=retain_graph or k < len(passes) - 1))


@contextlib.contextmanager
def hooked(hooks: Iterable[tuple[Callable[[Callable[..., None]], Any], Callable[..., None]]]) -> Iterator[None]:
    """Hooks of nodes for as long as a block lasts: pairs of what registers one, and what it calls."""
    with contextlib.ExitStack() as stack:
        for register, hook in hooks:
            stack.callback(register(hook).remove)
        yield


def run_backward(run: Callable[[], Any]) -> Any:
    """Runs a backward pass and returns what it does; errors of autograd with a remedy here are raised again with it.

    Raises:
        RuntimeError: what autograd raised.
    """
    try:
        return run()
    except RuntimeError as error:
        if (hint := autograd_hint(error)) is not None:
            raise RuntimeError(hint) from error
        raise


def autograd_hint(error: BaseException) -> str | None:
    """What to do about an error of autograd, or None if it is not one of those known here."""
    text = str(error)
    if "donated buffers" in text:
        return OVERWRITES
    if "mark a variable ready only once" in text or "marked as ready twice" in text or "still allreduced" in text:
        return (
            "the reducer of DistributedDataParallel takes one backward pass for each forward pass. Pass the model: "
            "MultiTaskOptimizer(..., data_parallel=ddp_model), which keeps its reducer out and averages rows instead"
        )
    if "retain_graph" in text or "have already been freed" in text:
        return (
            "the graph of a loss was already freed by an earlier backward(). Losses that share a forward pass: pass "
            "all of them to one opt.backward([...]), or call loss.backward(retain_graph=True) for all but the last. "
            "State that is carried from step to step (hidden states, running averages, replayed outputs): detach() it "
            "before the next step uses it"
        )
    return None
