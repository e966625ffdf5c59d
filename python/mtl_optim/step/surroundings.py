"""What the losses reach outside the optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from ..capture.grads import Isolation, same_tensors
from ..capture.graph import leaves_beside, reached_leaves, split_compiled_graph
from .losses import reaches_nothing
from .parameters import Parameters

ADDS_ELSEWHERE = (
    "these passes reach parameters of another MultiTaskOptimizer, to whose .grad they add the plain sum: where both "
    "optimizers run on the same losses, every gradient counts twice. Pass both inner optimizers to one wrapper, "
    "MultiTaskOptimizer([first, second], method); or, where the other's parameters are not meant (a discriminator in "
    'the generator\'s loss), leave them alone with outside="keep"'
)


HIDDEN = (
    "the graph of the losses may hide parameters (reentrant checkpointing?), so that passes run through all of it and "
    "gradients outside the optimizer are put back afterwards; those of parameters that the graph does not show cannot "
    "be. Call checkpoint(..., use_reentrant=False)"
)


class Kept:
    """Passes that leave the gradients outside the optimizer as they are.

    Attributes:
        inputs: what they are told to end in; None where the graph may hide parameters from that. Such passes are whole,
            and `undo` puts the gradients of the leaves outside back.
    """

    def __init__(self, losses: Sequence[Tensor], parameters: Parameters) -> None:
        inside = [*parameters.managed, *parameters.others]
        leaves, hides = leaves_beside(losses, inside)
        known = set(map(id, inside))
        self.inputs: list[Tensor] | None = None if hides else inside
        self._isolation = Isolation([leaf for leaf in leaves if id(leaf) not in known] if hides else [], [])

    def undo(self) -> None:
        """Puts back what was set aside."""
        self._isolation.undo()


class Surroundings:
    """The leaves outside the optimizer that losses were seen to reach: each task's graph is looked through once.

    Attributes:
        findings: what is worth a warning, by a name of its kind.
    """

    def __init__(self) -> None:
        self.findings: dict[str, str] = {}
        self._seen: set[str] = set()
        self._params: list[Tensor] = []
        self._outside: list[weakref.ref[Tensor]] = []

    def leaves(self) -> list[Tensor]:
        """Those that are still there."""
        return [leaf for ref in self._outside if (leaf := ref()) is not None]

    def look(
        self, named: Mapping[str, Tensor], parameters: Parameters, kept: bool, elsewhere: Callable[[], Iterable[Tensor]]
    ) -> None:
        """Looks through the graphs of the tasks that are new.

        Args:
            kept: whether the gradients of these leaves are left as they are.
            elsewhere: gives the parameters that other optimizers of this kind combine.

        Raises:
            ValueError: a loss surely reaches no parameter of the optimizer.
        """
        inside = [*parameters.managed, *parameters.others]
        if not same_tensors(inside, self._params):
            self._seen, self._params, self._outside = set(), inside, []
        new = {name: loss for name, loss in named.items() if name not in self._seen}
        if not new:
            return
        known = set(map(id, inside))
        outside: dict[int, Tensor] = {}
        for name, loss in new.items():
            leaves, hides = reached_leaves([loss])
            if not hides and not any(id(leaf) in known for leaf in leaves):
                raise reaches_nothing(name)
            outside.update((id(leaf), leaf) for leaf in leaves if id(leaf) not in known)
        self._seen.update(new)
        self._outside.extend(map(weakref.ref, outside.values()))
        if not kept:
            self._judge(outside, elsewhere())
        if split_compiled_graph(new.values()):
            self.findings["compiled"] = (
                "the losses use different outputs of one torch.compile graph, through which each task reaches every "
                "parameter in it (with zeros), so that heads count as shared; compile the shared part and the "
                "heads one by one"
            )

    def _judge(self, outside: Mapping[int, Tensor], elsewhere: Iterable[Tensor]) -> None:
        combined = outside.keys() & set(map(id, elsewhere))
        if combined:
            self.findings["elsewhere"] = ADDS_ELSEWHERE
        # Leaves that are no parameters are inputs whose gradients are wanted: coordinates, interpolates.
        forgotten = [leaf for key, leaf in outside.items() if key not in combined and isinstance(leaf, nn.Parameter)]
        if forgotten:
            self.findings["outside"] = (
                f"the losses reach {len(forgotten)} parameter(s) that are not in the optimizer; their .grad is the "
                "plain sum over the losses (of this rank, where there are several), and opt.zero_grad() does not clear "
                "it. Add them to the optimizer, pass a "
                'list of optimizers, or leave them alone with outside="keep"'
            )
