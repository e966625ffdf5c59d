"""The combination methods, one file each: weights from the Gram matrix of the task gradients.

A file in this folder is all that a method needs: every class in it that is a `Method` with a name is public here and in
`mtl_optim`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING, Any

from mtl_kernels import Solution

from .base import Method

_BY_NAME: dict[str, type[Method]] = {}

for _found in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_found.name}")
    for _class in vars(_module).values():
        if inspect.isclass(_class) and issubclass(_class, Method) and "name" in vars(_class):
            _BY_NAME[_class.name] = _class
            globals()[_class.__name__] = _class

__all__ = ["Method", "Solution", "available", "get", *sorted(cls.__name__ for cls in _BY_NAME.values())]


def available() -> list[str]:
    """The names `get` knows, sorted."""
    return sorted(_BY_NAME)


def get(name: str) -> type[Method]:
    """The class of a method by name, for example ``get("pcgrad")`` is `PCGrad`.

    Raises:
        ValueError: the name is unknown; the text lists the known ones.
    """
    found = _BY_NAME.get(name.lower()) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(available())}")
    return found


if TYPE_CHECKING:  # what a loop finds, type checkers do not

    def __getattr__(name: str) -> Any: ...
