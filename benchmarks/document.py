"""Writes the tables of docs/measured.md, docs/scaling.md and docs/evidence.md anew from the CSVs that are there.

    python benchmarks/document.py [--machine NAME] [--results FOLDER]

Tables stand between the lines ``<!-- begin: NAME -->`` and ``<!-- end -->`` of a page; everything else of it is written
by hand. docs/evidence.md is written as a whole, of the newest machine. `benchmarks/documents/pages.py` says which block
is where.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.documents import pages
from benchmarks.documents.source import Results
from benchmarks.provenance import ROOT
from benchmarks.training import evidence

EVIDENCE = "docs/evidence.md"


def texts(results: Results, root: Path = ROOT) -> dict[str, str]:
    """Every page with what the results make of it; docs/evidence.md only where there are trainings.

    Raises:
        ValueError: a mark of a page that is unknown, missing or not closed.
    """
    found = {page: pages.text((root / page).read_text(encoding="utf-8"), page, results, root) for page in pages.PAGES}
    if trained := results.of("train"):
        found[EVIDENCE] = evidence.text(results.folder, trained[0][0], root / EVIDENCE)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where a page has not the marks that it should have."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--machine", help="show its results alone (default: those of all machines, the newest first)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the CSVs")
    options = parser.parse_args(arguments)
    results = Results(options.results, options.machine)
    if not results.machines:
        known = ", ".join(Results(options.results).machines)
        parser.error(f"no results of {options.machine or 'any machine'} in {options.results}; there are: {known}")
    try:
        renewed = texts(results)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for page, text in renewed.items():
        path = ROOT / page
        changed = not path.is_file() or path.read_text(encoding="utf-8") != text
        if changed:
            path.write_text(text, encoding="utf-8")
        print(f"{page}: {'written' if changed else 'as it was'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
