"""The command line: ``mtl-kernels demo``, ``mtl-kernels methods`` and ``mtl-kernels info``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from mtl_kernels.version import __version__

from .demo.options import MAX_BATCH_SIZE, Options

DEMO_PACKAGES = {"rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}
"""What the demo imports, and the names to install it by."""
CPU_FEATURES = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16",
                "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments without the program's name; None for those of the process.

    Returns:
        The exit status: 0, 1 if a result could not be written, 130 if interrupted. Wrong or impossible
        requests leave through SystemExit with status 2.
    """
    parser, commands = _parsers()
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "info":
            return _info()
        if arguments.command == "methods":
            return _methods()
        return _demo(arguments, commands["demo"])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="mtl-kernels",
        description="Compiled kernels that combine the per-task gradients of multi-task training.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser(
        "info",
        help="show versions, backends, CPU features and threads",
        description="Shows the version, torch, every backend with the reason if it is missing, CPU features, threads.",
    )
    listing = commands.add_parser(
        "methods",
        help="list the methods and the combinations of losses, with what they need and promise",
        description="Lists every method: its class, what its weights depend on, what it keeps between steps, what "
        "holds for its combination, and what a solve costs. Then every combination of losses: its class, its value, "
        "what it keeps, what the training loop calls beside it, and whether it can stand in front of a method.",
    )
    demo = commands.add_parser(
        "demo",
        help="train one network on three tasks with several methods, and compare",
        description="Trains one convolutional network on images of two overlapping handwritten digits "
        "(scikit-learn's, nothing is downloaded) for three tasks: the top-left digit, the bottom-right one, "
        "their sum. Every method starts from the same network and sees the same batches. Ends with a table "
        "(accuracy per task, share of steps with conflicting gradients, ms per step) and writes demo.png and "
        "results.json.",
    )
    demo.add_argument(
        "--output", type=Path, default=Options.output, metavar="DIR",
        help="folder for demo.png and results.json, made if missing (default: %(default)s)",
    )  # fmt: skip
    demo.add_argument(
        "--methods", nargs="+", default=list(Options.methods), metavar="NAME",
        help="the methods to train with, see `mtl-kernels methods`, with options where wanted: "
        "sum pcgrad:order=fixed mgda:normalize=l2,transform=logsum uncertaintyweighting "
        f"(default: {' '.join(Options.methods)})",
    )  # fmt: skip
    demo.add_argument(
        "--steps", type=int, default=Options.steps, metavar="N",
        help="optimizer steps per method (default: %(default)s, one to three minutes in all on two cores)",
    )  # fmt: skip
    demo.add_argument(
        "--batch-size", type=int, default=Options.batch_size, metavar="N",
        help=f"images per step, 1 to {MAX_BATCH_SIZE} (default: %(default)s)",
    )  # fmt: skip
    demo.add_argument(
        "--seed", type=int, default=Options.seed, metavar="N",
        help="of the split, images, initialisation, batches and methods; on one machine the same seed and "
        "threads give the same accuracies (default: %(default)s)",
    )  # fmt: skip
    demo.add_argument(
        "--threads", type=int, default=Options.threads, metavar="N",
        help="threads of torch and of the kernels (default: one less than torch would use, 1 to 4)",
    )  # fmt: skip
    demo.add_argument(
        "--backend", default=Options.backend, metavar="NAME",
        help="of the kernels: auto, cpu (compiled) or reference (pure PyTorch); `mtl-kernels info` lists "
        "them (default: the environment variable MTL_KERNELS_BACKEND, else auto)",
    )  # fmt: skip
    demo.add_argument("--quiet", action="store_true", help="no progress bar, only the result")
    return parser, {"info": info, "methods": listing, "demo": demo}


def _demo(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    missing = [package for module, package in DEMO_PACKAGES.items() if find_spec(module) is None]
    if missing:
        parser.error(f'the demo needs {", ".join(missing)}; install with: pip install "mtl-kernels[demo]"')
    given = {name: value for name, value in vars(arguments).items() if name != "command"}
    try:
        options = Options(**given | {"methods": tuple(arguments.methods)})
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    from .demo.run import run

    try:
        run(options)
    except OSError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


def _methods() -> int:
    from .catalog import list_losses, list_methods

    print("Methods, which combine the gradients of the tasks:")
    _print_table(
        [(info.name, _signature(info.cls, info.arguments), *info[2:6]) for info in list_methods()],
        ("name", "class", "needs", "keeps", "guarantee", "cost of a solve"),
    )
    print("\nCombinations of losses (mtl_optim.losses), which need no gradients of single tasks:")
    _print_table(
        [
            (info.name, _signature(info.cls, info.arguments), *info[2:5], "yes" if info.has_terms else "no")
            for info in list_losses()
        ],
        ("name", "class", "value", "keeps", "calls beside it", "transform="),
    )
    return 0


def _signature(cls: type, arguments: Sequence[str]) -> str:
    return f"{cls.__name__}({', '.join(arguments)})"


def _info() -> int:
    _print_table(list(_facts().items()))
    return 0


def _print_table(rows: Sequence[tuple[str, ...]], head: tuple[str, ...] | None = None) -> None:
    """By rich on a terminal, where it is installed; else as plain columns."""
    if sys.stdout.isatty() and find_spec("rich") is not None:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*head or (), show_header=head is not None, box=box.SIMPLE, pad_edge=False)
        for name, *cells in rows:
            table.add_row(Text(name, style="bold"), *map(Text, cells))
        Console().print(table)
        return
    lines = [head, *rows] if head else list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def _facts() -> dict[str, str]:
    """The facts of `mtl_kernels.show_config`, and those of this command."""
    import torch

    from mtl_kernels import dispatch
    from mtl_kernels.config import config

    facts = config()
    try:
        facts["used on CPU tensors"] = dispatch.resolve(torch.device("cpu"), None).name
    except (ValueError, RuntimeError) as error:
        facts["used on CPU tensors"] = f"none: {error} ({dispatch.ENVIRONMENT_VARIABLE} is set)"
    facts["CPU"], facts["CPU features"] = _cpu()
    return facts


def _cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, str]:
    """The processor's name and the features that matter here, by /proc/cpuinfo, else by torch."""
    import platform

    import torch

    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    flags = (fields.get("flags") or fields.get("features") or "").split()
    features = " ".join(name for name in CPU_FEATURES if name in flags)
    return fields.get("model name") or platform.processor() or platform.machine(), (
        features or torch.backends.cpu.get_cpu_capability()
    )


if __name__ == "__main__":
    sys.exit(main())
