"""The documentation holds: its code runs, its links lead somewhere, its tables and messages are those of the code."""

from __future__ import annotations

import ast
import importlib.util
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from doc_pages import PAGES, ROOT, Block, anchors, blocks, links
from mtl_kernels.version import __version__
from mtl_optim import get_method, list_losses, list_methods, losses, methods

ELSEWHERE = {"trainers.md"}
"""Pages whose code has tests of its own, as it needs packages that are not always there."""

RUN = [page for page in PAGES if page.name not in ELSEWHERE and blocks(page, "python", "diff")]
NEEDY = [block for page in RUN for block in blocks(page, "python", "diff") if block.needs]


def session(page: Path, until: int | None = None) -> dict[str, Any]:
    """What the blocks of a page leave behind, run one after the other; of a diff both sides run, the new one counts.

    Blocks that need more than the package are left out, and those from line ``until`` on.
    """
    names: dict[str, Any] = {"__name__": "__main__"}  # which is there: dataclasses look
    for block in blocks(page, "python", "diff"):
        if block.needs or (until is not None and block.line >= until):
            continue
        if block.kind == "diff":
            block.run(block.side("-"), dict(names))
            block.run(block.side("+"), names)
        else:
            block.run(block.code, names)
    return names


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that examples write land in a folder of their own."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_code_runs(page: Path) -> None:
    session(page)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torchrun tells a process, here the only one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("block", NEEDY, ids=str)
def test_code_that_needs_more_runs(block: Block, request: pytest.FixtureRequest) -> None:
    if block.needs == "ranks":
        request.getfixturevalue("ranks")
    elif block.needs == "gpu":
        compile(block.code, str(block.page), "exec")
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
    elif block.kind == "diff":
        after = session(block.page, block.line)
        block.run(block.side("+"), after)
    if block.kind == "python":
        block.run(block.code, session(block.page, block.line))
        return
    if importlib.util.find_spec(block.needs) is None:
        pytest.skip(f"the code before the change needs {block.needs}")
    before = session(block.page, block.line)
    block.run(block.side("-"), before)
    if name := block.marks.get("same"):
        mine, theirs = after[name].state_dict(), before[name].state_dict()
        start = session(block.page, block.line)[name].state_dict()
        assert any(not torch.equal(mine[key], start[key]) for key in start)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_example_of_the_readme_prints_its_report(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks(ROOT / "README.md", "python")
    example.run(example.code, {})
    printed = capsys.readouterr().out
    assert "depth" in printed and "normals" in printed


def test_the_report_that_is_shown_has_the_form_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "quickstart.md"
    setup, change = blocks(page, "python")[0], blocks(page, "diff")[0]
    names: dict[str, object] = {}
    torch.manual_seed(0)
    setup.run(setup.code, names)
    change.run(change.side("+"), names)
    (shown,) = blocks(page, "text")
    assert form(capsys.readouterr().out) == form(shown.code)


def form(text: str) -> list[str]:
    """Text without its numbers and widths."""
    return re.sub(r"[+-]?\d[\d.e+-]*", "0", text).split()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for file, anchor in links(page):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name} links to {file}"
        assert target.is_relative_to(ROOT), f"{page.name} links out of the project: {file}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {file}#{anchor}"


def test_every_page_is_linked_from_another_one() -> None:
    linked = {(page.parent / file).resolve() for page in PAGES for file, _ in links(page) if file}
    assert not [page.name for page in PAGES if page not in linked and page.name != "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_there(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = set(re.findall(r'add_parser\(\s*"(\w+)"', (ROOT / "python/mtl_optim/cli.py").read_text()))
    text = page.read_text()
    for asked in re.findall(r"(?:^|`|=\S+ )make ([a-z]+)", text, re.MULTILINE):
        assert asked in targets, f"{page.name}: make {asked}"
    for asked in re.findall(r"(?:^|`)mtl-kernels (\w+)", text, re.MULTILINE):
        assert asked in commands, f"{page.name}: mtl-kernels {asked}"
    for asked in re.findall(r"python ((?:benchmarks|release|docs)/\w+\.py)", text):
        assert (ROOT / asked).exists(), f"{page.name}: {asked}"


def test_the_readme_names_every_method() -> None:
    named = {plain(name) for name in re.findall(r"[\w-]+(?: mean)?", row("README.md", "methods"))}
    others = {"sum", "mean", "constant", "gradnormbalance"}  # no method, or no publication
    aliases = {"randomweights": "rlw", "trimmedmean": "trimmedmean"}
    missing = {info.name for info in list_methods() if aliases.get(info.name, info.name) not in named} - others
    assert not missing


def test_the_readme_counts_the_combinations_of_losses() -> None:
    listed = row("README.md", "losses").split(", also")[0].split(", ")
    kinds = {info.name for info in list_losses()} - {"fixedweights"}
    inverse = {name for name in kinds if name.startswith("inverse")}
    assert len(listed) == len(kinds - inverse) + 1


def row(page: str, name: str) -> str:
    """The second cell of a table's row."""
    (found,) = re.findall(rf"^\| {name} \| (.*) \|$", (ROOT / page).read_text(), re.MULTILINE)
    return found


def plain(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def test_numbers_of_costs_were_measured() -> None:
    """Those of the summary are, rounded, in what it summarises."""
    text = (ROOT / "docs/choosing.md").read_text().partition("## What it costs")[2]
    measured = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", (ROOT / "docs/measured.md").read_text())}
    rounded = {str(round(number)) for number in measured}
    rows = re.findall(r"^\| [^|]+ \| ([^|]*) \| ([^|]*) \|$", text, re.MULTILINE)
    assert len(rows) >= 5
    for cells in rows:
        for number in re.findall(r"(?<![\w@])\d+", " ".join(cells)):
            assert number in rounded, f"{number} is not in docs/measured.md"


def test_names_of_methods_and_losses_exist() -> None:
    known = {*methods.__all__, *losses.__all__, "MultiTaskOptimizer", "ConflictMonitor", "DistributedDataParallel"}
    known |= {"GradScaler", "SummaryWriter", "Linear"}
    theirs = {"Trainer"}
    for page in ("choosing.md", "quickstart.md", "limits.md"):
        text = (ROOT / "docs" / page).read_text()
        for name in re.findall(r"`([A-Z]\w*)(?:\(.*?\))?`", text):
            assert name in known | theirs, f"{page}: {name}"
    for name in re.findall(r'(?<!=)"(\w+)"', (ROOT / "docs/migrating.md").read_text()):
        if name[0].isupper():
            assert get_method(name, **{"UW": {"tasks": 2}, "DWA": {"tasks": 2}, "GradNorm": {"tasks": 2}}.get(name, {}))


def messages() -> list[str]:
    """Every string of the package, with a mark for what is filled in."""
    found = []
    for path in (ROOT / "python/mtl_optim").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_symptoms_are_messages_of_the_code() -> None:
    text = (ROOT / "docs/choosing.md").read_text().partition("## Troubleshooting")[2].partition("\n## ")[0]
    quoted = re.findall(r'"([^"]{12,})"', re.sub(r"`[^`]*`", "", text))
    assert len(quoted) >= 15
    said = messages()
    for quote in quoted:
        for piece in quote.split(" ... "):
            assert any(piece.strip() in message for message in said), f"no message says: {piece}"


def loaded(path: Path) -> Any:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_page_is_up_to_date() -> None:
    page = loaded(ROOT / "docs" / "generate_api.py").page()
    assert (ROOT / "docs" / "api.md").read_text() == page, "run: python docs/generate_api.py"


def test_the_readme_of_a_release_has_no_relative_links() -> None:
    absolute = loaded(ROOT / "release" / "build.py").absolute_links
    text = absolute((ROOT / "README.md").read_text(), "https://host/project", "1.2.3")
    found = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", text)
    assert ("!", "https://host/project/raw/v1.2.3/docs/demo.png") in found
    assert ("", "https://host/project/blob/v1.2.3/docs/quickstart.md") in found
    assert ("", "https://arxiv.org/abs/2201.04122") in found
    assert all(re.match(r"https://|#", target) for _, target in found)


def test_the_citation_and_the_changelog_are_of_this_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    heads = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == "Unreleased" and __version__ in heads
