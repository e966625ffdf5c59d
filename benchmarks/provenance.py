"""What a measurement was taken of, and on which machine; needs neither torch nor a build."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The commit of the source tree, "-dirty" where it has changes; without a repository $COMMIT, else "unknown"."""
    given = os.environ.get("COMMIT") or "unknown"
    if not (ROOT / ".git").exists():  # or git would find a repository around this folder
        return given
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return given
    return found.stdout.strip()


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def slug(text: str) -> str:
    """A file name from any text."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "machine"
