import re

import pytest
import torch

import mtl_kernels as mk
from mtl_kernels import config
from mtl_kernels.backends import BACKENDS


def test_show_config_names_versions_threads_and_backends() -> None:
    text = mk.show_config()
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines())
    assert facts["torch"] == torch.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", facts["mtl-kernels"])
    assert facts["threads"] == str(torch.get_num_threads())
    assert facts["backend reference"] == "available"
    assert facts["instruction set"]
    assert set(facts) >= {f"backend {name}" for name in mk.available_backends()}


def test_show_config_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["cpu"], "missing", lambda: "install a compiler")
    assert config.config()["backend cpu"] == "not available: install a compiler"


def test_the_missing_module_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    from mtl_kernels.backends import cpu

    monkeypatch.setitem(sys.modules, "mtl_kernels._cpu", None)
    monkeypatch.delattr(sys.modules["mtl_kernels"], "_cpu", raising=False)
    try:
        importlib.reload(cpu)
        assert "compiler" in cpu.CpuBackend().missing() and cpu.instruction_set() is None
    finally:
        monkeypatch.undo()
        importlib.reload(cpu)
