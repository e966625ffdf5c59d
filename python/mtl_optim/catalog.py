"""Choosing a method: what there is, and one by name."""

from __future__ import annotations

import difflib
import inspect
from typing import Any, NamedTuple

from . import methods
from .methods import Method

ALIASES = {"ew": "sum", "imtl": "imtlg", "random": "randomweights", "rlw": "randomweights"}
"""Names that TorchJD and LibMTL have for methods, in lower case and without underscores, where ours is another."""


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


def list_methods() -> list[MethodInfo]:
    """Every method, by name."""
    classes = [methods.get(name) for name in methods.available()]
    return [MethodInfo(cls.name, cls, *cls.about, _arguments(cls)) for cls in classes]


def get_method(name: str, **options: Any) -> Method:
    """A method by its name, or by the one that TorchJD or LibMTL has for it: ``get_method("mgda", normalize="l2")``.

    Args:
        name: as `list_methods` has it; case and underscores do not matter.
        options: of the class.

    Raises:
        TypeError: an option that the class does not have, or one missing that it needs.
        ValueError: an unknown name, with those that are near; or a value that the class refuses.
    """
    cls = _find(name)
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
        raise TypeError(f"{cls.__name__} needs {', '.join(missing)}: get_method({name!r}, {missing[0]}=...)")
    return cls(**options)


def _find(name: str) -> type[Method]:
    if not isinstance(name, str):
        raise ValueError(f"expected the name of a method, found {name!r}")
    plain = {_plain(known): known for known in methods.available()}
    asked = _plain(name)
    found = plain.get(asked) or ALIASES.get(asked)
    if found is not None:
        return methods.get(found)
    near = [plain[match] for match in difflib.get_close_matches(asked, plain, 3)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(methods.available())}"
    raise ValueError(f"unknown method {name!r}; {hint}")


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _arguments(cls: type[Method]) -> tuple[str, ...]:
    parameters = inspect.signature(cls).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.default is parameter.empty)
