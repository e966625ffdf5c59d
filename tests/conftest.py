import os
import zlib

import hypothesis
import pytest
import torch

import emulated
import interpreter
import mtl_kernels as mk
from mtl_kernels.backends import BACKENDS as IMPLEMENTATIONS

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True, max_examples=50)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

BACKENDS = ["reference", "cpu", "cuda", "triton", "emulated"]

if not torch.cuda.is_available():
    interpreter.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="where tests/kernels puts its tensors (default: cpu)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Random numbers of a test's own, the same in whichever order and process it runs."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of ``--device``."""
    return torch.device(request.config.getoption("device"))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Every backend that runs on this machine and device; any other is skipped with its reason."""
    if request.param == emulated.NAME:
        # By the device first: it takes addresses as they are, and is built when it is asked what it misses.
        reason = emulated.missing() if device.type == "cpu" else f"it runs on cpu tensors, these are on {device.type}"
    else:
        reason = mk.available_backends()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    if (reason := IMPLEMENTATIONS[request.param].refusal(device)) is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    if request.param == "triton" and interpreter.is_slow(request.node.name):
        pytest.skip("slow in Triton's interpreter, and nothing new")
    return request.param
