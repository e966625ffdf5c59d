"""A piece of a measurement that takes its process down is told, and the others go on; all of it on a CPU."""

import csv
import functools
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import mtl_kernels as mk
from benchmarks import bench, gpu, isolate, steps
from benchmarks.bench import Piece, Record
from benchmarks.device import Host
from benchmarks.isolate import Attempts
from benchmarks.plan import GPU_KERNELS, Case
from benchmarks.results import OURS
from benchmarks.workload import Network, Workload
from mtl_optim import PCGrad


def run(work: isolate.Work, *arguments: object) -> tuple[str, list[object], list[tuple[object, str]]]:
    """Why it was given up, what was received, what was lost."""
    received: list[object] = []
    lost: list[tuple[object, str]] = []
    reason = isolate.run(
        work, arguments, lambda what, value: received.append(value), lambda name, why: lost.append((name, why))
    )
    return reason, received, lost


def broken(attempts: Attempts) -> None:
    """Pieces that end in every way there is."""
    poisoned: list[str] = []

    def wait() -> None:
        if poisoned:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    class Held:
        """What cannot be freed any more when the device is lost."""

        def __del__(self) -> None:
            if poisoned:
                os.abort()

    def hold() -> None:
        held = Held()
        poisoned.append("")
        raise ValueError(f"launch failed{'' if held else held}")

    attempts.wait = wait
    pieces = {
        "right": lambda: None,
        "raises": lambda: os.stat("/no/such/file"),
        "dies": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "hangs": lambda: time.sleep(600),
        "poisons": lambda: poisoned.append(""),
        "poisons what it holds": hold,
        "last": lambda: None,
    }
    for name, piece in pieces.items():
        why = attempts.attempt(name, piece, seconds=1.0 if name == "hangs" else 60.0)
        if name in ("right", "raises", "last"):
            attempts.send("said", (name, why.split(":")[0]))


@pytest.mark.exhaustive
def test_every_piece_is_tried_once_whatever_the_others_do() -> None:
    reason, received, lost = run(broken)
    assert not reason
    assert dict(lost) == {
        "dies": "its process died of SIGSEGV",
        "hangs": "it was stopped after 1 s",
        "poisons": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "poisons what it holds": "ValueError: launch failed",
    }
    # A piece that was tried is skipped by the next process, which says of it that nothing failed.
    assert received[:2] == [("right", ""), ("raises", "FileNotFoundError")] and received[-1] == ("last", "")


def nested(attempts: Attempts, seen: Sequence[object]) -> None:
    def outer() -> None:
        attempts.send("said", ("outer", len(seen), attempts.lost))
        attempts.attempt("inner", lambda: os.kill(os.getpid(), signal.SIGKILL))
        attempts.attempt("beside", lambda: attempts.send("said", "beside"))

    attempts.attempt("outer", outer)


def test_the_innermost_piece_is_to_blame_and_the_outer_one_goes_on() -> None:
    received: list[object] = []
    lost: list[object] = []
    reason = isolate.run(
        nested, (received,), lambda what, value: received.append(value), lambda name, why: lost.append(name)
    )
    assert not reason and lost == ["inner"]
    assert received == [("outer", 0, ()), ("outer", 1, ("inner",)), "beside"], "the next process knows what there is"


def impossible(attempts: Attempts) -> None:
    raise SystemExit("there is no device")


def test_what_cannot_begin_is_given_up(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(impossible) == ("SystemExit: there is no device", [], [])


def test_in_this_process_nothing_is_lost_but_what_is_left() -> None:
    def work(attempts: Attempts) -> None:
        attempts.send("said", attempts.attempt("a", lambda: 1 / 0))
        attempts.wait = lambda: 1 / 0
        attempts.attempt("b", lambda: None)
        attempts.send("said", "never")

    received: list[object] = []
    reason = isolate.run_here(work, (), lambda what, value: received.append(value))
    assert (reason, received) == ("ZeroDivisionError: division by zero", ["ZeroDivisionError: division by zero"])


class Sticky(Host):
    """A CPU that is beyond use after an error of a certain kind."""

    lost = False

    def synchronize(self) -> None:
        if Sticky.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


KERNELS = {"raise": ("combine", "pcgrad_step", "mgda_step"), "die": ("gram",)}
"""What fails, and how: whatever calls `mk.combine`, or `mk.gram`."""


def faulty(attempts: Attempts, options: object, deadline: float, rows: Sequence[object], how: str = "") -> None:
    """`gpu.work` with an operation that is broken for 10000 columns of bfloat16."""
    name = KERNELS[how][0]
    right = getattr(mk, name)

    def broken(rows: torch.Tensor, *arguments: object, **options: object) -> object:
        if (rows.shape[1], rows.dtype, options.get("backend")) != (10_000, torch.bfloat16, None):
            return right(rows, *arguments, **options)
        if how == "die":
            os.kill(os.getpid(), signal.SIGABRT)
        Sticky.lost = True
        raise RuntimeError("an illegal memory access was encountered")

    setattr(mk, name, broken)
    gpu.device.find = lambda name: Sticky()
    gpu.work(attempts, options, deadline, rows)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("die", "its process died of SIGABRT; its process was lost"),
        ("raise", "RuntimeError: an illegal memory access was encountered; its process was lost"),
    ],
)
def test_the_benchmark_goes_on_behind_a_kernel_that_takes_its_process_down(
    how: str, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cpu", "--tasks", "2", "--max-elements", "2e4", "--repeats", "1", "--seconds", "600"]
    status = gpu.main([*arguments, "--output", str(tmp_path), "--machine", "here"], functools.partial(faulty, how=how))
    found = list(csv.DictReader((tmp_path / "here.csv").open()))
    lost = [row for row in found if row["measure"] == "failed"]
    assert status == 1 and {row["note"] for row in lost} == {reason}
    assert sorted((row["kernel"], row["dtype"], row["provider"]) for row in lost) == sorted(
        (kernel, "bfloat16", OURS) for kernel in KERNELS[how]
    )
    assert all(row["machine"] == "here" and row["commit"] for row in found)
    measured = [row for row in found if row["median_us"]]
    cases = [(row["kernel"], row["N"], row["dtype"], row["provider"], row["measure"], row["batch"]) for row in measured]
    assert len(cases) == len(set(cases)), "nothing is measured twice"
    names = {(case[0], case[2], case[3]) for case in cases}
    for kernel in GPU_KERNELS:
        assert (kernel, "float32", OURS) in names and (kernel, "bfloat16", f"{OURS} reference") in names
        assert ((kernel, "bfloat16", OURS) in names) == (kernel not in KERNELS[how])
    assert {"pcgrad", "min_norm", "frank_wolfe"} <= {case[0] for case in cases}
    assert ("combine", "bfloat16", "torch.mv") in names, "the other providers of the kernel that failed"
    others = [row for row in measured if row["kernel"] == "gram" and row["provider"] == "torch.mm"]
    compared = {(row["dtype"], bool(row["times_ours"])) for row in others}
    assert compared == {("float32", True), ("bfloat16", "gram" not in KERNELS[how])}


def test_a_comparison_with_what_an_earlier_process_measured(tmp_path: Path) -> None:
    case = Case("gram", 2, 10, torch.float32)
    record = Record(tmp_path, {"machine": "here"})
    one = bench.Bench(Host(), Attempts(record.take), time.monotonic() + 60, 2)
    ours, other = (bench.untimed(case, name, "graph") for name in (OURS, "torch.mm"))
    for row, us in ((ours, 2.0), (other, 6.0)):
        row.median_us, row.correct = us, True
    one.add([ours])
    bench.Bench(Host(), Attempts(record.take), time.monotonic() + 60, 2, record.rows).add([other])
    assert record.rows[1].times_ours == 3


def test_a_kernel_that_took_a_process_down_is_not_tried_at_another_size(tmp_path: Path) -> None:
    record, tried = Record(tmp_path, {"machine": "here"}), []
    lost = Piece(Case("gram", 8, 10**8, torch.float32), OURS)
    attempts = Attempts(record.take, lost=(lost, Piece(Case("all", 8, 10**8, torch.float32))))
    one = bench.Bench(Host(), attempts, time.monotonic() + 60, 2)
    for piece in (
        Piece(Case("gram", 8, 10**4, torch.float32), OURS),
        Piece(Case("gram", 16, 10**4, torch.float32), OURS),
        Piece(Case("gram", 8, 10**4, torch.bfloat16), OURS),
        Piece(Case("gram", 8, 10**4, torch.float32), "torch.mm"),
        Piece(Case("all", 8, 10**4, torch.float32)),
    ):
        one.attempt(piece, functools.partial(tried.append, piece))
    assert len(tried) == 4 and tried[0].case.num_tasks == 16
    assert [(row.measure, row.K, row.note) for row in record.rows] == [
        ("left out", 8, "its process was lost at another size")
    ]


def faulty_steps(attempts: Attempts, given: object, rows: Sequence[object]) -> None:
    """`steps.work` on a CPU, where one method's step takes the process down."""
    right = Workload.ours

    def ours(self: Workload) -> None:
        if isinstance(self.method, PCGrad):
            os.kill(os.getpid(), signal.SIGSEGV)
        right(self)

    def small(self: Network, num_tasks: int) -> None:
        torch.nn.Module.__init__(self)
        self.trunk = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 256))
        self.heads = torch.nn.ModuleList(torch.nn.Linear(256, 10) for _ in range(num_tasks))

    Network.__init__ = small  # type: ignore[method-assign]
    Workload.ours = ours  # type: ignore[method-assign]
    given.device = "cpu"  # type: ignore[attr-defined]
    steps.timing.QUICK = steps.timing.Effort(2, 2, 0.0, 0.0)
    steps.work(attempts, given, rows)  # type: ignore[arg-type]


def test_the_steps_go_on_behind_one_that_takes_its_process_down(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cuda", "--quick", "--tasks", "2", "--output", str(tmp_path), "--machine", "here"]
    assert steps.main(arguments, faulty_steps) == 1
    found = list(csv.DictReader((tmp_path / "here-steps.csv").open()))
    notes = [(row["method"], row["note"]) for row in found if row["note"]]
    assert notes == [("pcgrad", "failed: its process died of SIGSEGV; its process was lost")]
    assert any(row["method"] == "mgda" and row["provider"] == OURS and row["correct"] == "True" for row in found)
