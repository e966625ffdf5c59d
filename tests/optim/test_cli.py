"""The command line: help, info, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mtl_kernels
from mtl_kernels.backends import BACKENDS
from mtl_optim import cli

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    _, commands = cli._parsers()
    for name, parser in commands.items():
        with pytest.raises(SystemExit) as left:
            cli.main([name, "--help"])
        assert left.value.code == 0
        text = capsys.readouterr().out
        for action in parser._actions:
            assert action.help
            assert all(option in text for option in action.option_strings)


def test_top_level_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, expected in ((["--help"], "demo"), (["--help"], "info"), (["--version"], "0.")):
        with pytest.raises(SystemExit) as left:
            cli.main(argv)
        assert left.value.code == 0
        assert expected in capsys.readouterr().out


def test_help_does_not_import_what_only_the_demo_needs() -> None:
    code = "import sys, mtl_optim.cli as c; c._parsers(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "mtl_optim.cli" in modules
    assert not {"rich", "matplotlib", "sklearn", "mtl_optim.demo.run"} & set(modules)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("with_rich", [False, True])
def test_info_names_every_backend(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool, with_rich: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    if not with_rich:
        monkeypatch.setattr(cli, "find_spec", lambda name: None)
    monkeypatch.setattr(BACKENDS["cpu"], "missing", lambda: "no [compiler] here")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for name in mtl_kernels.available_backends():
        assert f"backend {name}" in text
    for expected in ("mtl-kernels", "torch", "threads", "CPU features", "no [compiler] here"):
        assert expected in text


def test_info_reports_a_backend_variable_that_cannot_be_met(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_KERNELS_BACKEND", "abacus")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "unknown backend 'abacus'" in text and "MTL_KERNELS_BACKEND" in text


def test_cpu_features_come_from_cpuinfo_or_torch(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Example\nflags\t\t: fpu avx2 fma nosuch\n")
    assert cli._cpu(cpuinfo) == ("Example", "avx2 fma")
    assert all(cli._cpu(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "COMMAND"),
        (["dance"], "dance"),
        (["demo", "--steps", "0"], "--steps 0 is out of range; expected at least 1"),
        (["demo", "--steps", "many"], "invalid int value: 'many'"),
        (["demo", "--batch-size", "0"], "--batch-size 0 is out of range; expected 1 to 4096"),
        (["demo", "--batch-size", "4097"], "--batch-size 4097"),
        (["demo", "--seed", "-1"], "--seed -1"),
        (["demo", "--seed", str(2**63)], "--seed 9223372036854775808"),
        (["demo", "--threads", "0"], "--threads 0"),
        (["demo", "--threads", "1000000"], "--threads 1000000"),
        (["demo", "--methods"], "--methods"),
        (["demo", "--methods", "sum", "alchemy"], "unknown method 'alchemy'; choose one of"),
        (["demo", "--methods", "sum", "SUM"], "names 'SUM' twice"),
        (["demo", "--methods", "constant"], "--methods constant: Constant needs weights"),
        (["demo", "--methods", "mgda:normalize=l3"], "--methods mgda:normalize=l3: MGDA: normalize='l3' is unknown"),
        (["demo", "--methods", "mgda:l2"], "expected NAME:option=value,option=value, found 'l2'"),
        (["demo", "--methods", "mgda:solver=exact", "MGDA:solver=exact"], "names 'MGDA:solver=exact' twice"),
        (["demo", "--backend", "abacus"], "unknown backend 'abacus'"),
        (["demo", "--output", __file__], "is not a folder"),
        (["demo", "--loud"], "--loud"),
    ],
)
def test_a_wrong_request_is_explained(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    assert left.value.code == 2
    found = capsys.readouterr()
    assert expected in found.err and "Traceback" not in found.err
    assert found.out == ""


def test_a_missing_backend_is_explained(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtl_kernels.dispatch, "_resolved", {})
    monkeypatch.setattr(BACKENDS["cpu"], "missing", lambda: "it was not built")
    with pytest.raises(SystemExit) as left:
        cli.main(["demo", "--backend", "cpu"])
    assert left.value.code == 2
    assert "it was not built" in capsys.readouterr().err


def test_missing_packages_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "sklearn" else object())
    with pytest.raises(SystemExit) as left:
        cli.main(["demo", "--output", str(tmp_path / "out")])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert 'needs scikit-learn; install with: pip install "mtl-kernels[demo]"' in error
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_made_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--output", str(Path(__file__) / "below")]) == 1
    assert "mtl-kernels demo: error:" in capsys.readouterr().err


def test_interruption(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mtl_optim.demo.run.run", interrupt)
    assert cli.main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err
