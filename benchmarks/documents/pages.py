"""Which blocks stand on which page."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from . import agreement, combinations, kernels, large_models, markdown, passes, ranks, solvers, steps
from .source import Results, Rows, setting

Block = Callable[[Results, Path], str]
"""The text of a block from results, for a page in a folder."""


def measured(kind: str, lines: Callable[[Rows], list[str]], picture: str = "") -> Block:
    """A table for every machine with results of a kind, the newest first, with a picture of that title."""

    def block(results: Results, folder: Path) -> str:
        parts: list[str] = []
        for machine, rows in results.of(kind):
            if found := lines(rows):
                parts += [f"**{machine}**: {setting(rows)}", "", *found]
                path = results.folder / f"{machine}-{kind}.png"
                if picture and path.is_file():
                    parts += [f"![{picture}, {machine}]({Path(os.path.relpath(path, folder)).as_posix()})", ""]
        where = f" on {results.machine}" if results.machine else ""
        return "\n".join(parts).rstrip() if parts else f"Not measured{where} so far."

    return block


PAGES: dict[str, dict[str, Block]] = {
    "docs/measured.md": {
        "gram and combine, float32": measured("kernels", kernels.float32, "Bandwidth of the kernels"),
        "gram and combine, bfloat16": measured("kernels", kernels.bfloat16),
        "two solvers": measured("kernels", combinations.two_solvers),
        "every solver": measured("solvers", solvers.lines, "Time of every method's weights"),
        "agreement": measured("agreement", agreement.lines),
        "whole combinations": measured("kernels", combinations.whole),
        "training steps": measured("steps", steps.lines),
        "ways to take a step: time": measured("passes", passes.time, "Ways to take a step"),
        "ways to take a step: memory": measured("passes", passes.memory),
        "ways to take a step: errors": measured("passes", passes.errors),
        "two ranks": measured("scaling", ranks.lines),
    },
    "docs/scaling.md": {
        "large models": lambda results, folder: "\n".join(large_models.lines()).rstrip(),
    },
}
"""By path and name of the block; paths are those in the repository."""


def text(old: str, page: str, results: Results, root: Path) -> str:
    """A page with its blocks anew.

    Raises:
        ValueError: a mark on it that is unknown, missing or not closed; see `markdown.renewed`.
    """
    folder = (root / page).parent
    try:
        return markdown.renewed(old, {name: block(results, folder) for name, block in PAGES[page].items()})
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from error
