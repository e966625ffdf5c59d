"""docs/methods.md says of every method and combination of losses what the code does."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from mtl_optim import list_losses, list_methods
from mtl_optim.catalog import LossInfo, MethodInfo

DOC = Path(__file__).parent.parent / "docs" / "methods.md"
METHODS, LOSSES = list_methods(), list_losses()


def signature(cls: type) -> str:
    """The class as it is called, with its defaults."""
    parameters = inspect.signature(cls).parameters.values()
    shown = [p.name if p.default is p.empty else f"{p.name}={_shown(p.default)}" for p in parameters]
    return f"{cls.__name__}({', '.join(shown)})"


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def method_lines(info: MethodInfo) -> tuple[str, str]:
    """The heading of a method, and the last line of its entry."""
    said = f"*Needs:* {info.needs}. *Keeps:* {info.state}. *Holds:* {info.guarantee}. *Cost:* {info.cost}."
    return f"### `{signature(info.cls)}`", said


def loss_lines(info: LossInfo) -> tuple[str, str]:
    """The heading of a combination of losses, and the last line of its entry."""
    terms = "has terms" if info.has_terms else "no terms"
    said = f"*Value:* {info.value}. *Keeps:* {info.state}. *Calls:* {info.calls}. *Transform:* {terms}."
    return f"### `{signature(info.cls)}`", said


ENTRIES = [
    *((info.cls, method_lines(info)) for info in METHODS),
    *((info.cls, loss_lines(info)) for info in LOSSES),
]


def sections() -> dict[str, str]:
    parts = re.split(r"^(### .*)$", DOC.read_text(), flags=re.MULTILINE)
    return {
        head: body.partition("\n## ")[0].partition("\n# ")[0]
        for head, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def test_every_entry_is_there_and_no_other() -> None:
    assert sorted(sections()) == sorted(head for _, (head, _) in ENTRIES)


@pytest.mark.parametrize(("cls", "lines"), ENTRIES, ids=lambda value: getattr(value, "__name__", ""))
def test_an_entry(cls: type, lines: tuple[str, str]) -> None:
    head, said = lines
    body = sections()[head].strip()
    assert body.splitlines()[-1] == said
    cited = re.findall(r"arXiv (\d{4}\.\d{5}|\d{4}\.\d{4})", body)
    named = re.findall(r"(?:arXiv|arXiv:)\s*(\d{4}\.\d{4,5})", " ".join((cls.__doc__ or "").split()))
    assert set(cited) == set(named), "the sources of the entry and of the docstring"
