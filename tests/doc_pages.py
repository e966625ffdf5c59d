"""What the pages of the documentation hold: code blocks with their marks, links, headings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: of its first line of code, counted from 1.
        marks: of a comment in front of it, ``<!-- needs: torchjd; same: model -->``, by their names.
    """

    page: Path
    line: int
    kind: str
    code: str
    marks: dict[str, str]

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def needs(self) -> str:
        """What the block cannot run without: a package, "ranks", "gpu", "another" (page's test); empty for nothing."""
        return self.marks.get("needs", "")

    def side(self, sign: str) -> str:
        """Of a diff the code before it, ``"-"``, or after it, ``"+"``."""
        other = {"-": "+", "+": "-"}[sign]
        return "".join(
            "\n" if line.startswith(other) else line[1:] or "\n" for line in self.code.splitlines(keepends=True)
        )

    def run(self, code: str, names: dict[str, object]) -> None:
        """Runs code in these names, with line numbers that are those of the page."""
        exec(compile("\n" * (self.line - 1) + code, str(self.page), "exec"), names)


def blocks(page: Path, *kinds: str) -> list[Block]:
    """The blocks of some kinds, in order."""
    text = page.read_text()
    return [
        Block(page, text[: found.start("code")].count("\n") + 1, found["kind"], found["code"], _marks(found["mark"]))
        for found in _BLOCK.finditer(text)
        if found["kind"] in kinds
    ]


def _marks(comment: str | None) -> dict[str, str]:
    return dict(mark.split(": ", 1) for mark in comment.split("; ")) if comment else {}


def links(page: Path) -> Iterator[tuple[str, str]]:
    """File and anchor of every relative link; either may be empty."""
    for target in _LINK.findall(_without_code(page)):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            yield file, anchor


def anchors(page: Path) -> set[str]:
    """What links can point to in a page, as public hosts make it of the headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", _without_code(page), re.MULTILINE):
        base = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        name, number = base, 0
        while name in found:
            number += 1
            name = f"{base}-{number}"
        found.add(name)
    return found


def _without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
