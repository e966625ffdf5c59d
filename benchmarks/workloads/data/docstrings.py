"""Text with labels, offline: the docstrings of Python's own standard library.

No package that is installed with this project bundles a labelled corpus of texts. What every Python has is some
thousands of documented functions and classes, whose labels come from elsewhere than their words:

    topic     the family of modules that it is from (seven)
    raises    whether its own code has a ``raise`` statement: whether the text promises something that can be refused,
              which stands in the place of a sentiment
    kind      function, method or class
    returns   whether its own code returns a value

Sizes and scores differ a little between versions of Python, whose number is part of the source.
"""

from __future__ import annotations

import ast
import functools
import platform
import re
import sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from .splits import DataMissingError, Part, Splits, split

FAMILIES = {
    "network": "http urllib ftplib imaplib smtplib socketserver ssl ipaddress",
    "markup": "xml html json csv configparser mailbox",
    "numbers": "statistics numbers fractions random datetime calendar heapq _pydecimal",
    "files": "tarfile pathlib zipfile shutil tempfile gzip lzma os posixpath _pyio",
    "concurrency": "asyncio threading multiprocessing queue subprocess",
    "code": "inspect ast typing pydoc traceback functools contextlib enum",
    "tests": "unittest doctest logging pdb bdb",
}
TASKS = {"topic": len(FAMILIES), "raises": 2, "kind": 3, "returns": 2}
"""With the number of classes."""
LENGTH = 32
WORDS = 2000
_NOTHING, _RARE = 0, 1
_LEAST = 5
"""Words that a text must have."""
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
"""Where a statement holds others."""


class _Text(NamedTuple):
    words: tuple[str, ...]
    labels: tuple[int, ...]


@functools.lru_cache(maxsize=4)
def load(seed: int, tasks: tuple[str, ...] = tuple(TASKS)) -> Splits:
    """Word numbers int64 ``[N, 32]``, 0 behind the end, and classes int64 ``[N]``.

    Words are those of the training part; a text that is there twice is taken once.

    Raises:
        DataMissingError: the library's source is not there (a Python from an archive).
    """
    texts = _texts()
    known = ["", "rare"]
    order = split(Part(torch.arange(len(texts)), {}), seed, "")
    counts = Counter(word for index in order.train.inputs.tolist() for word in set(texts[index].words))
    known += [word for word, _ in counts.most_common(WORDS - len(known))]
    numbers = {word: number for number, word in enumerate(known)}
    coded = torch.full((len(texts), LENGTH), _NOTHING)
    for row, text in zip(coded, texts, strict=True):
        found = [numbers.get(word, _RARE) for word in text.words[:LENGTH]]
        row[: len(found)] = torch.tensor(found)
    labels = {name: torch.tensor([text.labels[k] for text in texts]) for k, name in enumerate(TASKS) if name in tasks}
    source = f"{len(texts):,} docstrings of Python {platform.python_version()}'s standard library"
    return split(Part(coded, labels), seed, source)


@functools.lru_cache(maxsize=1)
def _texts() -> tuple[_Text, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[tuple[str, ...], _Text] = {}
    for topic, modules in enumerate(FAMILIES.values()):
        for module in modules.split():
            for path in _sources(root / module):
                for text in _documented(ast.parse(path.read_text(encoding="utf-8")), topic):
                    found.setdefault(text.words, text)
    if len(found) < 100:
        raise DataMissingError(
            f"expected the source of Python's standard library in {root}, found {len(found)} documented functions; "
            "install it (Debian: libpython3-stdlib), or leave out the workloads on text"
        )
    return tuple(found.values())


def _sources(module: Path) -> list[Path]:
    """The files of a module or package, without tests; of one that this Python does not have none."""
    if (single := module.with_name(f"{module.name}.py")).is_file():
        return [single]
    return sorted(path for path in module.rglob("*.py") if not {"test", "tests"} & set(path.parts))


def _documented(tree: ast.Module, topic: int) -> list[_Text]:
    """The texts of what is defined in a module."""
    found: list[_Text] = []

    def look(node: ast.AST, in_class: bool) -> tuple[bool, bool]:
        """Whether a statement raises, and whether it returns a value, in itself or in those within."""
        raises, returns = isinstance(node, ast.Raise), isinstance(node, ast.Return) and node.value is not None
        for block in _BLOCKS:
            for child in getattr(node, block, ()):
                inner = look(child, isinstance(node, ast.ClassDef))
                raises, returns = raises or inner[0], returns or inner[1]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            words = tuple(re.findall(r"[a-z]+", (ast.get_docstring(node, clean=False) or "").lower()))
            kind = 2 if isinstance(node, ast.ClassDef) else int(in_class)
            if len(words) >= _LEAST:
                found.append(_Text(words, (topic, int(raises), kind, int(returns))))
        return raises, returns

    look(tree, False)
    return found
