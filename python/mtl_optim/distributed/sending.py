"""Rows that are reduced while the passes of the next tasks run."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from ..capture.grads import Row
from . import collectives
from .layout import Layout

_IN_FLIGHT = 2
"""Whole rows that are held while they are sent; the next one waits for the first of them."""


class Sent(list[Tensor | None]):
    """A row of which some parameters are on their way: this rank's pieces of their mean, not there before `wait`.

    Attributes:
        pieces: by parameter, also of those that this rank does not reach. layout: where they lie.
        kept: the row without them.
    """

    def __init__(self, row: Row, layout: Layout) -> None:
        super().__init__(row)
        self.layout, self.pieces = layout, dict[int, Tensor]()
        self.kept: Row = list(row)
        self.works: list[Work] = []

    def wait(self) -> None:
        """Until the pieces can be read; on a GPU the stream waits, and not the host."""
        while self.works:
            self.works.pop().wait()


class Sender:
    """Sends the rows of one call of ``backward``, in the order of its tasks.

    Every rank sends as many: one whose pass has failed sends zeros for the rest, so that what the others send does not
    meet collectives of a later step.

    Args:
        num_rows: how many there will be.
        layout: of the parameters that are sent.
    """

    def __init__(self, num_rows: int, layout: Layout, size: int, group: ProcessGroup | None) -> None:
        self._left, self._layout = num_rows, layout
        self._size, self._group = size, group
        self._flying: deque[Sent] = deque()
        self._broken = False

    def send(self, row: Row) -> Sent:
        """Starts to reduce a row that is complete; what stands for it until it is combined."""
        sent, self._left = Sent(row, self._layout), self._left - 1
        try:
            if len(self._flying) == _IN_FLIGHT:
                self._flying.popleft().wait()
            for dtype in self._layout.slots:
                flat = self._layout.means(row, dtype, padded=True)
                share, work = collectives.start_reduce_scatter(flat, self._size, self._group)
                sent.works.append(work)
                sent.pieces.update(self._layout.pieces(dtype, share))
        except BaseException:
            self._broken = True
            raise
        for p, piece in sent.pieces.items():
            sent.kept[p] = None
            sent[p] = None if row[p] is None else piece
        self._flying.append(sent)
        return sent

    def give_up(self) -> None:
        """Ends what was begun, after an error of this rank or of another."""
        if self._broken:
            return
        nothing: Row = [None] * len(self._layout.params)
        with torch.no_grad():
            while self._left:
                self.send(nothing)
        while self._flying:
            self._flying.popleft().wait()
