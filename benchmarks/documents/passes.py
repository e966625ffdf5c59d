"""Ways to take a step: time, memory, and how far their problem is from that over all rows."""

from __future__ import annotations

from .markdown import short, table
from .source import Row, Rows, distinct, number

FLOOR = "K backwards"
_ERRORS = {"gradient_error": "the trunk's gradient", "gram_error": "the Gram matrix", "weights_error": "the weights"}
_EXACT = ("harvest", "factored", "factored, loop", "factored, batched")


def time(rows: Rows) -> list[str]:
    """Ratios to K backward passes."""
    modes = [mode for mode in _modes(rows) if mode != FLOOR]
    cells = [
        [network, k, short(number(of.get(FLOOR), "median_ms")), *(_ratio(of.get(mode)) for mode in modes)]
        for (network, k), of in _cases(rows).items()
    ]
    return table(("network", "K", f"{FLOOR}, ms", *modes), cells)


def memory(rows: Rows) -> list[str]:
    """Peaks of the numbers of tasks for which they were measured."""
    modes = _modes(rows)
    cells = [
        [network, k, *(short(number(of.get(mode), "peak_mb")) for mode in modes)]
        for (network, k), of in _cases(rows).items()
        if any(number(row, "peak_mb") is not None for row in of.values())
    ]
    return table(("network", "K", *modes), cells) if cells else []


def errors(rows: Rows) -> list[str]:
    """Of exact ways the largest errors; of the others cosines, signs and angles."""
    exact = [row for row in rows if row["mode"] in _EXACT]
    largest = {
        name: max((value for row in exact if (value := number(row, column)) is not None), default=None)
        for column, name in _ERRORS.items()
    }
    told = ", ".join(f"{value:.1e} of {name}" for name, value in largest.items() if value is not None)
    modes = [mode for mode in _modes(rows) if any(row["mode"] == mode and row["cosine"] for row in rows)]
    cells = [[network, k, *(_apart(of.get(mode)) for mode in modes)] for (network, k), of in _cases(rows).items()]
    said = [f"Largest errors of exact ways against a float64 copy of the network: {told}.", ""] if told else []
    return [*said, *(table(("network", "K", *modes), cells) if modes else [])]


def _modes(rows: Rows) -> list[str]:
    return distinct(rows, "mode")


def _cases(rows: Rows) -> dict[tuple[str, str], dict[str, Row]]:
    """The rows by network and K, then by mode."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["mode"]:  # or it says that nothing was measured
            found.setdefault((row["network"], row["K"]), {})[row["mode"]] = row
    return found


def _ratio(row: Row | None) -> str:
    found = number(row, "ratio_to_K_backwards")
    return "" if found is None else f"{found:.2f}"


def _apart(row: Row | None) -> str:
    cosine, turned = number(row, "cosine"), number(row, "turned_degrees")
    if row is None or cosine is None or turned is None:
        return ""
    return f"{cosine:.2g} ({row['flips']}), {turned:.1f}"
