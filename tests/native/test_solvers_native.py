"""Compiles solvers_test.cpp against the solver headers alone, under the sanitizers, and runs it."""

from pathlib import Path

import pytest
from compiling import check, sanitizing_compiler


@pytest.mark.exhaustive
def test_solvers_under_sanitizers(tmp_path: Path) -> None:
    program = tmp_path / "solvers_test"
    source = Path(__file__).parent / "solvers_test.cpp"
    check(*sanitizing_compiler("address,undefined", tmp_path), "-O0", "-Werror", source, "-o", program)
    check(program)
