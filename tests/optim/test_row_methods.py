"""The methods that need the rows: on rows, in the optimizer, from step to step. Definitions: benchmarks/oracles."""

from __future__ import annotations

import copy
import io
import pickle
import re
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mtl_kernels as mk
from benchmarks.oracles.row_methods import dual_balanced, tracked, trimmed
from mtl_optim import (
    CRMOGM,
    DBMTL,
    ExcessMTL,
    GradDrop,
    MoCo,
    MultiTaskOptimizer,
    Normalized,
    TrimmedMean,
    methods,
)
from mtl_optim.methods.rows import RowMethod
from optim.oracle import TwoHeads, flatten, rows_of
from optim.recording import record

BUILD: dict[str, Callable[[], RowMethod]] = {
    "graddrop": lambda: GradDrop(seed=5),
    "graddrop leaks": lambda: GradDrop([0.0, 0.25, 0.5, 1.0], seed=5),
    "trimmed mean": lambda: TrimmedMean(1),
    "excess": ExcessMTL,
    "excess warm": lambda: ExcessMTL(0.5, warmup=2),
    "moco": MoCo,
    "moco rho": lambda: MoCo(0.9, 1.0, 0.5, 0.0, 1.0),
    "dbmtl": DBMTL,
    "dbmtl sigma": lambda: DBMTL(0.5, 0.5),
}
KEEPING = [name for name in BUILD if name.startswith(("excess", "moco", "dbmtl"))]
EACH = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
EACH_KEEPING = pytest.mark.parametrize("build", [BUILD[name] for name in KEEPING], ids=KEEPING)
LOSSES = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
ALL = ("0", "1", "2", "3")


def matrix(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cut(rows: Tensor) -> list[list[Tensor | None]]:
    """The same rows as parameters of several shapes, one that nobody reaches and one without elements between them."""
    return [[row[:4].view(2, 2), None, row[4:5].squeeze(), row[:0], row[5:].view(3, 1, 2)] for row in rows]


def joined(parts: list[Tensor | None]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts if part is not None])


def same_state(method: methods.Method, before: dict[str, Tensor]) -> bool:
    after = method.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_lists_are_the_matrix(build: Callable[[], RowMethod], dtype: torch.dtype) -> None:
    dense, lists = build(), build()
    for seed in range(3):
        rows = matrix(seed, dtype)
        found, parts = dense(rows, losses=LOSSES), lists(cut(rows), losses=LOSSES)
        assert found.dtype == dtype and found.shape == (11,) and not found.requires_grad
        assert parts[1] is None and [part.shape for part in parts if part is not None] == [(2, 2), (), (0,), (3, 1, 2)]
        # Sums over parameters are added up in another order.
        close = {} if dtype.itemsize < 4 else {"rtol": 1e-12 if dtype is torch.float64 else 1e-5, "atol": 1e-14}
        torch.testing.assert_close(joined(parts), found, **close)
    assert all(value.dtype is dtype for key, value in dense.state.items() if "." in key)


@EACH
def test_none_counts_as_zero(build: Callable[[], RowMethod]) -> None:
    ours, zeros = build(), build()
    for seed in range(3):
        rows = cut(matrix(seed))
        rows[1][0], rows[3][4] = None, None
        full = [list(row) for row in rows]
        full[1][0], full[3][4] = torch.zeros(2, 2).double(), torch.zeros(3, 1, 2).double()
        found, expected = (joined(one(given, losses=LOSSES)) for one, given in ((ours, rows), (zeros, full)))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for key, value in zeros.state_dict().items():
        torch.testing.assert_close(ours.state[key], value, rtol=1e-12, atol=1e-14)


@EACH
def test_absent_tasks(build: Callable[[], RowMethod]) -> None:
    """A mask over whatever the rows hold, or None in their place; what is kept of the absent ones stays."""
    masked, absent = build(), build()
    for seed, mask in enumerate([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]]):
        active, rows, losses = torch.tensor(mask, dtype=torch.bool), matrix(seed), LOSSES.clone()
        before = masked.state_dict()
        given = [list(row) if here else [None] * 5 for row, here in zip(cut(rows), mask, strict=True)]
        rows[~active], losses[~active] = torch.inf, torch.nan
        found = masked(cut(rows), losses=losses, active=None if seed == 0 else active)
        table = mk.RowTable(given)
        other = absent.combine([table], losses=losses, active=active)
        assert torch.equal(joined(found), joined(other.combined)) and joined(found).isfinite().all()
        for key, value in masked.state_dict().items():
            if seed > 0 and key not in ("rng", "step"):
                assert torch.equal(value[~active], before[key][~active])
                assert "." not in key or value.numel() == 0 or not torch.equal(value, before[key])
    assert same_state(masked, absent.state_dict())


def test_absence_makes_no_task_lighter_or_heavier() -> None:
    method, away = ExcessMTL(), torch.tensor([True, True, True, False])
    method(matrix(0))
    before = method.state["log_weights"].clone()
    for seed in range(1, 6):
        method(matrix(seed), active=away)
    assert method.state["log_weights"][3] == before[3]
    assert method.state["log_weights"].exp().sum() == pytest.approx(1, rel=1e-12)


def test_definitions_by_hand() -> None:
    """Two tasks in one dimension, two steps, numbers to check on paper."""
    rows = torch.tensor([[2.0], [-4.0]], dtype=torch.float64)
    losses = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert TrimmedMean(1)(torch.tensor([[9.0, 0], [1, 5], [2, -5]])).tolist() == [2, 0]
    # S = 4, 16: e = 4/2, 16/4 = 2, 4; w = softmax(2, 4). Then S = 8, 32: e = 4/sqrt 8 / 2, 16/sqrt 32 / 4, alike.
    excess = ExcessMTL()
    share = 1 / (1 + np.exp(2.0))
    for _ in range(2):
        np.testing.assert_allclose(excess(rows).numpy(), [2 * share - 4 * (1 - share)], rtol=1e-7)
    # y = 0.5, -1.5 after beta = 1/2, then towards 1, -3 by 1/2/sqrt 2.
    moco, rate = MoCo(gamma=0), 0.5 / np.sqrt(2)
    np.testing.assert_allclose(moco(rows, losses=losses).numpy(), [0.5 * 0.5 - 0.5 * 1.5])
    np.testing.assert_allclose(moco(rows, losses=losses).numpy(), [-0.5 - 0.5 * rate])
    # b = 0.1 h, then 0.19 h with h = 2, -4/3: both as long as the first.
    balanced = DBMTL()
    for size in (0.2, 0.38):
        np.testing.assert_allclose(balanced(rows, losses=losses).numpy(), [0], atol=1e-6 * size)
        np.testing.assert_allclose(balanced.state["average.0"].norm(dim=1)[0], size, rtol=1e-7)


def test_signs_are_kept_as_often_as_they_are_pure() -> None:
    """P = (1 + sum / sum of sizes) / 2: with 3 and -1 the positive one is kept in three of four elements."""
    rows = torch.tensor([[3.0], [-1.0], [0.0]]).expand(3, 40000)
    method = GradDrop(seed=1)
    first, second = method(rows), method(rows)
    assert set(first.tolist()) == {3.0, -1.0} and method.state["rng"].tolist() == [1, 2]
    for found in (first, second):
        assert abs((found == 3).double().mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 40000)
    assert abs(((first == 3) & (second == 3)).double().mean() - 0.5625) < 0.01
    leaky = GradDrop([0.5, 1, 0])(rows)
    assert set(leaky.tolist()) == {2.0, 0.5}  # 3 - 1, or 3 / 2 - 1
    assert torch.equal(GradDrop(1)(rows), rows.sum(0)) and GradDrop()(torch.zeros(2, 3)).tolist() == [0, 0, 0]


@EACH
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_rows_show_and_leave_what_is_kept(build: Callable[[], RowMethod], bad: float) -> None:
    method, clean = build(), build()
    for seed in range(3):
        rows = matrix(seed)
        rows[1, 3] = bad
        before = method.state_dict()
        found = method(rows, losses=LOSSES)
        if isinstance(method, TrimmedMean):
            assert found[3].isnan() == bool(np.isnan(bad))  # an infinity is an extreme
        else:
            assert not found[3].isfinite()
        for key, value in method.state_dict().items():
            assert key == "rng" or torch.equal(value, before.get(key, zero_state(key, value)))
        assert (
            torch.equal(method(matrix(seed), losses=LOSSES), clean(matrix(seed), losses=LOSSES))
            or "rng" in method.state
        )
    away = torch.tensor([True, False, True, True])
    assert method(rows, losses=LOSSES, active=away).isfinite().all()


def zero_state(key: str, like: Tensor) -> Tensor:
    """What a method starts from."""
    start = {"weights": 1 / 4, "log_weights": -np.log(4)}.get(key, 0.0)
    return torch.full_like(like, start)


@EACH_KEEPING
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_losses(build: Callable[[], RowMethod], bad: float) -> None:
    method = build()
    if not method.needs_losses:
        return
    method(matrix(0), losses=LOSSES)
    before, losses = method.state_dict(), LOSSES.clone()
    losses[2] = bad
    assert method(matrix(1), losses=losses).isnan().all() and same_state(method, before)
    assert method(matrix(1), losses=losses, active=torch.tensor([True, True, False, True])).isfinite().all()


@pytest.mark.parametrize("method", [MoCo(state_dtype=torch.float16), DBMTL(state_dtype=torch.float16)], ids=repr)
def test_what_the_state_cannot_hold_counts_as_not_finite(method: RowMethod) -> None:
    method(matrix(0), losses=LOSSES)
    before, large = method.state_dict(), LOSSES.clone()
    large[1] = 1e6 if isinstance(method, MoCo) else 1e-7
    assert method(matrix(1), losses=large).isnan().all() and same_state(method, before)
    assert method(matrix(1), losses=LOSSES).isfinite().all()


def test_zero_rows_and_single_tasks() -> None:
    rows = matrix(0)
    rows[2] = 0
    for name, build in BUILD.items():
        for _ in range(2):
            assert (method := build())(rows, losses=LOSSES).isfinite().all(), name
            assert build()(torch.zeros(4, 5), losses=LOSSES).tolist() == [0] * 5
        if not name.startswith(("graddrop leaks", "trimmed")):
            assert build()(rows[:1], losses=LOSSES[:1]).shape == (11,)
            torch.testing.assert_close(build()(rows[:1], losses=torch.ones(1)) @ rows[0] > 0, torch.tensor(True))
        assert method.state.get("counted", torch.zeros(4)).tolist()[2] == 0  # a zero row makes no baseline
    assert torch.equal(GradDrop()(rows[:1]), rows[0]) and torch.equal(TrimmedMean(0)(rows[:1]), rows[0])
    excess = ExcessMTL()
    excess(rows)
    excess(matrix(1))
    assert excess.state["counted"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dtype(dtype: torch.dtype) -> None:
    """A float32 state of bfloat16 rows follows the definition; one in bfloat16 rounds, and no more than that."""
    method, step = DBMTL(0.9, state_dtype=dtype), dual_balanced(4, 0.9, 0)
    for seed in range(6):
        rows = matrix(seed, torch.bfloat16)
        expected, size = step(rows.double().numpy(), LOSSES.numpy(), np.ones(4, dtype=bool))
        found = method(rows, losses=LOSSES)
        assert found.dtype is torch.bfloat16 and method.state["average.0"].dtype is dtype
        limit = 2.0**-8 if dtype is torch.float32 else 2.0**-5
        assert np.linalg.norm(found.double().numpy() - expected) <= limit * 4 * size
    assert method.config()["state_dtype"] == str(dtype).removeprefix("torch.")


def heads(tasks: int = 4, **options: object) -> TwoHeads:
    return TwoHeads(tasks, **options)  # type: ignore[arg-type]


def sgd(model: nn.Module, method: methods.Method, **options: object) -> MultiTaskOptimizer:
    return MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), method, **options)  # type: ignore[arg-type]


@EACH
@pytest.mark.usefixtures("each_capture")
@pytest.mark.parametrize("how", ["backward", "blocks", "micro-batches"])
def test_a_step_is_the_method_on_the_rows(build: Callable[[], RowMethod], how: str) -> None:
    model, method = heads(), build()
    opt = sgd(model, build())
    trunk = list(model.trunk.parameters())
    for step in range(4):
        losses = model.losses(step)
        rows, single = rows_of(losses, trunk), rows_of(losses, list(model.heads.parameters()))
        expected = method(rows, losses=torch.stack([loss.detach() for loss in losses]))
        opt.zero_grad()
        if how == "backward":
            opt.backward(losses)
        elif how == "micro-batches":
            for _ in range(2):
                opt.backward([loss / 2 for loss in model.losses(step)], accumulate=True)
        else:
            for k in range(4):
                with opt.task(str(k)) as task:
                    task.loss = model.losses(step)[k]
                    task.loss.backward()
        opt.step()
        for p, grad in zip(trunk, expected, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-12)
        for p, column in zip(model.heads.parameters(), zip(*single, strict=True), strict=True):
            assert torch.equal(p.grad, next(g for g in column if g is not None)) or how == "micro-batches"
        torch.testing.assert_close(opt.report.gram, mk.gram(rows), rtol=1e-9, atol=1e-12)
    assert opt.method.state.keys() == method.state.keys()


@EACH
def test_arena_is_harvest_to_the_bit(build: Callable[[], RowMethod]) -> None:
    (first, harvest), (second, arena) = (
        (model := heads(), sgd(model, build(), capture=capture)) for capture in ("harvest", "arena")
    )
    for step in range(4):
        for model, opt in ((first, harvest), (second, arena)):
            opt.zero_grad()
            opt.backward(model.losses(step))
            opt.step()
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert same_state(harvest.method, arena.method.state_dict())


@EACH
@pytest.mark.parametrize("granularity", ["group", "parameter"])
def test_problems_are_apart(build: Callable[[], RowMethod], granularity: str) -> None:
    """Every group or parameter has its own weights; of draws, only that they are of the same numbers can be said."""
    model = heads()
    layers = [list(model.trunk[0].parameters()), list(model.trunk[2].parameters()), list(model.heads.parameters())]
    inner = torch.optim.SGD([{"params": layer} for layer in layers], lr=0.05)
    opt = MultiTaskOptimizer(inner, build(), granularity=granularity)
    parts = layers[:2] if granularity == "group" else [[p] for layer in layers[:2] for p in layer]
    apart = [build() for _ in parts]
    for step in range(3):
        losses = model.losses(step)
        values = torch.stack([loss.detach() for loss in losses])
        expected = [method(rows_of(losses, part), losses=values) for method, part in zip(apart, parts, strict=True)]
        opt.zero_grad()
        opt.backward(losses)
        for part, grads in zip(parts, expected, strict=True):
            for p, grad in zip(part, grads, strict=True):
                if isinstance(opt.method, GradDrop):
                    assert p.grad.isfinite().all()
                else:
                    torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-12)
        opt.step()
    assert opt.report.gram.shape == (len(parts), 4, 4)
    assert opt.report.weights is None or opt.report.weights.shape == (len(parts), 4)
    assert "problems" in str(opt.report)


@EACH
def test_plain_groups_and_absent_tasks_in_the_optimizer(build: Callable[[], RowMethod]) -> None:
    model, method = heads(), build()
    plain, trunk = list(model.trunk[0].parameters()), list(model.trunk[2].parameters())
    rest = [*trunk, *model.heads.parameters()]
    inner = torch.optim.SGD([{"params": plain, "mtl": False}, {"params": rest}], lr=0.05)
    opt = MultiTaskOptimizer(inner, build(), tasks=ALL)
    for step, present in enumerate([ALL, ("0", "2", "3"), ALL, ("3", "1", "0")]):
        losses = {name: model.losses(step)[int(name)] for name in present}
        active = torch.tensor([name in present for name in ALL])
        rows = rows_of(list(losses.values()), trunk)
        by_name = dict(zip(losses, rows, strict=True))
        table = mk.RowTable([by_name.get(name, [None] * 2) for name in ALL])
        values = torch.stack([losses[name].detach() if name in losses else torch.ones(()).double() for name in ALL])
        expected = method.combine([table], losses=values, active=active).combined
        total = rows_of([sum(losses.values())], plain)[0]
        before = opt.method.state_dict()
        opt.zero_grad()
        opt.backward(losses)
        for p, grad in zip([*trunk, *plain], [*expected, *total], strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-12)
        for key, value in opt.method.state_dict().items():
            if step > 0 and key not in ("rng", "step"):
                assert torch.equal(value[~active], before[key][~active])
        opt.step()
    if isinstance(method, methods.get("moco")):
        assert sorted(opt.method.state) == ["average.2", "average.3", "step", "weights"]


def test_too_few_tasks_for_a_trimmed_mean() -> None:
    model = heads()
    opt = sgd(model, TrimmedMean(1), tasks=ALL)
    opt.backward(model.losses())
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"TrimmedMean\(trim=1\) needs at least .*= 3 tasks, found 2; .*at most 0"):
        opt.backward(dict(list(zip(ALL, model.losses(), strict=True))[:2]))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    opt.zero_grad()
    opt.backward(dict(list(zip(ALL, model.losses(), strict=True))[:1]))  # nothing is shared: nothing to trim
    expected, _ = trimmed(1)(matrix(0).numpy(), LOSSES.numpy(), np.array([True, False, True, True]))
    found = TrimmedMean(1)(matrix(0), active=torch.tensor([True, False, True, True]))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-15)


@EACH_KEEPING
def test_another_number_of_tasks_is_refused(build: Callable[[], RowMethod]) -> None:
    method = build()
    method(matrix(0), losses=LOSSES)
    before, name = method.state_dict(), type(method).__name__
    with pytest.raises(ValueError, match=rf"{name} keeps the state of 4 tasks and was given 3; name all tasks beforeh"):
        method(matrix(0)[:3], losses=LOSSES[:3])
    with pytest.raises(ValueError, match=rf"{name} keeps \w+.0 of shape \[4, 11\] for a parameter that is \[10\] now"):
        method(matrix(0)[:, :10], losses=LOSSES)
    with pytest.raises(ValueError, match=r"of shape \[[14]\] and was given \[2\] problems of 4 tasks"):
        method.combine([mk.RowTable(cut(matrix(0)))], groups=[0, 0, 0, 1, 1], losses=LOSSES, places=range(10, 15))
    assert same_state(method, before)
    method.reset()
    assert method.state == {} and method(matrix(0)[:3], losses=LOSSES[:3]).shape == (11,)
    model = heads()
    opt = sgd(model, build())
    opt.backward(model.losses()[:3])
    with pytest.raises(ValueError, match=r"3 tasks and was given 4.*tasks=\[...\]"):
        opt.backward(model.losses())
    assert opt.tasks == ("0", "1", "2")


@EACH_KEEPING
def test_parameters_that_come_and_go(build: Callable[[], RowMethod]) -> None:
    """State belongs to a parameter, whichever others are frozen; that of a new one starts at zero."""
    model = heads()
    opt = sgd(model, build())
    first, second = (f"{opt.method.kept}.{place}" for place in (0, 2))
    model.trunk[0].requires_grad_(False)
    opt.backward(model.losses())
    assert first not in opt.method.state and opt.method.state[second].any()
    model.trunk[0].requires_grad_(True)
    opt.zero_grad()
    opt.backward(model.losses())
    kept = opt.method.state[first].clone()
    model.trunk[2].weight.requires_grad_(False)
    before = opt.method.state[second].clone()
    opt.zero_grad()
    opt.backward(model.losses())
    assert torch.equal(opt.method.state[second], before) and not torch.equal(opt.method.state[first], kept)


@EACH
@pytest.mark.usefixtures("each_capture")
def test_resume_to_the_bit(build: Callable[[], RowMethod], recwarn: pytest.WarningsRecorder) -> None:
    def trainer() -> tuple[TwoHeads, MultiTaskOptimizer]:
        model = heads()
        return model, MultiTaskOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), build())

    def train(model: TwoHeads, opt: MultiTaskOptimizer, steps: range) -> None:
        for step in steps:
            opt.zero_grad()
            opt.backward(model.losses(step))
            opt.step()

    model, opt = trainer()
    train(model, opt, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    twins = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt))), trainer(), trainer()]
    train(*twins[3], range(7, 9))  # loads over a state of its own
    for twin, resumed in twins[2:]:
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        twin.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["opt"])
        assert same_state(resumed.method, opt.method.state_dict())
    train(model, opt, range(3, 7))
    for twin, resumed in twins:
        train(twin, resumed, range(3, 7))
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
        assert same_state(resumed.method, opt.method.state_dict())
    assert not recwarn.list


@EACH
def test_reset_and_state_made_in_inference_mode(build: Callable[[], RowMethod]) -> None:
    method, plain = build(), build()
    with torch.inference_mode():
        method(matrix(0), losses=LOSSES)
    plain(matrix(0), losses=LOSSES)
    assert torch.equal(method(matrix(1), losses=LOSSES), plain(matrix(1), losses=LOSSES))
    held = [weakref.ref(value) for value in method.state.values()]
    method.reset()
    assert method.state_dict() == {} and not any(ref() is not None for ref in held)
    start = build()
    assert all(torch.equal(method(matrix(k), losses=LOSSES), start(matrix(k), losses=LOSSES)) for k in range(2))
    with pytest.raises(TypeError, match="dict of tensors"):
        method.load_state_dict({"step": 3})  # type: ignore[dict-item]


@EACH
def test_a_recorded_step_goes_on(build: Callable[[], RowMethod]) -> None:
    """What a CUDA graph needs: nothing reads a value on the host, and the state advances in place."""
    method, eager, rows = build(), build(), matrix(0)
    found, losses = torch.zeros(11, dtype=torch.float64), LOSSES.clone()
    for _ in range(2):
        method(rows, losses=losses)
        eager(rows, losses=losses)
    # Not float64: that its squares overflow is looked at on the host.
    method, eager, rows, found = copy.deepcopy(method), copy.deepcopy(eager), rows.float(), found.float()
    for one in (method, eager):
        one.reset()
        one(rows, losses=losses)
    replay = record("cpu", lambda: found.copy_(method(rows, losses=losses)))
    assert torch.equal(found, eager(rows, losses=losses))
    for seed in range(1, 4):
        rows.copy_(matrix(seed))
        losses.mul_(0.9)
        replay()
        assert torch.equal(found, eager(rows, losses=losses))
    assert same_state(method, eager.state_dict())


@EACH
def test_setting_up_in_a_capture_is_refused(build: Callable[[], RowMethod], monkeypatch: pytest.MonkeyPatch) -> None:
    method = build()
    ready = build()
    ready(matrix(0), losses=LOSSES)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ready(matrix(0), losses=LOSSES)
    with pytest.raises(RuntimeError, match="would read which tasks are active"):
        ready(matrix(0), losses=LOSSES, active=torch.ones(4, dtype=torch.bool))
    if not isinstance(method, TrimmedMean):
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            method(matrix(0), losses=LOSSES)
        assert method.state == {}


@EACH_KEEPING
def test_state_is_laid_out_as_the_rows_are(build: Callable[[], RowMethod]) -> None:
    shape = (2, 3, 2, 4)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(4, *shape, generator=generator) for _ in range(3)]
    method, plain = build(), build()
    for step, row in enumerate(rows):
        last = [[one.to(memory_format=torch.channels_last)] for one in row]
        torch.testing.assert_close(method(last, losses=LOSSES)[0], plain([[one] for one in row], losses=LOSSES)[0])
        kept = method.state[f"{method.kept}.0"]
        assert kept[0].is_contiguous(memory_format=torch.channels_last) and kept.shape == (4, *shape)
        if step == 1:  # saved, loaded, and from then on in another layout
            other = build()
            other.load_state_dict(method.state_dict())
            method = other
            rows[2] = rows[2].contiguous()
    torch.testing.assert_close(method.state[f"{method.kept}.0"], plain.state[f"{plain.kept}.0"])


def test_complex_parameters_and_several_optimizers() -> None:
    z = nn.Parameter(torch.complex(torch.ones(3), torch.full((3,), 2.0)))
    other = nn.Parameter(torch.ones(2))
    opt = MultiTaskOptimizer([torch.optim.SGD([param], lr=0.1) for param in (z, other)], MoCo())
    for _ in range(2):
        opt.zero_grad()
        opt.backward([(z.abs() ** 2).sum() + other.sum(), (z.real * 3).sum() + 1 + other.square().sum()])
        assert z.grad.is_complex() and z.grad.isfinite().all() and other.grad.isfinite().all()
    assert opt.method.state["average.0"].shape == (2, 3, 2) and opt.method.state["average.1"].shape == (2, 2)


def test_leaks_by_name() -> None:
    model, method = heads(2), GradDrop({"b": 1.0, "a": 0.0}, seed=2)
    opt = sgd(model, method)
    trunk = list(model.trunk.parameters())
    for step in range(2):
        losses = dict(zip("ab", model.losses(step), strict=True))
        rows = rows_of(list(losses.values()), trunk)
        expected = mk.graddrop(rows, mk.rng_state(2, step), leak=torch.tensor([0.0, 1.0]))
        opt.zero_grad()
        opt.backward(losses)
        assert all(torch.equal(p.grad, d) for p, d in zip(trunk, expected, strict=True))
    assert method.state["rng"].tolist() == [2, 2] and method.config() == {"leak": {"b": 1.0, "a": 0.0}, "seed": 2}
    with pytest.raises(ValueError, match="none for task 'c'; add it"):
        opt.backward({"c": model.losses()[0], "b": model.losses()[1]})
    with pytest.raises(ValueError, match=r"by the names \['b', 'a'\], which rows do not tell"):
        method(matrix(0)[:2])
    twin = pickle.loads(pickle.dumps(method))
    assert twin.state["rng"].tolist() == [2, 2] and twin.bound_to(("a", "b")).state is twin.state


def test_a_task_alone() -> None:
    """Methods that divide by losses or norms go on doing so; the others leave a lone gradient as it is."""
    for build, scaled in ((GradDrop, False), (ExcessMTL, False), (MoCo, True), (DBMTL, True)):
        model = heads(2)
        opt = sgd(model, build(), tasks=["a", "b"])
        trunk = list(model.trunk.parameters())
        opt.backward(dict(zip("ab", model.losses(), strict=True)))
        opt.zero_grad()
        loss = model.losses(1)[0]
        row = rows_of([loss], [*trunk, *model.heads[0].parameters()])[0]
        opt.backward({"a": loss})
        assert torch.equal(flatten([p.grad for p in trunk], trunk), flatten(row[:4], trunk)) is not scaled
        assert all(torch.equal(p.grad, g) for p, g in zip(model.heads[0].parameters(), row[4:], strict=True))


def test_what_the_report_has() -> None:
    model = heads()
    drop, excess = sgd(model, GradDrop()), sgd(model, ExcessMTL())
    for opt in (drop, excess):
        opt.zero_grad()
        opt.backward(model.losses())
        rows = rows_of(model.losses(), list(model.trunk.parameters()))
        torch.testing.assert_close(opt.report.cosines, mk.cosines(mk.gram(rows)))
        assert opt.report.gap is None and opt.report.active.all()
    assert drop.report.weights is None and re.search(r"\n0 +\S+ +none ", str(drop.report))
    assert excess.report.weights.sum() == pytest.approx(1) and "none" not in str(excess.report)


def test_weights_are_reused_where_there_are_some() -> None:
    model = heads()
    opt = sgd(model, ExcessMTL(), refresh_every=3, head_scaling="weights")
    trunk = list(model.trunk.parameters())
    for step in range(3):
        rows = rows_of(model.losses(step), trunk)
        opt.zero_grad()
        opt.backward(model.losses(step))
        assert opt.report.age == step
        weights = opt.report.weights
        for p, grad in zip(trunk, mk.combine(rows, weights), strict=True):
            torch.testing.assert_close(p.grad, grad)
    assert opt.method.state["step"].tolist() == [1]


def test_grad_scaler() -> None:
    for name, build in BUILD.items():
        scaler, model = torch.amp.GradScaler("cpu"), heads(dtype=torch.float32)
        opt = sgd(model, build())
        opt.backward([scaler.scale(loss) for loss in model.losses()])
        if name.startswith(("graddrop", "trimmed")):
            scaler.step(opt)
            scaler.update()
        else:
            with pytest.raises(RuntimeError, match="does not scale with the gradients"):
                scaler.step(opt)
    for build in (GradDrop, lambda: TrimmedMean(1)):
        assert torch.equal(build()(matrix(0) * 2.0**40), build()(matrix(0)) * 2.0**40)


@EACH
def test_a_gram_matrix_is_not_enough(build: Callable[[], RowMethod]) -> None:
    method, gram, name = build(), mk.gram(matrix(0)), type(build()).__name__
    for ask in (method.weights, method.solve):
        with pytest.raises(TypeError, match=rf"{name} needs the rows.*only their Gram matrix.*{name}\(...\)\(rows\)"):
            ask(gram, losses=LOSSES)
    for wrap in (Normalized, CRMOGM):
        with pytest.raises(TypeError, match=rf"{wrap.__name__}: {name} needs the rows themselves"):
            wrap(method)
    model = heads()
    for options in ({"refresh_every": 2}, {"head_scaling": "weights"}):
        if method.weighs_rows:
            sgd(model, method, **options)
        else:
            with pytest.raises(ValueError, match=rf"{next(iter(options))}.*{name} does not consist; leave it at"):
                sgd(model, method, **options)
    assert method.state == {}


@pytest.mark.parametrize("sizes", [(1e200,), (1.0, 1e-200)])
def test_rows_whose_squares_leave_float64(sizes: tuple[float, ...]) -> None:
    rows = matrix(0) * torch.tensor([[sizes[0]], [sizes[-1]], [sizes[-1]], [sizes[0]]], dtype=torch.float64)
    for name, build in BUILD.items():
        if max(sizes) > 1:
            with pytest.raises(ValueError, match="squares of float64 gradients overflow"):
                build()(rows, losses=LOSSES)
        else:
            assert build()(rows, losses=LOSSES).isfinite().all(), name


@pytest.mark.parametrize("bad", [0.0, -1e-8, -3.0])
def test_losses_without_a_logarithm(bad: float) -> None:
    method, losses, rows = DBMTL(), LOSSES.clone(), matrix(0, torch.float32)
    method(rows, losses=losses)
    before = method.state_dict()
    losses[1] = bad
    if bad == 0:
        assert method(rows, losses=losses).isfinite().all()  # log(1e-8)
        return
    with pytest.raises(ValueError, match=rf"logarithm of the losses, and found one of {bad:.4g}; hand in losses above"):
        method(rows, losses=losses)
    assert same_state(method, before)
    found = torch.zeros(11)
    record("cpu", lambda: found.copy_(method(rows, losses=losses)))
    assert found.isnan().all() and same_state(method, before)
    assert method(rows, losses=losses, active=torch.tensor([True, False, True, True])).isfinite().all()


def test_moco_finds_a_stationary_point_of_noisy_gradients() -> None:
    """Two parabolas with minima at 1 and -1, noise as large as their slopes: every point between them is one."""
    generator, x = torch.Generator().manual_seed(0), torch.tensor([3.0, 2.0], dtype=torch.float64)
    method = MoCo()
    for step in range(400):
        gradients = torch.stack((x - torch.tensor([1.0, 0.0]), x - torch.tensor([-1.0, 0.0])))
        noise = torch.randn(2, 2, generator=generator, dtype=torch.float64)
        x = x - 0.3 / (1 + step) ** 0.5 * method(gradients + noise, losses=gradients.square().sum(1) / 2)
    assert abs(x[1]) < 0.1 and abs(x[0]) < 1.1


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: GradDrop(leak=1.5), ValueError, r"leak in \[0, 1\], found 1.5"),
        (lambda: GradDrop(leak=[0.5, -0.1]), ValueError, r"found -0.1"),
        (lambda: GradDrop(leak={"a": float("nan")}), ValueError, "nan"),
        (lambda: GradDrop(leak={1: 0.5}), TypeError, "names of tasks as strings"),
        (lambda: GradDrop(leak="0.5"), TypeError, "leak as a number, found '0.5'"),
        (lambda: GradDrop(leak=True), TypeError, "leak as a number"),
        (lambda: GradDrop(seed=-1), ValueError, "-1"),
        (lambda: GradDrop([0.5, 0.5])(matrix(0)), ValueError, "2 leaks for 4 tasks"),
        (lambda: TrimmedMean(), TypeError, "trim"),
        (lambda: TrimmedMean(-1), ValueError, "trim >= 0, found -1"),
        (lambda: TrimmedMean(1.0), TypeError, "trim as an integer"),
        (lambda: TrimmedMean(2)(matrix(0)), ValueError, r"= 5 tasks, found 4; lower trim to at most 1"),
        (lambda: ExcessMTL(eta=0), ValueError, "eta > 0"),
        (lambda: ExcessMTL(eta="1"), TypeError, "eta as a number"),
        (lambda: ExcessMTL(warmup=-1), ValueError, "warmup >= 0"),
        (lambda: ExcessMTL(warmup=2.0), TypeError, "warmup as an integer"),
        (lambda: ExcessMTL(state_dtype=torch.int32), TypeError, "state_dtype as one of torch.float32"),
        (lambda: MoCo(state_dtype="float32"), TypeError, "found 'float32'"),
        (lambda: MoCo(beta=0), ValueError, r"beta in \(0, 1\]"),
        (lambda: MoCo(beta=1.1), ValueError, r"beta in \(0, 1\]"),
        (lambda: MoCo(gamma=-1), ValueError, "gamma >= 0"),
        (lambda: MoCo(rho=float("inf")), ValueError, "rho >= 0, found inf"),
        (lambda: MoCo(beta_sigma=None), TypeError, "beta_sigma as a number"),
        (lambda: DBMTL(beta=1), ValueError, r"beta in \[0, 1\)"),
        (lambda: DBMTL(sigma=-0.5), ValueError, "sigma >= 0"),
        (lambda: MoCo()(matrix(0)), ValueError, "MoCo needs the values of the losses: pass losses="),
        (lambda: DBMTL()(matrix(0)), ValueError, "DBMTL needs the values of the losses"),
        (lambda: DBMTL()(matrix(0), losses=LOSSES[:3]), ValueError, r"losses of shape \[4\], found \[3\]"),
        (lambda: MoCo()(matrix(0), losses=[1, 2, 3, 4]), TypeError, "losses as a tensor"),
        (lambda: GradDrop()(matrix(0), active=torch.ones(4)), TypeError, "bool"),
        (lambda: GradDrop()(matrix(0), active=torch.ones(3, dtype=torch.bool)), ValueError, r"\[4\]"),
        (
            lambda: GradDrop()(matrix(0), active=torch.zeros(4, dtype=torch.bool)),
            ValueError,
            "active task, found none",
        ),
        (lambda: GradDrop()(matrix(0).long()), TypeError, "int64"),
    ],
)
def test_bad_input(build, error, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=text):
        build()


@pytest.mark.gpu
@EACH
def test_on_a_gpu(build: Callable[[], RowMethod]) -> None:
    """The combination of a CPU, without a wait once the state is there."""
    method, there = build(), build()
    rows = [matrix(k, torch.float32) for k in range(4)]
    on_gpu, losses = [row.cuda() for row in rows], LOSSES.cuda()
    found = [there(on_gpu[0], losses=losses)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += [there(row, losses=losses) for row in on_gpu[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for row, combined in zip(rows, found, strict=True):
        torch.testing.assert_close(combined.cpu(), method(row, losses=LOSSES), rtol=1e-4, atol=1e-5)


def test_moco_has_the_weights_of_its_definition() -> None:
    method, step = MoCo(), tracked(4, 0.5, 0.1, 0.0, (0.5, 0.5))
    for seed in range(5):
        step(matrix(seed).numpy(), LOSSES.numpy(), np.ones(4, dtype=bool))
        found = method.combine([mk.RowTable(matrix(seed))], losses=LOSSES)
        assert torch.equal(found.weights, method.state["weights"]) and found.weights.sum() == pytest.approx(1)
