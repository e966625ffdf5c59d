"""The workloads by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import NamedTuple

from . import (
    adaptive,
    attributes,
    cross_stitch,
    experts,
    hard_cnn,
    physics,
    relationship,
    scenes,
    shared_private,
    sluice,
    soft_sharing,
    tabular,
    text,
    treasure,
)
from .data import fashion
from .data.attributes import MOST
from .workload import Workload


class Entry(NamedTuple):
    """A workload: what it shares, and how it is made of a seed."""

    sharing: str
    build: Callable[[int], Workload]


WORKLOADS: dict[str, Entry] = {
    "digits": Entry("hard, convolutional", hard_cnn.digits),
    "text": Entry("hard, bidirectional LSTM", text.lstm),
    "mixed": Entry("hard, class and value", tabular.mixed),
    "outputs": Entry("hard, several values", tabular.outputs),
    "dense": Entry("hard, every pixel", scenes.dense),
    "soft": Entry("soft, towers tied by L2", soft_sharing.build),
    "shared-private": Entry("shared and private parts", shared_private.build),
    "cross-stitch": Entry("cross-stitch", cross_stitch.build),
    "sluice": Entry("sluice", sluice.build),
    "mmoe": Entry("mixture of experts", experts.mmoe),
    "ple": Entry("progressive layered extraction", experts.ple),
    "attention": Entry("attention network, every pixel", scenes.attention),
    "relationship": Entry("hard, tensor-normal prior on heads", relationship.build),
    "adaptive": Entry("a tree that widens", adaptive.build),
    "transformer": Entry("hard, transformer encoder", text.transformer),
    "physics": Entry("all, physics-informed", physics.build),
    "treasure": Entry("all, policy gradient", treasure.build),
    "attributes-40": Entry("hard, 40 heads", attributes.derived),
}
"""With data that is always there."""
INSTALLED: dict[str, Entry] = {"fashion": Entry("hard, convolutional", hard_cnn.fashion)}
"""With data of a package that may not be installed."""
GIVEN: dict[str, Entry] = {
    "celeba": Entry("hard, 40 heads", attributes.faces),
    "nyuv2": Entry("attention network, every pixel", scenes.nyuv2),
    "cityscapes": Entry("attention network, every pixel", scenes.cityscapes),
    "qm9": Entry("hard, several values", tabular.qm9),
}
"""With data that has to be given as a folder."""
_ATTRIBUTES = re.compile(r"attributes-(\d+)")


def names() -> list[str]:
    """Those whose data is here, without those that need a folder."""
    return [*WORKLOADS, *(INSTALLED if fashion.installed() else ())]


def find(name: str) -> Entry:
    """A workload by its name; ``attributes-K`` is there for K from 2 to 40.

    Raises:
        ValueError: an unknown name, with those that are near.
    """
    known = WORKLOADS | INSTALLED | GIVEN
    if name in known:
        return known[name]
    if (found := _ATTRIBUTES.fullmatch(name)) and 2 <= int(found[1]) <= MOST:
        number = int(found[1])
        return Entry(f"hard, {number} heads", lambda seed: attributes.derived(seed, number))
    near = difflib.get_close_matches(name, known, 2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose of {', '.join(known)}, attributes-K"
    raise ValueError(f"unknown workload {name!r}; {hint}")


def build(name: str, seed: int) -> Workload:
    """A workload, the same at every call.

    Raises:
        ValueError: an unknown name.
        DataMissingError: its data is not on this machine.
    """
    return find(name).build(seed)
