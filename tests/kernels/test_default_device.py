"""Torch's default device is where a caller's tensors are created, and no business of the kernels'."""

import pytest
import torch
from exact import make_rows
from placement import rng_state

import mtl_kernels as mk

SHAPES = [(40,), (7, 9)]


@pytest.mark.parametrize("other", ["meta", "cpu"])
def test_another_default_device(backend: str, other: str) -> None:
    rows, weights, rng = make_rows(3, SHAPES, missing=0.2, seed=0), torch.randn(3), rng_state(3)
    before = [torch.zeros_like(tensor) for tensor in mk.combine(rows, weights, backend=backend)]
    expected = everything(rows, weights, before, rng, backend)
    moved = [[None if tensor is None else tensor.clone() for tensor in row] for row in rows]
    with torch.device(other):  # and no table of these addresses is kept
        found = everything(moved, weights, before, rng, backend)
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert one.device == two.device and torch.equal(one, two)


def everything(
    rows: list[list[torch.Tensor | None]],
    weights: torch.Tensor,
    before: list[torch.Tensor],
    rng: torch.Tensor,
    backend: str,
) -> list[torch.Tensor]:
    """What every operation finds."""
    gram, pcgrad, certificate = mk.gram_solve(rows, mk.SolverCall("pcgrad", (1.0, 0.0), rng=rng), backend=backend)
    min_norm = mk.min_norm_weights(gram, backend=backend)
    out, flag = [tensor.clone() for tensor in before], weights.new_zeros(1)
    mk.combine(rows, weights, out=out, scale=weights[:1], found_inf=flag, accumulate=True, backend=backend)
    combined = [tensor for tensor in mk.combine(rows, weights, backend=backend) if tensor is not None]
    return [
        mk.gram(rows, groups=[0, 1], backend=backend), *mk.statistics(rows, backend=backend), gram, pcgrad, certificate,
        min_norm.weights, *out, flag, *combined, mk.pcgrad_weights(gram, rng=rng, backend=backend),
    ]  # fmt: skip


def test_what_goes_to_a_gpu_is_made_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory is the CPU's; elsewhere torch refuses to make it."""
    from mtl_kernels import uploads
    from mtl_kernels.backends import cuda

    seen: list[torch.device] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: seen.append(tensor.device) or tensor)
    with torch.device("meta"):
        stream = cuda._Stream(torch.device("meta"))
        stream.table(uploads.packed([1, 2, 3]), [0, 0, 0], lambda words, codes: None)
        stream.plan("plan", lambda: type("Plan", (), {"words": b""})())
        capture = cuda._Capture(torch.device("cpu", 0), lambda *arguments: seen.append(arguments[1]), [])
        capture.counters(3)
    assert seen[:2] == [torch.device("cpu")] * 2 and seen[2] != 0
