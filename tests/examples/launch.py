"""Examples as torchrun starts them, in processes forked from one that has imported the trainers."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import io
import multiprocessing
import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
SECONDS = 120
"""What a run may take."""

IMPORTED = "mtl_optim torch.distributed.fsdp torch.distributed.checkpoint.state_dict accelerate pytorch_lightning"

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([*IMPORTED.split(), "transformers.trainer"])  # those that are missing are left out


def launch(ranks: int, function: Callable[..., Any], *args: Any, torchrun: bool = True) -> list[Any]:
    """What a function of a module returns on every rank.

    Args:
        torchrun: whether the processes see what torchrun sets; False is for one that is started without it.

    Raises:
        RuntimeError: it raises on one of them, or does not return in time.
    """
    _start_server()
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(ranks):
        said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0,
                "MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "TORCHELASTIC_RUN_ID": "test",
                "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}  # fmt: skip
        here, there = _FORKS.Pipe()
        env = {name: str(value) for name, value in said.items()} if torchrun else {}
        process = _FORKS.Process(target=_serve, args=(env, function, args, there), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        found = [_receive(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    if not all(good for good, _ in found):
        raise RuntimeError("\n".join(f"rank {rank}: {value}" for rank, (good, value) in enumerate(found) if not good))
    return [value for _, value in found]


@functools.cache
def _start_server() -> None:
    """With one thread a process, and the paths that pytest has added."""
    before = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _receive(pipe: Connection) -> tuple[bool, Any]:
    """Whether the function returned, and what; else the text of its error."""
    if not pipe.poll(SECONDS):
        return False, f"no answer within {SECONDS} s"
    try:
        return torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
    except EOFError:
        return False, "the process is gone"


def _serve(env: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...], pipe: Connection) -> None:
    os.environ.update(env)
    sys.path.insert(0, str(EXAMPLES))
    gc.freeze()  # what was imported is not looked through again by those who collect after every step
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        result = (True, function(*args))
    except Exception as error:
        result = (False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    buffer = io.BytesIO()
    torch.save(result, buffer)
    pipe.send_bytes(buffer.getvalue())


def script(name: str, *argv: str) -> dict[str, Any]:
    """A script as it stands, in float64: what it prints, the parameters it ends with and the batches it has seen."""
    torch.set_default_dtype(torch.float64)
    batches, printed = record(), io.StringIO()
    sys.argv = [name, *argv]
    torch.distributed.destroy_process_group = lambda: None  # sharded parameters are yet to be gathered
    with contextlib.redirect_stdout(printed):
        found = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return {"batches": batches, "params": parameters(found["model"]), "printed": printed.getvalue()}


def resumed(name: str, path: str, micro: int) -> dict[str, Any]:
    """An epoch, and another one from its checkpoint, in float64 and with micro-batches; see `script`."""
    torch.set_default_dtype(torch.float64)
    if name.startswith("torchrun"):
        torch.distributed.init_process_group("gloo")
    train = importlib.import_module(name).train
    batches = record()
    with contextlib.redirect_stdout(io.StringIO()):
        train(epochs=1, micro=micro, checkpoint=path)
        torch.distributed.barrier()
        model, _ = train(epochs=2, micro=micro, checkpoint=path)
    return {"batches": batches, "params": parameters(model)}


def record() -> list[dict[str, torch.Tensor]]:
    """A list that gets every batch that `Net` is trained on in this process."""
    from problem import Net

    batches: list[dict[str, torch.Tensor]] = []
    forward = Net.forward

    @functools.wraps(forward)
    def recording(self: Any, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        batches.append({key: value.clone() for key, value in batch.items()})
        return forward(self, **batch)

    Net.forward = recording  # type: ignore[method-assign]
    return batches


def parameters(model: torch.nn.Module) -> list[torch.Tensor]:
    """Those of a model, whole ones where they are sharded."""
    return [p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]
