"""What training loops do on two ranks, against one process with all of their batches."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from ranks import loops
from ranks.scenarios import check
from ranks.world import World


@functools.cache
def alone(**options: Any) -> dict[str, Any]:
    return loops.train("one", **options)


def test_compiled_parts(pair: World) -> None:
    check(pair.run(loops.train, "ddp of compiled parts"), alone())


@pytest.mark.parametrize("how", ["ddp of a compiled model", "compiled ddp"])
def test_a_compiled_model(pair: World, how: str) -> None:
    """Whose heads get zeros from the other tasks, so that they are kept out of the combination."""
    check(pair.run(loops.train, how, plain_heads=True), alone(plain_heads=True))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_checkpointing(pair: World, how: str) -> None:
    check(pair.run(loops.train, how, checkpointed=True), alone())


@pytest.mark.parametrize("how", ["ddp, unused", "ddp, views", "fsdp"])
def test_a_task_that_is_absent(pair: World, how: str) -> None:
    check(pair.run(loops.train, how, absent=True), alone(absent=True))


@pytest.mark.parametrize("absent", [False, True], ids=["", "absent"])
def test_blocks_of_sharded_models(pair: World, absent: bool) -> None:
    """A forward and a backward pass a task."""
    check(pair.run(loops.train, "fsdp", blocks=True, absent=absent), alone(absent=absent))


@pytest.mark.parametrize("how", ["fsdp, in part", "fsdp, kept whole", "fsdp, offloaded"])
def test_ways_to_shard(pair: World, how: str) -> None:
    check(pair.run(loops.train, how), alone())
    check(pair.run(loops.train, how, plain_heads=True), alone(plain_heads=True))


def test_forward_passes_in_float32(pair: World) -> None:
    check(pair.run(loops.train, "fsdp, float32"), alone(), rtol=1e-4)


def test_join_is_refused(pair: World) -> None:
    """A rank out of batches would leave the others waiting."""
    for good, text in pair.outcomes(loops.joined, True, batches=[2, 1]):
        assert not good and "give all ranks as many batches" in text


def test_join_that_is_off(pair: World) -> None:
    first, second = pair.run(loops.joined, False, batches=[2, 2])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_evaluation_in_join(pair: World) -> None:
    """Batches without gradients may be uneven; what stays on in the model behind the block is turned off."""
    pair.run(loops.evaluated, batches=[2, 1])
