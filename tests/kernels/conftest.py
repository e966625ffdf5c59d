from collections.abc import Iterator

import pytest
import torch

import mtl_kernels as mk


@pytest.fixture(params=["reference", "baseline", "avx2", "avx512"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend; the compiled one is run once with every instruction set of this processor."""
    if request.param == "reference":
        yield "reference"
        return
    if (reason := mk.available_backends()["cpu"]) is not None:
        pytest.skip(f"backend cpu: {reason}")
    from mtl_kernels import _cpu

    before = _cpu.instruction_set()
    try:
        _cpu.use_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        yield "cpu"
    finally:
        _cpu.use_instruction_set(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
