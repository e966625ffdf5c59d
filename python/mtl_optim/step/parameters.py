"""The parameters of a step: which there are to combine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor

from ..capture.grads import same_tensors

_requires_grad, _device = attrgetter("requires_grad"), attrgetter("device")


class Parameters(NamedTuple):
    """The parameters of an optimizer that require grad.

    Attributes:
        managed: those whose gradients are combined. group_of: the param group of each of them.
        places: the place of each of them among all parameters of the optimizer, which freezing one does not change.
        others: those of groups with mtl=False.
        in_gram: whether each managed one counts in the Gram matrix, by the ``gram`` of its group.
    """

    managed: list[Tensor]
    group_of: list[int]
    places: list[int]
    others: list[Tensor]
    in_gram: list[bool]

    def at(self, places: Sequence[int], others: bool = True) -> Parameters:
        """Some of the managed ones, with or without the others."""
        return Parameters(
            [self.managed[p] for p in places],
            [self.group_of[p] for p in places],
            [self.places[p] for p in places],
            self.others if others else [],
            [self.in_gram[p] for p in places],
        )

    @property
    def partial(self) -> bool:
        """Whether some do not count."""
        return not all(self.in_gram)


class Selection:
    """`select_parameters`, done anew only where something has changed since the last time."""

    def __init__(self) -> None:
        self._last: tuple[list[Any], ...] | None = None
        self._found = Parameters([], [], [], [], [])

    def __call__(self, groups: Sequence[Mapping[str, Any]]) -> Parameters:
        """See `select_parameters`; the same object while it would be equal."""
        params = [param for group in groups for param in group["params"]]
        kinds = [(len(group["params"]), group.get("mtl", True), group.get("gram", True)) for group in groups]
        now = kinds, list(map(_requires_grad, params)), list(map(_device, params))
        if self._last is None or not same_tensors(self._last[0], params) or self._last[1:] != now:
            self._last = None
            self._found = select_parameters(groups)
            self._last = params, *now
        return self._found


def select_parameters(groups: Iterable[Mapping[str, Any]]) -> Parameters:
    """Sorts the parameters of the param groups; where none is managed (a frozen trunk), a step is a plain sum.

    Raises:
        ValueError: none requires grad, or the managed ones are on several devices.
    """
    found = Parameters([], [], [], [], [])
    begin = 0
    for g, group in enumerate(groups):
        # By identity: a tied weight that a group lists twice has one gradient.
        place = {id(param): (begin + n, param) for n, param in enumerate(group["params"]) if param.requires_grad}
        begin += len(group["params"])
        wanted = [param for _, param in place.values()]
        if group.get("mtl", True):
            found.managed.extend(wanted)
            found.group_of.extend([g] * len(wanted))
            found.places.extend(n for n, _ in place.values())
            found.in_gram.extend([group.get("gram", True)] * len(wanted))
        else:
            found.others.extend(wanted)
    if not found.managed and not found.others:
        raise ValueError("no parameter to combine gradients of: none of the optimizer's requires grad")
    devices = {param.device for param in found.managed}
    if len(devices) > 1:
        raise ValueError(
            f"the managed parameters are on several devices ({', '.join(sorted(map(str, devices)))}); "
            "keep them on one, or put those of the others in param groups with mtl=False"
        )
    return found
