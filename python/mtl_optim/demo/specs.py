"""Methods as the command line names them: ``mgda``, ``mgda:normalize=l2,tol=1e-9``, ``constant:weights=[1,2,3]``.

Combinations of losses too, ``gradnorm:alpha=0.5``, and both together, ``mgda:transform=logsum``.
"""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any, NamedTuple

from ..catalog import get_loss, get_method, loss_class
from ..losses import SumOfTerms
from ..methods import Method, Sum
from .tasks import TASKS


class Recipe(NamedTuple):
    """What a run trains with: a method, and what stands in front of it."""

    method: Method
    transform: SumOfTerms | None


def build(spec: str, seed: int) -> Recipe:
    """What ``spec`` names, with its options; ``seed`` where it takes one and ``spec`` names none.

    An option's value is a Python literal, else text; of an option ``method`` or ``transform`` it is the spec of a
    method or of a combination of losses. A combination of losses alone stands in front of `Sum`, whose gradient is that
    of its value.

    Raises:
        ValueError: an unknown name, options that the method does not take, or a method that is not for three tasks.
    """
    try:
        name, options = _parsed(spec)
        if loss_class(name) is not None:
            return Recipe(Sum(), _transform(spec))
        front = options.pop("transform", None)
        method = _method(name, options, seed)
        method.bound_to(tuple(TASKS)).check_tasks(len(TASKS))
        return Recipe(method, None if front is None else _transform(front))
    except (TypeError, ValueError) as error:
        raise ValueError(f"--methods {spec}: {error}") from error


def label(spec: str) -> str:
    """What the run is called in print: the class, and the options that ``spec`` names."""
    name, _, text = spec.partition(":")
    method, transform = build(spec, 0)
    cls = type(method if loss_class(name) is None else transform).__name__
    return f"{cls}({', '.join(re.split(_COMMA, text))})" if text else cls


def _method(name: str, options: dict[str, Any], seed: int) -> Method:
    if isinstance(options.get("method"), str):
        options = options | {"method": _method(*_parsed(options["method"]), seed)}
    method: Method = get_method(name, **options)
    if "seed" in inspect.signature(type(method)).parameters and "seed" not in options:
        method = get_method(name, **options, seed=seed)
    return method


def _transform(spec: str) -> SumOfTerms:
    name, options = _parsed(spec)
    cls = loss_class(name)
    if cls is not None and "tasks" in inspect.signature(cls).parameters:
        options = {"tasks": list(TASKS)} | options
    transform = get_loss(name, **options)
    if not isinstance(transform, SumOfTerms):
        raise ValueError(transform.coupling())
    if transform.about.calls != "none" and "transform=" not in transform.about.calls:
        raise ValueError(f"{transform!r} needs {transform.about.calls}, which the demo does not call")
    return transform


_COMMA = r",(?=\w+=)"
"""Between two options: one inside a list is not followed by a name."""


def _parsed(spec: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of a spec."""
    name, colon, text = spec.partition(":")
    return name, _options(spec, text) if colon else {}


def _options(spec: str, text: str) -> dict[str, Any]:
    options = {}
    for part in re.split(_COMMA, text):
        name, equals, value = part.partition("=")
        if not equals or not value or not name.isidentifier() or name in options:
            raise ValueError(f"expected NAME:option=value,option=value, found {part!r}")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options
