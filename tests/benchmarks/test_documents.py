"""Pages of measurements: tables of rows, blocks between marks, and pages that are what the results make them."""

import csv
import importlib
from pathlib import Path

import pytest

from benchmarks import document, results
from benchmarks.documents import agreement, combinations, kernels, markdown, pages, passes, ranks, solvers, steps
from benchmarks.documents.source import Results, Row, setting
from benchmarks.provenance import ROOT

FACTS = {"cpu": "Some CPU", "threads": "2", "instruction_set": "avx2", "torch": "2.13", "mtl_kernels": "0.1",
         "commit": "abc", "date": "2026-11-29T01:00:00+00:00"}  # fmt: skip


def rows(head: str, *lines: str) -> list[Row]:
    """Rows of a table in which a dash is an empty cell."""
    names = head.split()
    return [
        dict(zip(names, (cell if cell != "-" else "" for cell in line.split()), strict=True)) | FACTS for line in lines
    ]


KERNELS = rows(
    "kernel provider K N dtype median_us ratio budget times_ours correct",
    "gram mtl-kernels 2 1000 float32 1 9 - - True",
    "gram mtl-kernels 2 1000000 float32 820 1.5 1.1 - True",
    "gram torch 2 1000000 float32 1640 - - - False",
    "combine mtl-kernels 2 1000000 float32 400 0.9 1.1 - True",
    "combine torch 2 1000000 float32 1000 - - 2.5 True",
    "pcgrad mtl-kernels 2 0 float64 4.7 - 5 - True",
    "pcgrad torchjd 2 0 float64 31 - - 6.6 True",
    "mgda_step mtl-kernels 2 1000 float32 37 - - - True",
    "mgda_step torchjd 2 1000 float32 74 - - - False",
)
SOLVERS = rows(
    "method provider K batch median_us times_ours gap",
    "mgda mtl-kernels 8 1 20 - 6e-16",
    "mgda torchjd 8 1 4000 200 -",
    "mgda mtl-kernels 8 64 90 - 1e-16",
    "krum mtl-kernels 2 - - - -",
)
STEPS = rows(
    "method provider K median_ms combine_ms ratio_to_K_backwards",
    "mgda K_backwards 3 100 - 1",
    "mgda mtl-kernels 3 106 5 1.06",
)
PASSES = rows(
    "network K mode median_ms ratio_to_K_backwards peak_mb gradient_error gram_error weights_error cosine flips "
    "turned_degrees",
    "net 3 K_backwards 100 1 50 - - - - - -",
    "net 3 harvest 110 1.1 60 1e-6 2e-6 - - - -",
    "net 3 features 50 0.5 - - - - 0.2 2 1.25",
    "net 8 - - - - - - - - - -",
)
for row in [*STEPS, *PASSES]:
    for name in ("provider", "mode"):
        if name in row:
            row[name] = row[name].replace("K_b", "K b")
RANKS = rows("network K ranks mode median_ms ratio", "net 8 2 ours 690 1.07")
AGREEMENT = rows("method oracle cases median largest tolerance", "mgda nnls 10000 0.0 5.9e-16 1e-13")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (kernels.float32(KERNELS), ["| 2 | 8 | 0.82 | 1.50 | 1.1 | 1.64, wrong | 0.4 | 0.90 | 1.1 | 1 (2.5x) |  |"]),
        (combinations.two_solvers(KERNELS), ["mtl-kernels | 4.7 |", "torchjd | 31 |", "budget | 5 |"]),
        (combinations.whole(KERNELS), ["| MGDA | mtl-kernels | 1,000 | 0.037 |", "| 1,000 | 0.074, wrong |"]),
        (solvers.lines(SOLVERS), ["| mgda | 20 | 90 | 6e-16 | 4000 (200x) |"]),
        (steps.lines(STEPS), ["| 3 | mgda |  | 100 | 106 | 5 | 1.06 |  |  |"]),
        (passes.time(PASSES), ["| net | 3 | 100 | 1.10 | 0.50 |"]),
        (passes.memory(PASSES), ["| net | 3 | 50 | 60 |  |"]),
        (passes.errors(PASSES), ["1.0e-06 of the trunk's gradient, 2.0e-06 of the Gram", "| net | 3 | 0.2 (2), 1.2 |"]),
        (ranks.lines(RANKS), ["| net | 8 | 2 | ours | 690 | 1.07 |"]),
        (agreement.lines(AGREEMENT), ["| mgda | nnls | 10,000 | 0 | 5.9e-16 | 1e-13 |"]),
    ],
)
def test_tables_of_a_few_rows(lines: list[str], expected: list[str]) -> None:
    text = "\n".join(lines)
    for part in expected:
        assert part in text
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and "krum" not in text and "net | 8 | |" not in text


def test_a_table_without_rows_of_its_kind_is_none() -> None:
    assert kernels.bfloat16(KERNELS) == combinations.whole([]) == passes.memory([]) == []


def store(folder: Path, machine: str, table: list[Row], **facts: str) -> None:
    with (folder / f"{machine}-steps.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*table[0], *(name for name in facts if name not in table[0])])
        writer.writeheader()
        writer.writerows(row | facts for row in table)


def test_a_block_has_every_machine_the_newest_first(tmp_path: Path) -> None:
    store(tmp_path, "old", STEPS)
    store(tmp_path, "new", STEPS, date="2026-12-01T01:00:00+00:00", effort="quick")
    (tmp_path / "old-steps.png").touch()
    block = pages.measured("steps", steps.lines, "Steps")
    text = block(Results(tmp_path), tmp_path)
    assert text.index("**new**") < text.index("**old**") and text.count("| mgda |") == 2
    quick, full = text.split("**old**")
    assert "A quick look" in quick and "A quick look" not in full and "![Steps, old](old-steps.png)" in full
    assert "Some CPU, 2 threads, avx2; torch 2.13, mtl-kernels 0.1, commit abc, 2026-12-01." in quick
    assert "**new**" not in block(Results(tmp_path, "old"), tmp_path)
    assert block(Results(tmp_path, "other"), tmp_path) == "Not measured on other so far."
    assert Results(tmp_path).machines == ["new", "old"]


def test_what_rows_say_of_their_machine() -> None:
    later = {"commit": "def", "date": "2026-11-30T01:00:00+00:00"}
    said = setting([FACTS | {"threads": "1"}, FACTS | {"threads": "1"} | later])
    assert said.endswith("1 thread, avx2; torch 2.13, mtl-kernels 0.1, commit abc, def, 2026-11-29 to 2026-11-30.")


@pytest.mark.parametrize(("told", "ending"), [("avx2", "cores-avx2"), ("none (no compiled CPU backend)", "cores")])
def test_a_machine_is_named_after_its_instruction_set(told: str, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("mtl_kernels.config")
    facts = module.config() | {"instruction set": told}
    monkeypatch.setattr(module, "config", lambda: facts)
    found = results.environment(None)
    assert str(found["machine"]).endswith(ending) and found["effort"] == "full"
    assert results.environment("here", quick=True).items() >= {"machine": "here", "effort": "quick"}.items()


PAGE = "before\n<!-- begin: a -->\nold\n<!-- end -->\nbetween\n<!-- begin: b -->\n<!-- end -->\n"


def test_blocks_are_replaced_and_nothing_else() -> None:
    text = markdown.renewed(PAGE, {"a": "new", "b": "x\ny\n"})
    assert text == PAGE.replace("old", "new").replace("b -->\n", "b -->\nx\ny\n")
    assert markdown.renewed(text, {"a": "new", "b": "x\ny"}) == text


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (PAGE.replace(": b", ": c"), "line 6: no block is named 'c'; there are a, b"),
        (PAGE.replace(": b", ": a"), "for the second time"),
        (PAGE.partition("between")[0], "no line <!-- begin: NAME --> for: b"),
        (PAGE.replace("<!-- end -->\nbetween", "between"), "line 5: block 'b' begins where 'a' has not ended"),
        (PAGE.rpartition("<!-- end -->")[0], "block 'b' is not closed"),
        (f"{PAGE}<!-- end -->\n", "ends no block"),
    ],
)
def test_marks_that_are_wrong_are_refused(page: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        markdown.renewed(page, {"a": "", "b": ""})


def test_the_pages_are_what_the_results_make_them() -> None:
    for page, text in document.texts(Results(ROOT / "benchmarks" / "results")).items():
        assert (ROOT / page).read_text(encoding="utf-8") == text, f"{page}: run python benchmarks/document.py"


def test_a_machine_without_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(tmp_path, "here", STEPS)
    with pytest.raises(SystemExit):
        document.main(["--machine", "her", "--results", str(tmp_path)])
    assert "no results of her" in capsys.readouterr().err
