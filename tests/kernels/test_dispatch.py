import threading
from collections.abc import Iterator

import pytest
import torch

import mtl_kernels as mk
from mtl_kernels import dispatch
from mtl_kernels.backends import BACKENDS

CPU = torch.device("cpu")
ROWS = torch.randn(3, 10)

pytestmark = pytest.mark.usefixtures("cpu_only")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    dispatch._resolved.clear()
    yield
    dispatch._resolved.clear()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends that compute a Gram matrix, in order; the compiled one is made available."""
    names: list[str] = []
    for backend in BACKENDS.values():

        def gram_into(table, groups, out, name=backend.name) -> None:  # type: ignore[no-untyped-def]
            names.append(name)

        monkeypatch.setattr(backend, "gram_into", gram_into)
    monkeypatch.setattr(BACKENDS["cpu"], "missing", lambda: None)
    return names


@pytest.fixture
def without_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["cpu"], "missing", lambda: "no compiler was found; install g++")


def test_auto_takes_the_compiled_backend(seen: list[str]) -> None:
    mk.gram(ROWS)
    mk.gram(ROWS, backend="auto")
    mk.gram(ROWS.to("meta"))
    assert seen == ["cpu", "cpu", "reference"]


def test_argument_over_context_over_environment_over_auto(seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    mk.gram(ROWS)
    with mk.use_backend("cpu"):
        mk.gram(ROWS)
        mk.gram(ROWS, backend="reference")
    mk.gram(ROWS, backend="auto")
    with mk.use_backend("auto"):
        mk.gram(ROWS)
    mk.gram(ROWS)
    assert seen == ["reference", "cpu", "reference", "cpu", "cpu", "reference"]


def test_an_empty_environment_variable_is_none_at_all(seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "")
    mk.gram(ROWS)
    assert seen == ["cpu"]


def test_use_backend_nests_and_restores(seen: list[str]) -> None:
    with mk.use_backend("reference"):
        with mk.use_backend("cpu"):
            mk.gram(ROWS)
        mk.gram(ROWS)
        with mk.use_backend("auto"):
            mk.gram(ROWS)
        with pytest.raises(KeyError), mk.use_backend("cpu"):
            raise KeyError
        mk.gram(ROWS)
    mk.gram(ROWS)
    assert seen == ["cpu", "reference", "cpu", "reference", "cpu"]


def test_use_backend_belongs_to_its_thread(seen: list[str]) -> None:
    with mk.use_backend("reference"):
        thread = threading.Thread(target=mk.gram, args=(ROWS,))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"unknown backend 'cpuu'; expected one of auto, {', '.join(BACKENDS)}"
    with pytest.raises(ValueError, match=message):
        mk.gram(ROWS, backend="cpuu")
    with pytest.raises(ValueError, match=message):
        mk.combine(ROWS, torch.ones(3), backend="cpuu")
    with pytest.raises(ValueError, match=message):
        mk.min_norm_weights(torch.eye(2), backend="cpuu")
    with pytest.raises(ValueError, match=message), mk.use_backend("cpuu"):
        pass
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "cpuu")
    with pytest.raises(ValueError, match=message):
        mk.gram(ROWS)
    assert mk.gram(ROWS, backend="reference").shape == (3, 3)


@pytest.mark.parametrize("name", [3, None.__class__, b"cpu"])
def test_names_of_another_type(name: object) -> None:
    with pytest.raises((ValueError, TypeError), match="unknown backend"):
        mk.gram(ROWS, backend=name)  # type: ignore[arg-type]


def test_auto_falls_back(without_cpu: None) -> None:
    assert dispatch.resolve(CPU, None).name == "reference"
    assert mk.available_backends()["cpu"] == "no compiler was found; install g++"
    torch.testing.assert_close(mk.gram(ROWS), ROWS.double() @ ROWS.double().T)


def test_an_explicit_request_does_not_fall_back(without_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "backend 'cpu' is not available: no compiler was found; install g"
    with pytest.raises(RuntimeError, match=message):
        mk.gram(ROWS, backend="cpu")
    with pytest.raises(RuntimeError, match=message), mk.use_backend("cpu"):
        pass
    assert dispatch.resolve(torch.device("cpu"), None).name == "reference"
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "cpu")
    with pytest.raises(RuntimeError, match=message):
        mk.gram(ROWS)
    with pytest.raises(RuntimeError, match=message):
        mk.pcgrad_weights(torch.eye(2))


def test_a_backend_that_does_not_run_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["cpu"], "missing", lambda: None)
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot take meta tensors: it runs on cpu tensors"):
        mk.gram(ROWS.to("meta"), backend="cpu")


def test_the_choice_for_the_cpu_asks_for_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for one starts it, and a process that did so cannot be forked for work on the GPU."""

    def ask(*arguments: object) -> None:
        pytest.fail("asked for a driver")

    for name in ("cuda", "triton"):
        monkeypatch.setattr(BACKENDS[name], "missing", ask)
        monkeypatch.setattr(BACKENDS[name], "refusal", ask)
    mk.gram(ROWS)
    mk.gram(ROWS, backend="reference")
    mk.pcgrad_weights(torch.eye(2))
    mk.gram(ROWS.to("meta"))


def test_a_gpu_backend_asked_for_on_the_cpu_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["cuda"], "missing", lambda: "no NVIDIA driver was found")
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: no NVIDIA driver was found"):
        mk.gram(ROWS, backend="cuda")
    monkeypatch.setattr(BACKENDS["cuda"], "missing", lambda: None)
    with pytest.raises(RuntimeError, match="'cuda' cannot take cpu tensors: it runs on cuda tensors; or choose"):
        mk.gram(ROWS, backend="cuda")


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_a_device_without_float64(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"float64, which mps does not have; move them to the CPU with \.cpu\(\)$"):
        dispatch.resolve(torch.device("mps"), name)
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot take mps tensors: it runs on cpu tensors$"):
        dispatch.resolve(torch.device("mps"), "cpu")


@pytest.mark.parametrize("operation", ["combine", "solve"])
def test_a_refused_device_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    """MPS raises on its own at the conversion to float64, with a text that does not say what to do."""

    def refuse(device: torch.device, backend: str | None) -> None:
        raise RuntimeError("refused")

    def convert(*arguments: object) -> None:
        pytest.fail("converted to float64")

    monkeypatch.setattr(dispatch, "resolve", refuse)
    monkeypatch.setattr(torch.Tensor, "to", convert)
    with pytest.raises(RuntimeError, match="refused"):
        if operation == "combine":
            mk.combine(ROWS, torch.ones(3), scale=torch.ones(1))
        else:
            mk.pcgrad_weights(torch.eye(2))


def test_a_failed_request_leaves_the_output_alone(without_cpu: None) -> None:
    out = torch.full((10,), 5.0)
    with pytest.raises(RuntimeError, match="not available"):
        mk.combine(ROWS, torch.ones(3), out=out, backend="cpu")
    assert (out == 5).all()


def test_available_backends() -> None:
    found = mk.available_backends()
    assert list(found) == list(BACKENDS) and found["reference"] is None
    found["reference"] = "changed"
    assert mk.available_backends()["reference"] is None


def test_reference_module_is_the_reference_backend(seen: list[str]) -> None:
    gram = mk.reference.gram(ROWS)
    assert mk.reference.statistics(ROWS).gram.equal(gram)
    assert mk.reference.gram_solve(ROWS, mk.SolverCall("pcgrad", (0.0, 0.0)))[0].equal(gram)
    assert seen == ["reference"] * 3
    assert mk.reference.norms is mk.norms and mk.reference.cosines is mk.cosines
    assert mk.reference.combine(ROWS, torch.ones(3)).shape == (10,)
    torch.testing.assert_close(mk.reference.min_norm_weights(torch.eye(2)).weights, torch.full((2,), 0.5).double())
    assert mk.reference.pcgrad_weights(torch.eye(2)).tolist() == [1, 1]
    with pytest.raises(AttributeError, match="nothing"):
        _ = mk.reference.nothing
