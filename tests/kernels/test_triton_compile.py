"""Every Triton kernel is compiled for two generations of GPUs, without one, and its machine code looked at.

In processes of their own: this one has Triton's interpreter on.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import interpreter

triton = interpreter.require_triton()

SCRIPT = Path(__file__).parent.parent / "triton_compiler.py"


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What became of every kernel for one architecture: name, registers, spilled bytes, widest load."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(request.param)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize(
    "kernels", [90, pytest.param(100, marks=pytest.mark.exhaustive)], indirect=True, ids="sm_{}".format
)
def test_kernels_compile_without_spills_and_read_16_bytes_at_a_time(kernels: list[dict[str, Any]]) -> None:
    # The shapes are chosen for triton 3.6; other versions spill up to some ten bytes of the largest.
    gated = ("gram", "sums", "combine") if triton.__version__.startswith("3.6.") else ()
    assert {kernel["kind"] for kernel in kernels} == {
        *("gram", "sums", "combine", "columns", "state", "pcgrad", "min_norm")
    }
    for kernel in kernels:
        assert kernel["cubin"], kernel
        assert not kernel["bytes_a_thread"] or kernel["bytes_a_thread"] >= 8, kernel
        assert kernel["spilled"] == 0 or kernel["kind"] not in gated, kernel
        # On sm_100 a thread loads less where there are two panels.
        if kernel["kind"] in ("gram", "combine") and kernel["bytes_a_thread"] >= 16:
            assert kernel["wide_loads"], kernel
        if kernel["kind"] in ("combine", "state"):
            assert kernel["wide_stores"], kernel
