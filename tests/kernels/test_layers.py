"""One Gram matrix per layer: groups of parameters, solved as one batch, each with its own weights."""

import pytest
import torch
from exact import make_rows

import mtl_kernels as mk

SHAPES = [(20, 3), (3,), (15,), (4, 4), (40,), (1,)]


@pytest.mark.parametrize("groups", [[0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2], [2, 0, 1, 0, 2, 1]])
@pytest.mark.parametrize("missing", [0, 0.25])
def test_each_layer_is_a_problem_of_its_own(backend: str, groups: list[int], missing: float) -> None:
    rows = make_rows(4, SHAPES, [torch.float64], missing=missing, seed=1)
    batch = mk.gram(rows, groups=groups, backend=backend)
    weights = mk.min_norm_weights(batch, backend=backend).weights
    found = mk.combine(rows, weights, groups=groups, backend=backend)
    for group in set(groups):
        params = [p for p, g in enumerate(groups) if g == group]
        layer = [[row[p] for p in params] for row in rows]
        gram = mk.gram(layer, backend=backend)
        torch.testing.assert_close(batch[group], gram, rtol=1e-12, atol=1e-12)
        d = mk.combine(layer, mk.min_norm_weights(gram, backend=backend).weights, backend=backend)
        for p, expected in zip(params, d, strict=True):
            if expected is None:
                assert found[p] is None
            else:
                torch.testing.assert_close(found[p], expected, rtol=1e-9, atol=1e-9)


def test_the_groups_add_up_to_the_whole(backend: str) -> None:
    rows = make_rows(5, SHAPES, [torch.float32], missing=0.2, seed=2)
    batch = mk.gram(rows, groups=range(6), backend=backend)
    torch.testing.assert_close(batch.sum(0), mk.gram(rows, backend=backend), rtol=1e-13, atol=1e-12)


def test_one_weight_for_all_groups_is_the_plain_combination(backend: str) -> None:
    rows, weights = make_rows(3, SHAPES, seed=3), torch.tensor([0.25, -1.0, 2.0])
    plain = mk.combine(rows, weights, backend=backend)
    grouped = mk.combine(rows, weights.expand(3, -1), groups=[0, 1, 2, 2, 1, 0], backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, grouped, strict=True))


def test_dense_rows_are_one_group(backend: str) -> None:
    matrix = torch.randn(3, 50)
    gram = mk.gram(matrix, groups=[0], backend=backend)
    assert torch.equal(gram[0], mk.gram(matrix, backend=backend))
    weights = torch.ones(1, 3)
    assert torch.equal(
        mk.combine(matrix, weights, groups=[0], backend=backend),
        mk.combine(matrix, weights[0], backend=backend),
    )
