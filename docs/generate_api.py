"""Writes docs/api.md from the docstrings; with ``--check`` it says whether the file is up to date."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import mtl_kernels  # noqa: E402
import mtl_optim  # noqa: E402
from mtl_optim import losses, methods  # noqa: E402

HEAD = """# API

Made from the docstrings by `python docs/generate_api.py`; do not edit. What the methods compute, and where from, is in
[docs/methods.md](methods.md).
"""
_SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields")
_WIDTH = 120
_BASES = (methods.Method, losses.LossCombination)
"""Classes whose entries say what those under them have as well."""


def main() -> int:
    """Writes the page, or with ``--check`` says whether it is as it would be written; returns the exit status."""
    if sys.argv[1:] == ["--check"]:
        if PAGE.exists() and PAGE.read_text() == page():
            return 0
        print("docs/api.md is not what the docstrings say; run: python docs/generate_api.py", file=sys.stderr)
        return 1
    PAGE.write_text(page())
    return 0


def page() -> str:
    """The page."""
    return "\n".join([HEAD, *contents()]).rstrip() + "\n"


def contents() -> Iterator[str]:
    """Its parts."""
    tools = [name for name in mtl_optim.__all__ if name not in methods.__all__ and name not in ("losses", "methods")]
    yield from part("mtl_optim", mtl_optim, tools)
    yield from part("mtl_optim: methods", methods, methods.__all__)
    yield from part("mtl_optim.losses", losses, losses.__all__)
    yield from part("mtl_kernels", mtl_kernels, [name for name in mtl_kernels.__all__ if name != "reference"])


def part(title: str, module: Any, names: Iterable[str]) -> Iterator[str]:
    """Everything of a module under one heading: classes first, in the order of their names."""
    yield f"## {title}\n"
    found = {name: getattr(module, name) for name in names}
    for name in sorted(found, key=lambda name: (not inspect.isclass(found[name]), name)):
        yield from entry(name, found[name])


def entry(name: str, thing: Any) -> Iterator[str]:
    """A class with its public methods, a function, or a constant."""
    if inspect.isclass(thing):
        yield f"### {name}\n"
        yield f"```text\n{wrapped(name, signature(thing, name))}\n```\n"
        yield markdown(inspect.getdoc(thing) or "")
        documented = {
            member for base in _BASES if issubclass(thing, base) and thing is not base for member in vars(base)
        }
        for member_name, member in vars(thing).items():
            if not member_name.startswith("_") and member_name not in documented:
                yield from member_entry(name, member_name, member)
    elif callable(thing):
        yield f"### {name}()\n"
        yield f"```text\n{wrapped(name, signature(thing, name))}\n```\n"
        yield markdown(inspect.getdoc(thing) or "")
    else:
        yield f"### {name}\n\n`{thing!r}`\n"


def member_entry(owner: str, name: str, member: Any) -> Iterator[str]:
    """A method or property that says something of itself."""
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    if not inspect.isfunction(function) or not function.__doc__:
        return
    if isinstance(member, property):
        returns = f" -> {annotation(function)}" if annotation(function) else ""
        shown = f"{owner}.{name}{returns}"
    else:
        shown = wrapped(f"{owner}.{name}", signature(function, name))
    yield f"#### {owner}.{name}\n"
    yield f"```text\n{shown}\n```\n"
    yield markdown(inspect.cleandoc(function.__doc__))


def signature(thing: Callable[..., Any], name: str) -> str:
    """The parameters as they are written, without self."""
    try:
        found = inspect.signature(thing)
    except ValueError:
        return "(...)"
    kept = [p for p in found.parameters.values() if p.name not in ("self", "cls")]
    shown = ", ".join(map(_spelled, _with_marks(kept)))
    returns = "" if inspect.isclass(thing) or not annotation(thing) else f" -> {annotation(thing)}"
    return f"({shown}){returns}"


def _with_marks(parameters: list[inspect.Parameter]) -> Iterator[inspect.Parameter | str]:
    """With the star in front of those that go by name alone."""
    starred = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not starred:
            yield "*"
            starred = True
        yield p


def _spelled(parameter: inspect.Parameter | str) -> str:
    if isinstance(parameter, str):
        return parameter
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    shown = stars + parameter.name
    if isinstance(parameter.annotation, str):  # others are spelled differently by different versions of Python
        shown += f": {parameter.annotation}"
    return shown if parameter.default is parameter.empty else f"{shown} = {parameter.default!r}"


def annotation(function: Any) -> str:
    """What a function returns, as it is written; empty where it does not say."""
    found = getattr(function, "__annotations__", {}).get("return", "")
    return found if isinstance(found, str) else ""


def wrapped(name: str, parameters: str) -> str:
    """A signature in lines that are not too long."""
    return textwrap.fill(name + parameters, _WIDTH, subsequent_indent="    ", break_long_words=False)


def markdown(doc: str) -> str:
    """A docstring as Markdown: sections are lists, literal blocks code."""
    parts = re.split(rf"^((?:{'|'.join(_SECTIONS)})[^\n]*):\n((?: {{4}}.*\n|\n)+)", doc + "\n", flags=re.MULTILINE)
    lines = [_prose(parts[0])]
    for title, body, after in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        inner = textwrap.dedent(body).strip("\n")
        listed = title.startswith(("Args", "Attributes", "Raises"))
        lines += [f"**{title}**\n", _items(inner) if listed else _prose(inner), _prose(after)]
    return "\n".join(line for line in lines if line.strip())


def _prose(text: str) -> str:
    """Paragraphs, and what follows a double colon as code."""
    parts = re.split(r"::\n\n((?:(?: {4}.*)?\n?)+)", _ticks(text) + "\n")
    shown = []
    for n, piece in enumerate(parts):
        if n % 2:
            shown.append(f"```text\n{textwrap.dedent(piece).strip()}\n```\n")
        elif piece.strip():
            shown.append(piece.strip() + (":\n" if n + 1 < len(parts) and piece.strip()[-1:] not in "." else "\n"))
    return "\n".join(shown)


def _items(text: str) -> str:
    """``name: what it is`` a bullet, with what is indented under it; a paragraph without a name stays one."""
    joined = re.sub(r"\n {2,}", " ", _ticks(text))  # a line that is indented goes on with the one before
    shown = [re.sub(r"^([\w*., ]+?): ", r"- `\1`: ", line) if line.strip() else line for line in joined.splitlines()]
    return "\n".join(shown) + "\n"


def _ticks(text: str) -> str:
    return text.replace("``", "`")


if __name__ == "__main__":
    sys.exit(main())
