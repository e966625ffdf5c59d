"""The combination methods: weights from the Gram matrix of the task gradients."""

from __future__ import annotations

from mtl_kernels import Solution

from .base import Method
from .constant import Constant, Mean, Sum
from .mgda import MGDA
from .pcgrad import PCGrad

__all__ = ["MGDA", "Constant", "Mean", "Method", "PCGrad", "Solution", "Sum", "available", "get"]


def available() -> list[str]:
    """The names `get` knows, sorted."""
    return sorted(_by_name())


def get(name: str) -> type[Method]:
    """The class of a method by name, for example ``get("pcgrad")`` is `PCGrad`.

    Raises:
        ValueError: the name is unknown; the text lists the known ones.
    """
    found = _by_name().get(name.lower()) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(available())}")
    return found


def _by_name() -> dict[str, type[Method]]:
    """Every class in ``__all__`` that has a name: there is no second list to keep."""
    classes = (value for value in map(globals().get, __all__) if isinstance(value, type) and issubclass(value, Method))
    return {cls.name: cls for cls in classes if cls is not Method}
