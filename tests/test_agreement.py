"""Every method and its independent oracle, over a few cases each; ``benchmarks.agreement`` takes thousands."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.agreement import main, run
from benchmarks.oracles import Agreement, agreements

CASES = 60


@pytest.mark.parametrize("agreement", agreements(), ids=lambda one: f"{one.method}-{one.oracle[:20]}")
def test_agrees(agreement: Agreement) -> None:
    found = run(agreement, CASES)
    largest = found["largest"]
    assert isinstance(largest, float)
    assert largest <= agreement.tolerance, f"seed {found['seed']}"


@pytest.mark.parametrize("deviation", [2.0, float("nan")])
def test_a_deviation_over_the_tolerance_is_seen(
    deviation: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def deviates(generator: np.random.Generator) -> float:
        return deviation if generator.integers(7) == 0 else 0.0

    wrong = Agreement("wrong", "itself", 1.0, deviates)
    monkeypatch.setattr("benchmarks.agreement.agreements", lambda: [wrong])
    threads = torch.get_num_threads()
    assert main(["wrong", "--cases", "50", "--quick", "--out", str(tmp_path), "--machine", "here"]) == 1
    (row,) = csv.DictReader((tmp_path / "here-agreement.csv").open())
    assert row["cases"] == "50" and row["effort"] == "quick" and row["machine"] == "here" and row["commit"]
    torch.set_num_threads(threads)
