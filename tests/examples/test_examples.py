"""Examples with trainers train what `opt.backward(losses); opt.step()` trains in one process with all batches."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples import launch, misuse
from examples.problem import Net, Points
from mtl_optim import MultiTaskOptimizer, PCGrad

NEEDS = {
    "torchrun_ddp": (),
    "torchrun_fsdp2": (),
    "accelerate_loop": ("accelerate",),
    "lightning_module": ("pytorch_lightning",),
    "hf_trainer": ("accelerate", "transformers"),
}
RATE, CALLS = 1e-2, 16  # calls of the model in an epoch, on one rank


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(params=NEEDS)
def example(request: pytest.FixtureRequest) -> str:
    for package in NEEDS[request.param]:
        if importlib.util.find_spec(package) is None:  # an import here would take seconds
            pytest.skip(f"{package} is not installed")
    return request.param


def decay_of(example: str) -> float:
    return 0.0 if example == "hf_trainer" else 0.01


def rate(example: str, t: int, epochs: int, per_epoch: int) -> float:
    """The learning rate of step t, in a run of so many epochs."""
    if example == "torchrun_fsdp2":
        return RATE
    return RATE * (1 - t / (epochs * per_epoch) if example == "hf_trainer" else 0.8 ** (t // per_epoch))


def plain(steps: list[list[dict[str, Tensor]]], rates: list[float], divisors: list[int], decay: float) -> list[Tensor]:
    """The parameters after the plain loop.

    Args:
        steps: the micro-batches of every step, over all ranks.
        divisors: what the losses of every step are divided by.
    """
    torch.manual_seed(0)
    net = Net()
    opt = MultiTaskOptimizer(torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=decay), PCGrad())
    for step, rate, divisor in zip(steps, rates, divisors, strict=True):
        opt.param_groups[0]["lr"] = rate
        found = [net(**batch) for batch in step]
        opt.zero_grad()
        opt.backward({name: sum(losses[name] for losses in found) / divisor for name in found[0]})
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
    return [p.detach() for p in net.parameters()]


def over_ranks(results: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """Every batch of the run: those of the ranks behind one another."""
    ranks = [result["batches"] for result in results]
    assert all(not torch.equal(a["x"], b["x"]) for a, b in itertools.pairwise(batches[0] for batches in ranks))
    return [
        {name: torch.cat([batch[name] for batch in together]) for name in together[0]}
        for together in zip(*ranks, strict=True)
    ]


def check(results: list[dict[str, Any]], expected: list[Tensor]) -> None:
    for result in results:
        for a, b in zip(result["params"], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def losses(params: list[Tensor]) -> dict[str, float]:
    net = Net()
    with torch.no_grad():
        for p, value in zip(net.parameters(), params, strict=True):
            p.copy_(value)
        return {name: float(loss) for name, loss in net(**Points().columns).items()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_script_is_the_plain_loop(example: str, ranks: int) -> None:
    results = launch.launch(ranks, launch.script, example, torchrun=ranks > 1 or example.startswith("torchrun"))
    steps = [[batch] for batch in over_ranks(results)]
    per_epoch = CALLS // ranks
    epochs = len(steps) // per_epoch
    rates = [rate(example, t, epochs, per_epoch) for t in range(len(steps))]
    check(results, plain(steps, rates, [1] * len(steps), decay_of(example)))
    assert "cosines" in results[0]["printed"]
    torch.manual_seed(0)
    before, after = losses([p.detach() for p in Net().parameters()]), losses(results[0]["params"])
    assert all(after[name] < 0.8 * before[name] for name in before), (before, after)


def test_micro_batches_from_a_checkpoint_are_the_plain_loop(example: str, tmp_path: Path) -> None:
    """Two ranks, eight batches each an epoch, three a step: the last step of an epoch has two."""
    results = launch.launch(2, launch.resumed, example, str(tmp_path / "checkpoint"), 3)
    batches = over_ranks(results)
    assert len(batches) == 16
    steps = [batches[i + j : min(i + j + 3, i + 8)] for i in (0, 8) for j in (0, 3, 6)]
    divisors = [len(step) if example == "hf_trainer" else 3 for step in steps]
    # The first step after the checkpoint has the rate that was saved with the optimizer.
    rates = [rate(example, t, 1 if t <= 3 else 2, 3) for t in range(6)]
    check(results, plain(steps, rates, divisors, decay_of(example)))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("trainer", ["accelerate", "lightning", "hf"])
def test_what_people_will_try_first_is_refused(trainer: str, ranks: int) -> None:
    package = {"lightning": "pytorch_lightning", "hf": "transformers"}.get(trainer, trainer)
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    for errors in launch.launch(ranks, getattr(misuse, f"of_{trainer}"), torchrun=ranks > 1):
        assert "step() with no task captured" in errors["summed"] and "opt.backward(" in errors["summed"]
        assert errors["early"] == "" if ranks == 1 else "Pass data_parallel= to MultiTaskOptimizer" in errors["early"]
        if trainer != "accelerate":
            assert errors["dict"]  # in the trainer's own words
            assert "wrap the optimizer in a MultiTaskOptimizer" in errors["plain"]
