"""Several ranks against one process with all of their batches."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import traffic
from mtl_optim import MultiTaskOptimizer, PCGrad
from ranks import cheaper, scenarios
from ranks.scenarios import check
from ranks.world import World

REPLICATED = ("ddp", "group", "group, all")
SHARDED = ("fsdp",)
METHODS = tuple(scenarios.METHODS)


@functools.cache
def alone(world: int, method: str, micro: int = 1, **options: Any) -> dict[str, Any]:
    return scenarios.train("one", method, micro=micro, world=world, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", [*REPLICATED, *SHARDED])
def test_two_ranks_are_one_process(pair: World, how: str, method: str) -> None:
    check(pair.run(scenarios.train, how, method), alone(2, method))


@pytest.mark.parametrize("how", ["ddp, unused", "ddp, views"])
def test_kinds_of_distributed_data_parallel(pair: World, how: str) -> None:
    check(pair.run(scenarios.train, how, "mgda"), alone(2, "mgda"))


def test_a_static_graph_is_refused(pair: World) -> None:
    for good, text in pair.outcomes(scenarios.train, "ddp, static", "mgda"):
        assert not good and "static_graph=True" in text


def test_four_ranks_are_one_process(pair: World, tmp_path: Path) -> None:
    """And tensor parallel layers inside FSDP2, where two ranks have a batch together; and what two ranks have saved."""
    saved = pair.run(scenarios.train_and_save, "fsdp", str(tmp_path), 2)
    four = World(4)
    try:
        for how, method in (
            ("group", "pcgrad"),
            ("ddp", "upgrad"),
            ("fsdp", "mgda"),
            ("hsdp", "pcgrad"),
            ("hsdp", "upgrad"),
        ):
            check(four.run(scenarios.train, how, method), alone(4, method))
        for method in ("pcgrad", "mgda"):
            found = four.run(scenarios.train, "tensor parallel", method, width=12)
            check(found, alone(2, method, width=12))
        for how in ("fsdp", "hsdp"):
            for found in four.run(scenarios.train_and_save, how, str(tmp_path), 2):
                assert all(torch.equal(a, b) for a, b in zip(found, saved[0], strict=True))
    finally:
        four.close()


@pytest.mark.parametrize("blocks", [False, True], ids=["calls", "blocks"])
@pytest.mark.parametrize("how", ["ddp", "group", "fsdp"])
def test_micro_batches(pair: World, how: str, blocks: bool) -> None:
    if how == "fsdp" and blocks:
        pytest.skip("tasks of blocks have other forward passes")
    check(pair.run(scenarios.train, how, "cagrad", micro=3, blocks=blocks), alone(2, "cagrad", micro=3, blocks=blocks))


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "parameter"},
        {"granularity": "group"},
        {"head_scaling": "weights"},
        {"refresh_every": 2, "head_scaling": "weights"},
        {"capture": "arena"},
        {"apart": "mtl"},
        {"apart": "gram"},
        {"apart": "gram", "granularity": "parameter"},
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_options(pair: World, how: str, options: dict[str, Any]) -> None:
    if how == "fsdp" and "capture" in options:
        pytest.skip("refused")
    check(pair.run(scenarios.train, how, "mgda", **options), alone(2, "mgda", **options))


@pytest.mark.parametrize("method", METHODS)
def test_features(pair: World, method: str) -> None:
    """Each rank has those of its own batch; a layer in front of them is shared by two tasks."""
    for how in ("ddp", "group, all"):
        check(pair.run(scenarios.train, how, method, features=True), alone(2, method, features=True))
    for good, text in pair.outcomes(scenarios.train, "fsdp", method, features=True):
        assert not good and "features= where parameters are sharded" in text


@pytest.mark.parametrize("passes", ["loop", "batched"])
@pytest.mark.parametrize("last", [False, True], ids=["all", "last layers"])
def test_factored_rows(pair: World, passes: str, last: bool) -> None:
    """In a basis of the inputs of all ranks; more than half of what rows send is saved."""
    for how, method in (("ddp", "pcgrad"), ("group, all", "upgrad")):
        found = pair.run(cheaper.wide, how, method, last=last, capture="factored", passes=passes)
        check(found, cheaper.wide("one", method, last=last))
        assert found[0]["how"].count("factored: 24 rows") == (1 if last else 2), found[0]["how"]
        rows = pair.run(cheaper.wide, how, method, last=last)
        assert all(
            one["counted"] < other["counted"] / (1 if last else 2) for one, other in zip(found, rows, strict=True)
        )


def test_factored_rows_of_uneven_batches(pair: World) -> None:
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        expected = pair.run(cheaper.wide, "ddp", "mgda", sizes=(7, 4))[0]
        check(pair.run(cheaper.wide, "ddp", "mgda", sizes=(7, 4), capture="factored", dtype=dtype), expected, rtol)


@pytest.mark.parametrize("passes", ["auto", "batched"])
def test_factored_rows_that_one_rank_cannot_take(pair: World, passes: str) -> None:
    """A weight that one rank uses unseen has whole rows on all of them."""
    options = {"guest": 1, "passes": passes}
    if passes == "batched":
        for good, text in pair.outcomes(cheaper.wide, "ddp", "mgda", capture="factored", **options):
            assert not good and "one backward pass for all tasks cannot run: " in text
        return
    found = pair.run(cheaper.wide, "ddp", "mgda", capture="factored", **options)
    check(found, pair.run(cheaper.wide, "ddp", "mgda", guest=1)[0])
    assert found[0]["how"] == found[1]["how"] and "factored: 12 rows" in found[0]["how"], found[0]["how"]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16 autocast"])
def test_other_dtypes(pair: World, how: str, autocast: bool) -> None:
    """Against float64, at most twice the error of one process in the same dtype."""
    exact = alone(2, "pcgrad")
    single = alone(2, "pcgrad", dtype=torch.float32, autocast=autocast)
    found = pair.run(scenarios.train, how, "pcgrad", dtype=torch.float32, autocast=autocast)
    floor = 2e-2 if autocast else 1e-6
    for result in found:
        for name in ("weights", "grams", "params"):
            for a, b, c in zip(result[name], single[name], exact[name], strict=True):
                scale = float(c.abs().max())
                assert float((a - c).abs().max()) <= 2 * float((b - c).abs().max()) + floor * scale
        assert all(torch.equal(a, b) for a, b in zip(result["weights"], found[0]["weights"], strict=True))


@pytest.mark.parametrize("how", [*REPLICATED, *SHARDED])
def test_other_tasks_on_one_rank(pair: World, how: str) -> None:
    for good, text in pair.outcomes(scenarios.other_tasks_on_one_rank, how):
        assert not good and "rank 0: backward() of tasks task0, task1, task2; rank 1: backward()" in text, text


@pytest.mark.parametrize("how", ["ddp", "group"])
def test_an_error_on_one_rank(pair: World, how: str) -> None:
    (first, there), (second, here) = pair.outcomes(scenarios.an_error_on_one_rank, how)
    assert not first and "RanksDisagreeError: rank 1 failed: ValueError: no memory, say" in there, there
    assert not second and "ValueError: no memory, say" in here


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_rank_that_dies(how: str) -> None:
    world = World(2, timeout=5)
    try:
        (first, text), (second, _) = world.outcomes(scenarios.a_rank_that_dies, how)
        assert not first and not second and "Error" in text
    finally:
        world.close()


def test_nothing_that_says_how_gradients_are_reduced(pair: World) -> None:
    for good, text in pair.outcomes(scenarios.nothing_said):
        assert not good and "one of 2 ranks, and nothing says how gradients are reduced" in text
    first, second = pair.run(scenarios.apart)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_gradients_of_one_rank_that_are_not_finite(pair: World, how: str) -> None:
    first, second = pair.run(scenarios.not_finite_on_one_rank, how)
    for found in (first, second):
        assert not all(grad is None or bool(grad.isfinite().all()) for grad in found["grads"])
        torch.testing.assert_close(found["weights"], torch.full((3,), 1 / 3, dtype=torch.float64))
        assert all(torch.equal(value, first["state"][name]) for name, value in found["state"].items())


@pytest.mark.parametrize("how", ["ddp", "group, all"])
def test_a_parameter_that_a_task_reaches_on_one_rank_alone(pair: World, how: str) -> None:
    expected = scenarios.absent_on_one_rank_alone()
    for found in pair.run(scenarios.absent_on_one_rank, how):
        torch.testing.assert_close(found["gram"], expected["gram"])
        torch.testing.assert_close(found["weights"], expected["weights"])
        for a, b in zip(found["grads"], expected["grads"], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("mode", "how"), [("scatter", "group"), ("all", "group, all"), ("gram=False", "ddp"), ("features", "group")]
)
def test_what_is_sent_is_what_the_formula_says(pair: World, mode: str, how: str) -> None:
    for tasks in (2, 6):  # whose Gram matrices are even
        step = traffic.Step(tasks, shared=1200, ranks=2, heads=10 * tasks, share=0.2)
        for steps in (1, 2):  # the second sends rows as they come
            expected = traffic.MODES[mode].sent(step) + step.gram_bytes / 8
            assert pair.run(cheaper.elements_sent, how, tasks, steps, mode) == [pytest.approx(expected)] * 2


@pytest.mark.parametrize("how", ["ddp", "group"])
def test_rows_are_sent_as_they_come(pair: World, how: str) -> None:
    """To the bit what they are when all wait for the last; and right while tasks and shared parameters change."""
    sent, waited = pair.run(scenarios.changing, how), pair.run(scenarios.changing, how, sends=False)
    for a, b in zip(sent, waited, strict=True):
        assert a["sent"] == [False] + [True] * 5
        for name in ("weights", "grams"):
            assert all(torch.equal(p, q) for p, q in zip(a[name][:3], b[name][:3], strict=True))
    expected = scenarios.changing("one", 2)
    check(sent, expected)
    check(waited, expected)


def test_rows_that_were_sent_are_held_no_more(pair: World) -> None:
    for found in pair.run(scenarios.rows_that_are_gone):
        assert found == [0, 1, 2, 3, 0, 0, 0, 0]


def test_an_error_while_rows_are_sent(pair: World) -> None:
    first, second = pair.run(scenarios.an_error_while_rows_are_sent, "ddp")
    assert "RanksDisagreeError: rank 1 failed: ValueError: no memory, say" in first["said"]
    assert "ValueError: no memory, say" in second["said"]
    assert all(torch.equal(a, b) for a, b in zip(first["params"], second["params"], strict=True))


def test_buffers_are_broadcast_and_the_reducer_comes_back(pair: World) -> None:
    first, second = pair.run(scenarios.buffers_of_a_model, "ddp")
    assert float(first[-1]) == float(second[-1]) == 1.0
    for step in (1, 2):  # those of rank 0 went to rank 1 before the pass of each step
        assert not torch.equal(first[step], second[step])


def test_what_data_parallel_takes(pair: World) -> None:
    for good, text in pair.outcomes(scenarios.another_model):
        assert not good and "a model that holds none of the parameters of the optimizer" in text
    for good, text in pair.outcomes(scenarios.a_bare_model):
        assert not good and "TypeError" in text and "wrap the model, or pass torch.distributed.group.WORLD" in text
    for good, text in pair.outcomes(scenarios.elements):
        assert not good and "GradDrop combines elements of rows, of which a rank has a part" in text
    for good, text in pair.outcomes(scenarios.train, "fsdp", "mgda", capture="factored"):
        assert not good and 'capture="factored" where parameters are sharded' in text


@pytest.mark.parametrize("kind", ["FlatParameter", "ds_id"])
def test_parameters_that_other_libraries_shard(kind: str) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    setattr(param, "_is_flat_param" if kind == "FlatParameter" else kind, True)
    with pytest.raises(RuntimeError, match=r"Use fully_shard \(FSDP2\)"):
        MultiTaskOptimizer(torch.optim.SGD([param]), PCGrad())


def test_no_process_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        MultiTaskOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))]), PCGrad(), data_parallel=True)
    with pytest.raises(ValueError, match="reduce"):
        MultiTaskOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))]), PCGrad(), reduce="sum")


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("how", ["ddp", "group", "fsdp"])
def test_scaled_losses(pair: World, how: str, micro: int) -> None:
    check(pair.run(scenarios.train, how, "mgda", scaled=True, micro=micro), alone(2, "mgda", micro=micro))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_scaler_skips_the_step_of_all(pair: World, how: str) -> None:
    for found in pair.run(scenarios.skipped_together, how):
        assert found == {"same": True, "scale": 2.0**9}


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_run_that_was_killed_goes_on(pair: World, tmp_path: Path, how: str) -> None:
    """To the bit, from a checkpoint of each step, in new processes."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    straight.mkdir()
    broken.mkdir()
    expected = pair.run(scenarios.train_and_save, how, str(straight), 4)
    world = World(2, timeout=5)
    try:
        assert not any(good for good, _ in world.outcomes(scenarios.train_and_save, how, str(broken), 4, kill_at=2))
    finally:
        world.close()
    found = pair.run(scenarios.train_and_save, how, str(broken), 4)
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    if how == "fsdp":
        for good, text in pair.outcomes(scenarios.load_with_another_method, str(broken / "step4")):
            assert not good and "was saved with PCGrad, this optimizer uses NashMTL" in text
