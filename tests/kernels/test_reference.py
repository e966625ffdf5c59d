"""The reference on a device that the host must not wait for; "meta" stands for it."""

from typing import Any

import pytest
import torch
from exact import DTYPES, make_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtl_kernels.backends import reference
from mtl_kernels.rows import RowTable

SHAPES = [(40,), (7, 9), (5,), (3,)]


class OnOneDevice(TorchDispatchMode):
    """Refuses what brings a value to the device or back: the host would wait, and a capture fail."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.device.type == "meta" for tensor in tensors), function
        assert function is not torch.ops.aten._local_scalar_dense.default
        return found


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> RowTable:
    def fail(*arguments: object, **options: object) -> None:
        pytest.fail("made a tensor from values of the host")

    rows = make_rows(5, SHAPES, DTYPES, missing=0.4, seed=1)
    table = RowTable([[None if tensor is None else tensor.to("meta") for tensor in row] for row in rows])
    assert any(0 < sum(column) < 5 for column in zip(*table.reached, strict=True))
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, fail)
    return table


def test_gram_moves_nothing(table: RowTable) -> None:
    out = torch.zeros(2, 5, 5, dtype=torch.float64, device="meta")
    with OnOneDevice():
        reference.gram_into(table, [0, 1, 1, 0], out)


@pytest.mark.parametrize("accumulate", [False, True])
def test_combine_moves_nothing(table: RowTable, accumulate: bool) -> None:
    out = [None if like is None else torch.empty_like(like) for like in table.like]
    with OnOneDevice():
        weights = torch.zeros(1, 5, dtype=torch.float64, device="meta")
        reference.combine_into(table, weights, [0] * 4, out, accumulate)


@pytest.mark.parametrize(("solver", "options"), [("pcgrad", (1.0, 0.0)), ("min_norm", (0.0, 0.0, 0.0))])
def test_solvers_move_nothing(table: RowTable, solver: str, options: tuple[float, ...]) -> None:
    gram, rng = (
        torch.zeros(3, 5, 5, dtype=torch.float64, device="meta"),
        torch.empty(2, dtype=torch.int64, device="meta"),
    )
    with OnOneDevice():
        reference.solve(solver, gram, None, rng, options, None, True)


def test_absent_rows_are_zeros_at_their_place(cpu_only: None) -> None:
    product = torch.arange(1.0, 7.0).view(3, 2)
    spread = reference._spread(product, [1, 2, 4], 6)
    assert spread.tolist() == [[0, 0], [1, 2], [3, 4], [0, 0], [5, 6], [0, 0]]
