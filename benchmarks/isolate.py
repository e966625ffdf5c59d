"""Runs the pieces of a measurement in a process of their own, which is replaced when a piece takes it down.

After an illegal address, a launch that ran too long or a failed assertion on the device, every later call of the
process fails; a kernel that never ends stops it altogether. Such a piece is told with its reason, and a new process
goes on with the others. The process that starts them uses no device.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

START = 90.0
"""Seconds in which a process must begin its first piece, and the next one after a piece."""
_PIECE = 60.0
_END = 10.0

Receive = Callable[[str, object], None]
"""Takes what the work sends: a word for what it is, and a value that can be pickled."""


class DeviceLost(Exception):
    """This process can use its device no more."""


@dataclass
class Attempts:
    """What was tried so far, as the process that works sees it. Pieces have names, and may be made of pieces."""

    send: Receive
    ended: set[Hashable] = field(default_factory=set)
    lost: tuple[Hashable, ...] = ()
    """Those that took a process down."""
    wait: Callable[[], object] = lambda: None
    """Waits for the device, and raises when it is lost."""

    def attempt(self, name: Hashable, piece: Callable[[], object], seconds: float = _PIECE) -> str:
        """Runs a piece that was not tried before, for at most so long; why it failed, or an empty string."""
        if name in self.ended:
            return ""
        self.send("begin", (name, seconds))
        failed = ""
        try:
            piece()
            self.wait()
        except DeviceLost:
            raise
        except Exception as error:  # its text alone is kept: the traceback would keep the tensors of the piece
            failed = said(error)
            try:
                self.wait()
            except Exception:
                self.send("over", failed)  # before what the piece held is freed, which may end the process
                raise DeviceLost(failed) from None
        self.ended.add(name)
        self.send("end", name)
        return failed


Work = Callable[..., None]
"""Takes `Attempts` and the arguments; a function of a module, so that a new process finds it."""


def said(error: BaseException) -> str:
    """An error on one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def run_here(work: Work, arguments: Sequence[object], receive: Receive) -> str:
    """Works in this process; why it was given up, or an empty string."""

    def send(what: str, value: object) -> None:
        if what not in ("begin", "end", "over"):
            receive(what, value)

    try:
        work(Attempts(send), *arguments)
    except DeviceLost as error:
        return str(error)
    return ""


def run(work: Work, arguments: Sequence[object], receive: Receive, lost: Callable[[Hashable, str], None]) -> str:
    """Works in one process after the other until all pieces were tried; why it was given up, or an empty string.

    ``arguments`` are pickled for each of them, so that a list that ``receive`` adds to is seen by the next.
    """
    ended: set[Hashable] = set()
    culprits: list[Hashable] = []
    while True:
        before = len(ended)
        within: list[tuple[Hashable, float]] = []
        reason = _run_process(work, arguments, receive, ended, culprits, within)
        if not reason:
            return ""
        if within:
            culprit = within[-1][0]
            ended.add(culprit)
            culprits.append(culprit)
            lost(culprit, reason)
        elif len(ended) == before:  # nor would the next one come further
            return reason


def _run_process(
    work: Work, arguments: Sequence[object], receive: Receive, ended: set[Hashable], culprits: Iterable[Hashable],
    within: list[tuple[Hashable, float]],
) -> str:  # fmt: skip
    """Follows one process: why it ended before its work was done, leaving in ``within`` the pieces that it was at."""
    spawn = multiprocessing.get_context("spawn")  # a fork would share what this process knows of the device
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_work, args=(there, ended, tuple(culprits), work, arguments), daemon=True)
    process.start()
    there.close()
    try:
        while here.poll(limit := within[-1][1] if within else START):
            what, value = here.recv()
            if what == "begin":
                within.append(value)
            elif what == "end":
                within.pop()
                ended.add(value)
            elif what == "over":
                return str(value)
            else:
                receive(what, value)
        return f"it was stopped after {limit:.0f} s"
    except EOFError:
        process.join(_END)
        code = process.exitcode
        return f"its process ended with {code}" if code is None or code >= 0 else f"its process died of {_signal(code)}"
    finally:
        process.kill()
        process.join(_END)
        here.close()


def _signal(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _work(
    connection: Connection, ended: set[Hashable], culprits: tuple[Hashable, ...], work: Work,
    arguments: Sequence[object],
) -> None:  # fmt: skip
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process also ends it

    def send(what: str, value: object) -> None:
        connection.send((what, value))

    try:
        work(Attempts(send, ended, culprits), *arguments)
    except DeviceLost:
        pass  # it was sent
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        send("over", said(error))
    else:
        send("over", "")
