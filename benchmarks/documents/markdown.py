"""Markdown: tables, and the marked blocks of a page that are written anew."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

BEGIN = re.compile(r"<!-- begin: (.+) -->")
END = "<!-- end -->"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table, with an empty line behind it."""
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def short(value: float | None) -> str:
    """Three digits that count, and all of those before the point; nothing for None."""
    return "" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def times(value: float | None) -> str:
    """Something over ours, as in "2.3x"; nothing for None."""
    return "" if value is None else f"{value:.{0 if value >= 10 else 1}f}x"


def renewed(text: str, blocks: Mapping[str, str]) -> str:
    """A page with these texts between its lines ``<!-- begin: NAME -->`` and ``<!-- end -->``, in place of the old.

    Raises:
        ValueError: a mark of another name, one that is missing, there twice, or not closed.
    """
    lines: list[str] = []
    seen: list[str] = []
    inside = ""
    for number, line in enumerate(text.splitlines(), 1):
        mark = BEGIN.fullmatch(line)
        if mark is not None:
            name = mark[1]
            if inside:
                raise ValueError(f"line {number}: block {name!r} begins where {inside!r} has not ended; expected {END}")
            if name not in blocks:
                raise ValueError(f"line {number}: no block is named {name!r}; there are {', '.join(blocks)}")
            if name in seen:
                raise ValueError(f"line {number}: block {name!r} is there for the second time")
            seen.append(name)
            inside = name
            lines += [line, *blocks[name].rstrip("\n").split("\n"), END]
        elif line == END:
            if not inside:
                raise ValueError(f"line {number}: {END} ends no block")
            inside = ""
        elif not inside:
            lines.append(line)
    if inside:
        raise ValueError(f"block {inside!r} is not closed; expected a line {END}")
    if missing := [name for name in blocks if name not in seen]:
        raise ValueError(f"no line <!-- begin: NAME --> for: {', '.join(missing)}")
    return "\n".join(lines) + "\n"
