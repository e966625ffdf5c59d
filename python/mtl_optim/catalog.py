"""Choosing a method or a combination of losses: what there is, and one by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from . import losses, methods
from .losses import LossCombination, SumOfTerms
from .methods import Method

ALIASES = {"ew": "sum", "imtl": "imtlg", "random": "randomweights", "rlw": "randomweights"}
"""Names that TorchJD and LibMTL have for methods, in lower case and without underscores, where ours is another."""

LOSS_ALIASES = {
    "dtp": "dynamictaskpriority",
    "dwa": "dynamicweightaverage",
    "gls": "geometricmean",
    "lbtw": "lossbalancedtaskweighting",
    "uncertainty": "uncertaintyweighting",
    "uw": "uncertaintyweighting",
}
"""The same for combinations of losses, with the abbreviations of their papers."""

_T = TypeVar("_T")


class MethodInfo(NamedTuple):
    """What there is to know before choosing a method.

    Attributes:
        name: what `get_method` finds it by. cls: its class.
        needs, state, guarantee, cost: as in `mtl_optim.methods.base.About`.
        arguments: the options without a default.
    """

    name: str
    cls: type[Method]
    needs: str
    state: str
    guarantee: str
    cost: str
    arguments: tuple[str, ...]


class LossInfo(NamedTuple):
    """What there is to know before choosing a combination of losses.

    Attributes:
        name: what `get_loss` finds it by. cls: its class.
        value, state, calls: as in `mtl_optim.losses.LossAbout`.
        has_terms: whether it is a sum of one term per task, which can stand in front of a method.
        arguments: the options without a default.
    """

    name: str
    cls: type[LossCombination]
    value: str
    state: str
    calls: str
    has_terms: bool
    arguments: tuple[str, ...]


def list_methods() -> list[MethodInfo]:
    """Every method, by name."""
    classes = [methods.get(name) for name in methods.available()]
    return [MethodInfo(cls.name, cls, *cls.about, _arguments(cls)) for cls in classes]


def list_losses() -> list[LossInfo]:
    """Every combination of losses, by name."""
    found = {name: losses.get(name) for name in losses.available()}
    return [LossInfo(name, c, *c.about, issubclass(c, SumOfTerms), _arguments(c)) for name, c in found.items()]


def get_method(name: str, **options: Any) -> Any:
    """A method by its name, or by the one that TorchJD or LibMTL has for it: ``get_method("mgda", normalize="l2")``.

    There some weightings go by the losses alone ("UW", "GLS", "DWA"): of such a name this makes what `get_loss` does, a
    module that stands in front of a method as ``transform=``, or whose value takes a plain ``backward()``. LibMTL's
    "IMTL" is `IMTLG`, and ``transform=IMTLL(...)`` in front of it.

    Args:
        name: as `list_methods` has it; case and underscores do not matter.
        options: of the class.

    Returns:
        A `Method`; of the name of a combination of losses a `mtl_optim.losses.LossCombination`.

    Raises:
        TypeError: an option that the class does not have, or one missing that it needs.
        ValueError: an unknown name, with those that are near; or a value that the class refuses.
    """
    found = _find(name, "method", methods.available(), ALIASES)
    cls = methods.get(found) if found else losses.get(_known(name, losses.available(), LOSS_ALIASES))
    return _make("get_method", name, cls, options)


def get_loss(name: str, **options: Any) -> LossCombination:
    """A combination of losses by its name, or by that of other libraries: ``get_loss("uw", tasks=["depth", "pose"])``.

    Args:
        name: as `list_losses` has it; case and underscores do not matter.
        options: of the class.

    Raises:
        TypeError: an option that the class does not have, or one missing that it needs.
        ValueError: an unknown name, with those that are near; the name of a method; or a value that the class refuses.
    """
    found = _find(name, "combination of losses", losses.available(), LOSS_ALIASES)
    if found is None:
        raise ValueError(f"{name!r} is a method, which goes by the gradients of the tasks: get_method({name!r}, ...)")
    return _make("get_loss", name, losses.get(found), options)


def loss_class(name: str) -> type[LossCombination] | None:
    """The combination of losses that `get_loss` finds by this name; None if there is none."""
    found = _known(name, losses.available(), LOSS_ALIASES)
    return losses.get(found) if found else None


def _find(name: str, what: str, names: Sequence[str], aliases: Mapping[str, str]) -> str | None:
    """The name that a thing has here; None if it is known as one of the other kind.

    Raises:
        ValueError: it is not known at all.
    """
    if not isinstance(name, str):
        raise ValueError(f"expected the name of a {what}, found {name!r}")
    if found := _known(name, names, aliases):
        return found
    if _known(name, methods.available(), ALIASES) or _known(name, losses.available(), LOSS_ALIASES):
        return None
    plain = {_plain(known): known for known in names}
    near = [plain[match] for match in difflib.get_close_matches(_plain(name), plain, 3)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(names)}"
    raise ValueError(f"unknown {what} {name!r}; {hint}")


def _known(name: str, names: Sequence[str], aliases: Mapping[str, str]) -> str:
    """The name among ``names`` that is meant; empty if none is."""
    asked = _plain(name)
    return next((known for known in names if _plain(known) == asked), aliases.get(asked, ""))


def _make(call: str, name: str, cls: type[_T], options: Mapping[str, Any]) -> _T:
    known = inspect.signature(cls).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise TypeError(
            f"{cls.__name__} has no option {unknown[0]!r}; its options are {', '.join(known) or 'none'}{hint}"
        )
    missing = [option for option in _arguments(cls) if option not in options]
    if missing:
        raise TypeError(f"{cls.__name__} needs {', '.join(missing)}: {call}({name!r}, {missing[0]}=...)")
    return cls(**options)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _arguments(cls: type) -> tuple[str, ...]:
    parameters = inspect.signature(cls).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.default is parameter.empty)
