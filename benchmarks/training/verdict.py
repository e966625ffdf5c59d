"""When not to combine gradients, as far as the tables show it: what was better on every seed, and the cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from .costs import by_method, step_ms, value
from .jobs import PLAIN, SINGLE, TUNED
from .scores import SUM, Scores

BASELINES = (SINGLE, SUM, TUNED, PLAIN)


def compared(one: Scores, method: str, baseline: str) -> int | None:
    """1 where every seed of a method has a better Delta-m than every seed of a baseline, -1 where a worse one, or 0.

    None where one of them was not trained, or Delta-m is not defined.
    """
    own, other = one.delta(method, SUM), one.delta(baseline, SUM)
    if own is None or other is None or any(x != x for x in (own.mean, other.mean)):
        return None
    return 1 if own.least > other.most else -1 if own.most < other.least else 0


def lines(runs: Sequence[dict[str, str]], found: dict[str, Scores]) -> list[str]:
    """The section."""
    methods = list(
        dict.fromkeys(m for one in found.values() for m in one.methods if m not in BASELINES and "/" not in m)
    )
    if not methods or not any(SUM in one.test for one in found.values()):
        return []
    counts = {base: _counts(found, methods, base) for base in (SUM, TUNED, SINGLE)}
    said = [
        "## When not to combine gradients",
        "",
        "*Better* or *worse* means on every seed than every seed of the baseline, by Delta-m; all else is equal. "
        f"{_luck(found)}",
        "",
    ]
    for base, name in ((SUM, "the plain sum"), (TUNED, "fixed weights tuned on validation data"),
                       (SINGLE, "a network for every task")):  # fmt: skip
        if total := sum(map(len, counts[base].values())):
            better, equal, worse = (len(counts[base][sign]) for sign in (1, 0, -1))
            said.append(
                f"- **Against {name}**: of {total} pairs of a workload and a method, {better} are better, "
                f"{equal} equal "
                f"and {worse} worse.{_named(' Better: ', counts[base][1])}{_named(' Worse: ', counts[base][-1])}"
            )
    said += [*_nothing_gained(found, methods), *_agreeing(runs, found, methods), *_costs(runs, methods)]
    said += [*_nothing_shared(runs), ""]
    return said


def _luck(found: dict[str, Scores]) -> str:
    """How often two equal methods would look different."""
    seeds = max(len(one.test[SUM]) for one in found.values() if SUM in one.test)
    pairs = math.comb(2 * seeds, seeds)
    return f"With {seeds} seeds, equal methods look better by chance in one of {pairs} pairs, and worse as often."


def _counts(found: dict[str, Scores], methods: Sequence[str], base: str) -> dict[int, list[tuple[str, str]]]:
    counts: dict[int, list[tuple[str, str]]] = {1: [], 0: [], -1: []}
    for name, one in found.items():
        for method in methods:
            if (sign := compared(one, method, base)) is not None:
                counts[sign].append((name, method))
    return counts


def _named(before: str, pairs: Sequence[tuple[str, str]]) -> str:
    """The pairs, by method; nothing where there are none."""
    by: dict[str, list[str]] = {}
    for workload, method in pairs:
        by.setdefault(method, []).append(workload)
    return before + "; ".join(f"{method} on {', '.join(names)}" for method, names in by.items()) + "." if by else ""


def _nothing_gained(found: dict[str, Scores], methods: Sequence[str]) -> list[str]:
    """Workloads on which no method was better than the sum."""
    signs = {name: [compared(one, method, SUM) for method in methods] for name, one in found.items()}
    known = {name: [sign for sign in own if sign is not None] for name, own in signs.items()}
    nothing = [name for name, own in known.items() if own and max(own) < 1]
    if not nothing:
        return []
    return [
        f"- **No method was better than the plain sum** on {', '.join(nothing)}: there the sum, which is "
        "cheaper, will do."
    ]


def _costs(runs: Sequence[dict[str, str]], methods: Sequence[str]) -> list[str]:
    """What a step that combines takes over a plain one."""
    grouped = by_method(runs)
    ratios: dict[str, tuple[int, float]] = {}
    for workload in dict.fromkeys(name for name, _ in grouped):
        plain = step_ms(grouped.get((workload, PLAIN), []))
        own = [time for method in methods if (time := step_ms(grouped.get((workload, method), []))) is not None]
        if plain and own:
            ratios[workload] = (int(grouped[workload, PLAIN][0]["K"]), statistics.median(own) / plain)
    if not ratios:
        return []
    told = ", ".join(
        f"{ratio:.1f} ({name}, K = {k})" for name, (k, ratio) in sorted(ratios.items(), key=lambda r: r[1][1])
    )
    return [
        f"- **A step costs** a multiple of a plain one with a single backward pass, median over the methods: {told}."
    ]


def _agreeing(runs: Sequence[dict[str, str]], found: dict[str, Scores], methods: Sequence[str]) -> list[str]:
    """Workloads whose tasks do not conflict on average, and whether a method was better there all the same."""
    grouped = by_method(runs)
    conflicts = {name: value(grouped.get((name, SUM), []), "conflicts") for name in found}
    agreeing = [name for name, share in conflicts.items() if share == 0]
    if not agreeing:
        return []
    better = [(name, m) for name in agreeing for m in methods if compared(found[name], m, SUM) == 1]
    of = f"{len(better)} of {len(agreeing) * len(methods)} pairs were better than the sum"
    return [f"- **Tasks agree on average** (no pair with a mean cosine below 0) on {', '.join(agreeing)}: there {of}."]


def _nothing_shared(runs: Sequence[dict[str, str]]) -> list[str]:
    names = list(dict.fromkeys(row["workload"] for row in runs if row.get("shared") == "0"))
    return [f"- **Nothing is shared** on {', '.join(names)}: there every method is the plain sum."] if names else []
