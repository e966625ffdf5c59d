"""Several ranks where not all goes alike: transforms that go by losses, errors of one rank, several optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import edges
from ranks.scenarios import check
from ranks.world import World


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", edges.TRANSFORMS)
def test_a_transform_is_that_of_one_process(pair: World, name: str, how: str) -> None:
    check(pair.run(edges.train, how, name), edges.train("one", name, world=2))


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_transform_that_fails_on_one_rank(pair: World, how: str, step: int) -> None:
    there, here = pair.run(edges.a_transform_that_fails, how, step)
    assert there[step].startswith("RanksDisagreeError: rank 1 failed: ValueError: no logarithm, say"), there
    assert here[step] == "ValueError: no logarithm, say"
    assert not any(there[:step] + there[step + 1 :] + here[:step] + here[step + 1 :])


def test_a_new_task_that_reaches_nothing_on_one_rank(pair: World) -> None:
    there, here = pair.run(edges.a_new_task_that_reaches_nothing, "ddp")
    assert "rank 1 failed: ValueError: loss 'new' reaches none" in there[2], there
    assert here[2].startswith("ValueError: loss 'new' reaches none") and there[3] == here[3] == ""


def test_the_reducer_comes_back_with_the_last_optimizer(pair: World) -> None:
    (on, first), (also_on, second) = pair.run(edges.replaced)
    assert on and also_on and torch.equal(first, second)


def test_optimizers_share_what_their_ranks_talk_by(pair: World) -> None:
    for few, more in pair.run(edges.many_optimizers):
        assert more <= few


def test_a_copy_meets_nobody(pair: World) -> None:
    assert pair.run(edges.a_copy_on_one_rank) == [1, 1]


def test_a_mesh_of_some_ranks_is_refused(pair: World) -> None:
    for good, text in pair.outcomes(edges.part_of_the_world):
        assert not good and "sharded over 1 of 2 ranks" in text, text


def test_unused_parameters_are_looked_for(pair: World) -> None:
    assert pair.run(edges.passes_that_end_early) == [[], []]
    for good, text in pair.outcomes(edges.one_pass_for_all, "ddp, unused"):
        assert not good and "a custom function with several outputs" in text, text
    pair.run(edges.one_pass_for_all, "ddp")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_checkpoint_with_a_transform(pair: World, how: str, tmp_path: Path) -> None:
    outcomes: list[Any] = pair.run(edges.save_with_a_transform, how, str(tmp_path), True)
    assert all(torch.equal(a, b) for pairs in outcomes for a, b in pairs)
    for good, text in pair.outcomes(edges.save_with_a_transform, how, str(tmp_path), False):
        assert not good and "TrainingState: the optimizer holds 3 parameter(s) that the model does not" in text
