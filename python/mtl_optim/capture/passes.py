"""A backward pass, and what to do about errors of autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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
    if "donated" in text:
        return (
            "a compiled graph refused retain_graph, which several losses over one graph need; set "
            "torch._functorch.config.donated_buffer = False before the model is first compiled"
        )
    if "retain_graph" in text or "have already been freed" in text:
        return (
            "the graph of a loss was already freed by an earlier backward(). Losses that share a forward pass: pass "
            "all of them to one opt.backward([...]), or call loss.backward(retain_graph=True) for all but the last. "
            "State that is carried from step to step (hidden states, running averages, replayed outputs): detach() it "
            "before the next step uses it"
        )
    return None
