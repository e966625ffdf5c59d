import pytest

from mtl_optim import MultiTaskOptimizer


@pytest.fixture(params=["harvest", "arena"])
def each_capture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test once with every way of capture as the default."""
    monkeypatch.setitem(MultiTaskOptimizer.__init__.__kwdefaults__, "capture", request.param)
    return request.param
