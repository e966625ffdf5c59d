"""Methods as the command line names them: ``mgda``, ``mgda:normalize=l2,tol=1e-9``, ``constant:weights=[1,2,3]``."""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any

from ..catalog import get_method
from ..methods import Method


def build(spec: str, seed: int) -> Method:
    """The method that ``spec`` names, with its options; ``seed`` where it takes one and ``spec`` names none.

    An option's value is a Python literal, else text; of an option ``method`` it is the name of a method.

    Raises:
        ValueError: an unknown name, or options that the method does not take.
    """
    name, colon, text = spec.partition(":")
    options = _options(spec, text) if colon else {}
    if isinstance(options.get("method"), str):
        options["method"] = build(options["method"], seed)
    try:
        method = get_method(name, **options)
        takes_seed = "seed" in inspect.signature(type(method)).parameters and "seed" not in options
        return get_method(name, **options, seed=seed) if takes_seed else method
    except (TypeError, ValueError) as error:
        raise ValueError(f"--methods {spec}: {error}") from error


def label(spec: str) -> str:
    """What the method is called in print: its class, and the options that ``spec`` names."""
    cls = type(build(spec, 0)).__name__
    text = spec.partition(":")[2]
    return f"{cls}({', '.join(re.split(_COMMA, text))})" if text else cls


_COMMA = r",(?=\w+=)"
"""Between two options: one inside a list is not followed by a name."""


def _options(spec: str, text: str) -> dict[str, Any]:
    options = {}
    for part in re.split(_COMMA, text):
        name, equals, value = part.partition("=")
        if not equals or not value or not name.isidentifier() or name in options:
            raise ValueError(f"--methods {spec}: expected NAME:option=value,option=value, found {part!r}")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options
