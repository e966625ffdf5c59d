"""Rows of which a table has a part: Gram matrices are those of the whole, combinations those of the part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mtl_kernels as mk
from mtl_kernels import Part, RowTable
from mtl_kernels.call import SolverCall
from mtl_kernels.solvers.min_norm import min_norm_options


class Pieces:
    """Rows cut in two, of which the second half is not here, and a parameter that both have whole."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.rows = torch.randn(3, 40, dtype=torch.float64)
        self.both = torch.randn(3, 7, dtype=torch.float64)
        self.whole = torch.cat([self.rows, self.both], 1)
        self.calls = 0

    def total(self, gram: Tensor) -> Tensor:
        self.calls += 1
        times = gram.shape[-1] // 3
        far = (self.rows[:, 25:] @ self.rows[:, 25:].T).repeat(times, times)
        return gram + (far if gram.dim() == 2 else torch.stack([far, torch.zeros_like(far)]))

    def table(self, counted: list[bool] | None = None) -> RowTable:
        entries = [[self.rows[k, :25].clone(), self.both[k].clone()] for k in range(3)]
        return RowTable(entries, part=Part(self.total, counted))


def test_gram_and_what_goes_by_it() -> None:
    pieces = Pieces()
    expected = pieces.whole @ pieces.whole.T
    torch.testing.assert_close(mk.gram(pieces.table()), expected)
    torch.testing.assert_close(mk.statistics(pieces.table()).gram, expected)
    torch.testing.assert_close(mk.statistics(pieces.table()).cosines, mk.cosines(expected))
    gram, weights, _ = mk.gram_solve(pieces.table(), SolverCall("min_norm", min_norm_options("exact", None, None)))
    torch.testing.assert_close(gram, expected)
    torch.testing.assert_close(weights, mk.min_norm_weights(expected).weights)
    torch.testing.assert_close(mk.cross_gram(pieces.table(), pieces.table()), expected)
    assert pieces.calls == 5


def test_groups_and_what_another_part_counts() -> None:
    pieces = Pieces()
    first, second = pieces.rows @ pieces.rows.T, pieces.both @ pieces.both.T
    torch.testing.assert_close(mk.gram(pieces.table(), groups=[0, 1]), torch.stack([first, second]))
    torch.testing.assert_close(mk.gram(pieces.table([True, False])), first)
    grouped = mk.gram(pieces.table([True, False]), groups=[0, 1])
    torch.testing.assert_close(grouped, torch.stack([first, torch.zeros_like(second)]))


def test_a_combination_is_of_the_part() -> None:
    pieces, weights = Pieces(), torch.tensor([0.2, 0.5, -1.0], dtype=torch.float64)
    near, both = mk.combine(pieces.table([True, False]), weights)
    torch.testing.assert_close(near, weights @ pieces.rows[:, :25])
    torch.testing.assert_close(both, weights @ pieces.both)
    assert pieces.calls == 0


@pytest.mark.parametrize("count", [True, False])
def test_a_part_of_no_elements(count: bool) -> None:
    table = RowTable([[torch.empty(0)], [torch.empty(0)]], part=Part(lambda gram: gram + 1, [count]))
    torch.testing.assert_close(mk.gram(table), torch.ones(2, 2, dtype=torch.float64))
