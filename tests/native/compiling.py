"""The C++ compiler of the native tests, and the sanitizers it has here."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-pthread", f"-I{ROOT / 'csrc' / 'include'}"]
# What AddressSanitizer sees as well, or no kernel can do wrong; it doubles the time to compile.
LEAN = "-fno-sanitize=null,object-size,pointer-overflow,return,vptr"


def sanitizing_compiler(kind: str, folder: Path) -> list[str]:
    """A compiler with the flags of a sanitizer under which programs build and start here."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or clang++) on the path")
    command = [*compiler.split(), *FLAGS, f"-fsanitize={kind}", "-fno-sanitize-recover=all"]
    if "undefined" in kind:
        command.append(LEAN)
    probe = folder / "probe"
    built = subprocess.run(
        [*command, "-x", "c++", "-", "-o", probe], input="int main() {}", text=True, capture_output=True
    )
    if built.returncode != 0 or subprocess.run([probe], capture_output=True).returncode != 0:
        pytest.skip(f"{compiler} has no working -fsanitize={kind}: {built.stderr.strip()[-200:]}")
    return command


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)


def check(*command: object) -> None:
    done = run(*command)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@contextmanager
def taking_turns(folder: Path) -> Iterator[None]:
    """One test process at a time: the first makes what the others find."""
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
