"""Builds the released form: an sdist and wheels, checked and tried in another folder.

    python release/build.py                # sdist, and the wheel with the CPU kernels
    python release/build.py --cuda         # and one with CUDA kernels, in dist/cuda (nvcc; some minutes)
    python release/build.py --no-isolation # with the build tools that are installed, so that nothing is downloaded

Needs ``build`` and ``twine``. The sdist is built from the last commit, wheels from the sdist: what is not in it cannot
be in them. Each wheel is then installed into a new environment, without its dependencies but with the torch of
``--torch``, and a network is trained from a folder where the source tree cannot be imported.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LICENCE = "LICENSE"
PACKAGES = ("mtl_kernels", "mtl_optim")


def main() -> int:
    """Builds, checks and tries what was asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the result (default: dist)")
    parser.add_argument("--cuda", action="store_true", help="a wheel with CUDA kernels as well, in OUT/cuda")
    parser.add_argument("--no-isolation", action="store_true", help="build with the tools that are installed")
    parser.add_argument("--torch", default="torch==2.13.0", help="what the wheel is tried with (default: %(default)s)")
    parser.add_argument("--url", help="of the repository: relative links of the README then point into it")
    options = parser.parse_args()
    out = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    isolation = ["--no-isolation"] if options.no_isolation else []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        tree = export(scratch / "tree", options.url)
        run([sys.executable, "-m", "build", "--sdist", *isolation, "--outdir", str(out), str(tree)])
        (sdist,) = out.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            extract(archive, scratch / "sdist")
        (unpacked,) = (scratch / "sdist").iterdir()
        wheels = []
        for cuda in [False, True] if options.cuda else [False]:
            folder = out / "cuda" if cuda else out
            environment = {"MTL_KERNELS_CUDA": "1" if cuda else "0"}
            run(
                [sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", str(folder), str(unpacked)],
                environment,
            )
            wheels += folder.glob("*.whl")
        check_contents(sdist, wheels)
        run([sys.executable, "-m", "twine", "check", "--strict", *map(str, [sdist, *wheels])])
        for number, wheel in enumerate(wheels):
            try_out(wheel, scratch / f"try{number}", options.torch)
        for path in [sdist, *wheels]:
            print(f"{path.relative_to(out.parent)}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


def export(tree: Path, url: str | None) -> Path:
    """The files of the last commit; all files where there is no repository, as in an unpacked sdist."""
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True)
    if archive.returncode == 0:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            extract(files, tree)
        if subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT).returncode != 0:
            print("changes that are not committed are left out", file=sys.stderr)
    else:
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns("build", "dist", "*.egg-info", "*.so", "__pycache__"))
    if url is not None:
        readme = tree / "README.md"
        readme.write_text(absolute_links(readme.read_text(), url.rstrip("/"), version(tree)))
    return tree


def extract(files: tarfile.TarFile, folder: Path) -> None:
    """Unpacks an archive; versions of Python that know filters are told to take plain files alone."""
    files.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


def version(tree: Path) -> str:
    """That of the source tree."""
    (found,) = re.findall(r'__version__ = "(.*)"', (tree / "mtl_kernels/version.py").read_text())
    return found


def absolute_links(text: str, url: str, version: str) -> str:
    """Relative links and images of a page, as an index shows it, into the repository at the tag of a version."""
    text = re.sub(r"(!\[[^\]]*\]\()(?!\w+:)", rf"\g<1>{url}/raw/v{version}/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?![\w]+:|#)", rf"\g<1>{url}/blob/v{version}/", text)


def check_contents(sdist: Path, wheels: list[Path]) -> None:
    """Raise SystemExit where something is missing, or there that should not be."""
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    for name in (LICENCE, "csrc/CMakeLists.txt", "tests/test_docs.py", "docs/methods.md", "CHANGELOG.md"):
        if name not in inside:
            raise SystemExit(f"{sdist.name} lacks {name}; see MANIFEST.in")
    for wheel in wheels:
        names = zipfile.ZipFile(wheel).namelist()
        if not any(".dist-info/" in name and name.endswith("/" + LICENCE) for name in names):
            raise SystemExit(f"{wheel.name} lacks {LICENCE}")
        extra = {top for name in names if not (top := name.split("/")[0]).endswith(".dist-info")} - set(PACKAGES)
        if extra:
            raise SystemExit(f"{wheel.name} holds {', '.join(sorted(extra))}, which are not of the packages")
        modules = ["_cpu", "_cuda"] if wheel.parent.name == "cuda" else ["_cpu"]
        missing = [module for module in modules if not any(name.startswith(f"mtl_kernels/{module}.") for name in names)]
        if missing:
            raise SystemExit(f"{wheel.name} lacks mtl_kernels.{', mtl_kernels.'.join(missing)}")


def try_out(wheel: Path, folder: Path, torch: str) -> None:
    """Installs a wheel into an environment of its own, and trains there."""
    run([sys.executable, "-m", "venv", str(folder / "venv")])
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, torch, "numpy"])
    run([*pip, "--no-deps", str(wheel)])
    run([str(python), "-m", "pip", "check"])
    elsewhere = {"PYTHONPATH": "", "MTL_KERNELS_BACKEND": "cpu"}
    run([str(python.with_name("mtl-kernels")), "info"], elsewhere, cwd=folder)
    shutil.copy2(ROOT / "release" / "train.py", folder)
    run([str(python), "train.py"], elsewhere, cwd=folder)


def run(command: list[str], environment: dict[str, str] | None = None, cwd: Path | None = None) -> None:
    """Runs a command; raise SystemExit if it fails."""
    print("+", shlex.join(command), flush=True)
    result = subprocess.run(command, env={**os.environ, **(environment or {})}, cwd=cwd)
    if result.returncode != 0:
        raise SystemExit(f"{command[0]} ended with {result.returncode}: {shlex.join(command)}")


if __name__ == "__main__":
    sys.exit(main())
