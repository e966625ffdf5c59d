"""Choosing a method: the list, by name, and what is said of each."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from mtl_optim import (
    Constant,
    PCGrad,
    catalog,
    cli,
    get_loss,
    get_method,
    list_losses,
    list_methods,
    losses,
    methods,
)


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
    end = lines.index("")
    assert re.match(r"name +class +needs", lines[1])
    assert [line.split()[0] for line in lines[2:end]] == methods.available()
    assert any("Constant(weights)" in line for line in lines)
    assert re.match(r"name +class +value", lines[end + 2])
    assert [line.split()[0] for line in lines[end + 3 :]] == losses.available()
    assert [line.split()[-1] for line in lines[end + 3 :] if line.startswith(("logsum", "stch"))] == ["yes", "no"]


def test_list_is_every_combination_of_losses() -> None:
    infos = list_losses()
    public = [getattr(losses, name) for name in losses.__all__ if isinstance(getattr(losses, name), type)]
    abstract = (losses.LossCombination, losses.SumOfTerms, losses.WeightedLosses, losses.LossAbout)
    assert {info.cls for info in infos} == {cls for cls in public if cls not in abstract}
    for info in infos:
        assert info.cls is losses.get(info.name) and all(len(text) > 3 for text in info[2:5])
        assert info.has_terms == issubclass(info.cls, losses.SumOfTerms)


def test_losses_by_name() -> None:
    found = get_loss("Uncertainty_Weighting", tasks=["depth", "pose"])
    assert isinstance(found, losses.UncertaintyWeighting) and found.tasks == ("depth", "pose")
    assert isinstance(get_loss("log-sum"), losses.LogSum)


@pytest.mark.parametrize("alias", catalog.LOSS_ALIASES)
def test_names_of_losses_elsewhere(alias: str) -> None:
    assert alias == catalog._plain(alias) and alias not in losses.available()
    assert alias not in [*methods.available(), *catalog.ALIASES]
    cls = losses.get(catalog.LOSS_ALIASES[alias])
    assert type(get_loss(alias.upper(), tasks=2)) is cls
    assert type(get_method(alias.upper(), tasks=2)) is cls


@pytest.mark.parametrize(
    ("call", "name", "text"),
    [
        (get_loss, "EW", r"'EW' is a method, .*get_method\('EW', ...\)"),
        (get_loss, "mgda", "is a method"),
        (get_loss, "logsun", "unknown combination of losses 'logsun'; did you mean logsum"),
        (get_loss, None, "expected the name of a combination of losses, found None"),
    ],
)
def test_the_other_kind_is_pointed_to(call: Callable[[object], object], name: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(name)


def test_options_of_losses_are_checked() -> None:
    with pytest.raises(TypeError, match=r"GradNorm has no option 'lrr'; .* did you mean lr\?"):
        get_loss("gradnorm", tasks=2, lrr=1)
    with pytest.raises(TypeError, match=r"FAMO needs tasks: get_loss\('famo', tasks=...\)"):
        get_loss("famo")
