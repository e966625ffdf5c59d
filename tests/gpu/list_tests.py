"""Lists the tests that pytest would run on a machine with a GPU, for several lists of arguments (JSON, both ways)."""

import json
import os
import sys

import pytest
import torch


class Names:
    def __init__(self) -> None:
        self.found: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.found = [item.nodeid for item in session.items]


def names(arguments: list[str]) -> list[str]:
    plugin = Names()
    if (status := pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *arguments], [plugin])) != 0:
        raise SystemExit(f"{arguments}: pytest ended with {status}")
    return plugin.found


if __name__ == "__main__":
    torch.cuda.is_available = lambda: True
    out, sys.stdout = sys.stdout, open(os.devnull, "w")
    print(json.dumps({name: names(arguments) for name, arguments in json.load(sys.stdin).items()}), file=out)
