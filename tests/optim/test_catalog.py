"""Choosing a method: the list, by name, and what is said of each."""

from __future__ import annotations

import re

import pytest

from mtl_optim import Constant, PCGrad, catalog, cli, get_method, list_methods, methods


def test_list_is_every_method() -> None:
    infos = list_methods()
    assert [info.name for info in infos] == methods.available()
    for info in infos:
        assert info.cls is methods.get(info.name)
        assert all(len(text) > 3 for text in (info.needs, info.state, info.guarantee, info.cost))


@pytest.mark.parametrize("info", [info for info in list_methods() if not info.arguments], ids=lambda info: info.name)
def test_what_is_said_holds(info: catalog.MethodInfo) -> None:
    method = get_method(info.name)
    assert method.needs_gram == ("Gram" in info.needs) and method.needs_losses == ("losses" in info.needs)


def test_by_name() -> None:
    assert isinstance(get_method("PCGrad"), PCGrad) and isinstance(get_method("pc_grad"), PCGrad)
    assert get_method("mgda", normalize="l2").config()["normalize"] == "l2"
    assert isinstance(get_method("constant", weights=[1.0, 2.0]), Constant)


@pytest.mark.parametrize("alias", catalog.ALIASES)
def test_names_of_other_libraries(alias: str) -> None:
    assert alias == catalog._plain(alias) and alias not in methods.available()
    assert catalog.ALIASES[alias] in methods.available()
    assert type(get_method(alias.upper())) is methods.get(catalog.ALIASES[alias])


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [
        ("pcgard", {}, ValueError, "unknown method 'pcgard'; did you mean pcgrad"),
        ("alchemy", {}, ValueError, "unknown method 'alchemy'; choose one of .*constant, "),
        (3, {}, ValueError, "expected the name of a method, found 3"),
        ("mgda", {"normalise": "l2"}, TypeError, "MGDA has no option 'normalise'; .* did you mean normalize?"),
        ("sum", {"c": 1}, TypeError, "Sum has no option 'c'; its options are none"),
        ("constant", {}, TypeError, r"Constant needs weights: get_method\('constant', weights=...\)"),
        ("mgda", {"normalize": "l3"}, ValueError, "'l3'"),
    ],
)
def test_what_is_refused(name: str, options: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        get_method(name, **options)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"name +class +needs", lines[0]) and len(lines) == 1 + len(methods.available())
    assert [line.split()[0] for line in lines[1:]] == methods.available()
    assert any("Constant(weights)" in line for line in lines)
