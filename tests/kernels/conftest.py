from collections.abc import Iterator

import pytest
import torch

import emulated
import mtl_kernels as mk

IMPLEMENTATIONS = {
    "cpu": ("reference", "baseline", "avx2", "avx512", "emulated"),
    "cuda": ("reference", "triton", "cuda"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", IMPLEMENTATIONS[metafunc.config.getoption("device")], indirect=True)


@pytest.fixture(autouse=True)
def default_device(device: torch.device) -> Iterator[None]:
    """Tensors are created on the device of ``--device`` unless a test says otherwise."""
    if device.type == "cpu":
        yield
        return
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.fixture
def cpu_only(device: torch.device) -> None:
    """Skips a test that is about the CPU itself."""
    if device.type != "cpu":
        pytest.skip("about the CPU: threads, instruction sets, host memory or the choice of a backend there")


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend; the compiled one of the CPU is run with every instruction set of this processor."""
    if request.param == emulated.NAME and (reason := emulated.missing()) is not None:
        pytest.skip(reason)
    if request.param in mk.available_backends():
        if (reason := mk.available_backends()[request.param]) is not None:
            pytest.skip(f"backend {request.param}: {reason}")
        yield request.param
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
def threads(cpu_only: None) -> Iterator[None]:
    """Restores torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
