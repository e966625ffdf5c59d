"""What the demo can be told; light to import, so that the command line can describe and check it quickly."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

MAX_SEED = 2**63 - 1
MAX_BATCH_SIZE = 4096


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a run.

    Args:
        output: the folder for results.json and demo.png, made if missing.
        methods: names that `mtl_optim.get_method` or `get_loss` knows, with options as `specs.build` reads them.
        steps: optimizer steps per method.
        batch_size: images per step.
        seed: of the split, the images, the initialisation, the batches and the methods.
        threads: of torch and the compiled kernels; None takes one less than torch would, 1 to 4.
        backend: of the kernels; None leaves the choice to MTL_KERNELS_BACKEND, else to the library.
        quiet: no progress bar.

    Raises:
        ValueError: a value out of range, an unknown name, or an output that is no folder.
        RuntimeError: a backend that is not available.
    """

    output: Path = Path("demo-output")
    methods: tuple[str, ...] = ("sum", "pcgrad", "mgda")
    steps: int = 2000
    batch_size: int = 64
    seed: int = 0
    threads: int | None = None
    backend: str | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        _in_range("--steps", self.steps, 1)
        _in_range("--batch-size", self.batch_size, 1, MAX_BATCH_SIZE)
        _in_range("--seed", self.seed, 0, MAX_SEED)
        if self.threads is not None:
            _in_range("--threads", self.threads, 1, os.cpu_count() or 1)
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"--output {self.output} exists and is not a folder; name another")
        _check_methods(self.methods)
        _check_backend(self.backend)


def _in_range(option: str, value: int, least: int, most: int | None = None) -> None:
    if value < least or (most is not None and value > most):
        expected = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{option} {value} is out of range; expected {expected}")


def _check_methods(specs: tuple[str, ...]) -> None:
    from .. import methods
    from .specs import label

    if not specs:
        raise ValueError(f"--methods needs at least one of {', '.join(methods.available())}")
    seen = set()
    for spec in specs:
        name = label(spec)
        if name in seen:
            raise ValueError(f"--methods names {spec!r} twice; every method runs once")
        seen.add(name)


def _check_backend(backend: str | None) -> None:
    import torch

    from mtl_kernels import dispatch

    dispatch.resolve(torch.device("cpu"), backend)
