"""From a backward pass to the row of one task: the two ways, and the pass itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from .arena import Arena
from .grads import Row
from .harvest import Harvest


class Capture(Protocol):
    """Turns what a backward pass leaves in ``.grad`` into rows that share no memory.

    Between `open` and `take` gradients gather in ``.grad`` as ever, None where nothing arrived. A row may be opened
    again in the same step: autograd then adds to its tensors in place.
    """

    def prepare(self, tasks: Sequence[str], params: Sequence[Tensor]) -> None:
        """Makes ready for rows of these tasks; called before a pass, while ``.grad`` is what the user sees."""

    def open(self, task: str, params: Sequence[Tensor], previous: Row | None) -> None:
        """Sets ``.grad`` for a pass: None, or the row that this step has captured for the task before."""

    def take(self, params: Sequence[Tensor], previous: Row | None, others: Sequence[Tensor]) -> Row:
        """The row now in ``.grad``, which is None afterwards; it shares no memory with the ``.grad`` of ``others``."""

    def check(self, rows: Mapping[str, Row]) -> None:
        """Raise RuntimeError if a row is not what was taken, which no combination can mend."""

    def close(self) -> bool:
        """Drops what was taken since `prepare`, of passes that failed; whether they overwrote rows from before it."""

    def forget(self) -> None:
        """Starts a new step: the rows taken so far are gone."""


CAPTURES: dict[str, Callable[[], Capture]] = {"harvest": Harvest, "arena": Arena}
"""By the name that `MultiTaskOptimizer` takes."""


def run_backward(run: Callable[[], Any]) -> None:
    """Runs a backward pass; errors of autograd that have a remedy here are raised again with it.

    Raises:
        RuntimeError: what autograd raised.
    """
    try:
        run()
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
            "the graph of a loss was already freed by an earlier backward(); pass all losses that share a "
            "forward pass to one opt.backward([...]), or call loss.backward(retain_graph=True) for all but "
            "the last of them"
        )
    return None
