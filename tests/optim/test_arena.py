"""capture="arena": the same numbers as harvest, at addresses that stay."""

from __future__ import annotations

import copy
import gc
import itertools
import random
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mtl_optim import MGDA, Mean, MultiTaskOptimizer, PCGrad
from optim.oracle import TwoHeads, uncombined

METHODS = [PCGrad(seed=7), MGDA(), MGDA(normalize="loss+"), Mean()]
SHAPES = [(3, 5), (), (70,), (2, 3, 2, 2), (0,), (4,), (33,), (6, 1)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def arena(model: nn.Module, method=None, **options) -> MultiTaskOptimizer:  # type: ignore[no-untyped-def]
    method = PCGrad() if method is None else method
    return MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method, capture="arena", **options)


def addresses(tensors) -> list[int | None]:  # type: ignore[no-untyped-def]
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def train(seed: int, capture: str) -> list[list[Tensor | None]]:
    """A run drawn at random: everything that it left in ``.grad``, in the parameters and in the reports."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    params = []
    for shape in SHAPES:
        value = torch.randn(shape, generator=generator).to(draw.choice(DTYPES))
        params.append(nn.Parameter(value.to(memory_format=torch.channels_last) if value.dim() == 4 else value))
    cuts = sorted(draw.sample(range(1, len(params)), 2))
    groups = [{"params": params[: cuts[0]]}, {"params": params[cuts[0] : cuts[1]]}, {"params": params[cuts[1] :]}]
    groups[draw.randrange(3)]["mtl"] = draw.random() < 0.5
    granularity = draw.choice(["model", "model", "group", "parameter"])
    opt = MultiTaskOptimizer(
        torch.optim.SGD(groups, lr=0.01),
        copy.deepcopy(draw.choice(METHODS)),
        granularity=granularity,
        head_scaling=draw.choice(["none", "weights"]),
        refresh_every=draw.choice([1, 1, 3]) if granularity == "model" else 1,
        capture=capture,
    )
    seen: list[list[Tensor | None]] = []
    for _ in range(draw.randint(2, 6)):
        draw.choice(params).requires_grad_(draw.random() < 0.5)
        managed = [p for g in groups for p in g["params"] if g.get("mtl", True) and p.requires_grad]
        if not managed:
            continue
        if (clear := draw.choice([True, True, False, None])) is not None:
            opt.zero_grad(set_to_none=clear)
        reach = {}
        for name in draw.sample("abcd", draw.randint(1, 4)):
            chosen = [p for p in params if p.requires_grad and draw.random() < 0.6]
            reach[name] = [*chosen, draw.choice(managed)]
        mode, rounds = draw.choice(["backward", "blocks"]), draw.choice([1, 1, 2])
        for last in [False] * (rounds - 1) + [True]:
            losses = {
                name: sum(
                    ((torch.randn(p.shape, generator=generator) - p.float()) ** 2).sum() * draw.choice([1, -0.5, 0.0])
                    for p in (reached if draw.random() < 0.7 else reached[-1:])
                )
                + 30
                for name, reached in reach.items()
            }
            if mode == "backward":
                opt.backward(losses, accumulate=not last)
            for name, loss in losses.items() if mode == "blocks" else ():
                with opt.task(name, accumulate=True) as task:
                    task.loss = loss
                    loss.backward()
            seen.append(uncombined(params))
        opt.step()
        seen.append([None if p.grad is None else p.grad.clone() for p in params])
        seen.append([p.detach().clone() for p in params])
        seen.append([opt.report.gram, opt.report.weights, opt.report.active])
    return seen


@given(st.integers(0, 2**31))
@settings(max_examples=60)
def test_equals_harvest_bit_for_bit(seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ours, theirs = train(seed, "arena"), train(seed, "harvest")
    assert len(ours) == len(theirs)
    for found, expected in zip(ours, theirs, strict=True):
        assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_addresses_stay() -> None:
    model = TwoHeads(3)
    opt = arena(model)
    gradients, rows = set(), set()
    for step in range(4):
        opt.zero_grad()
        opt.backward(model.losses(step), accumulate=True)
        rows.add(tuple(address for row in opt._training.pending.rows.values() for address in addresses(row)))
        opt.combine()
        gradients.add(tuple(addresses(p.grad for p in model.parameters())))
        opt.step()
    assert len(gradients) == len(rows) == 1
    assert all(address % 16 == 0 for address in (*gradients.pop(), *filter(None, rows.pop())))


def test_zeroed_gradients_get_an_address_of_their_own() -> None:
    model = TwoHeads(3)
    opt = arena(model)
    found = []
    for step in range(4):
        opt.zero_grad(set_to_none=False)
        opt.backward(model.losses(step))
        found.append(addresses(p.grad for p in model.parameters()))
    assert found[1] == found[2] == found[3]


def test_rows_share_no_memory() -> None:
    model = TwoHeads(3)
    opt = arena(model)
    opt.backward(model.losses(), accumulate=True)
    spans = sorted(
        (g.data_ptr(), g.nbytes) for row in opt._training.pending.rows.values() for g in row if g is not None
    )
    assert len(spans) == 3 * 4 + 3 * 2
    assert all(begin + size <= end for (begin, size), (end, _) in itertools.pairwise(spans))
    (buffer,) = opt._training.pending._capture._buffers
    assert buffer.shape == (3, 32 * 11) and buffer.is_contiguous()  # ten parameters, one of more than 256 bytes


def test_one_buffer_per_dtype() -> None:
    a, b = nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(200))
    opt = MultiTaskOptimizer(torch.optim.SGD([a, b], lr=0.1), Mean(), capture="arena", tasks=["x", "y", "z"])
    opt.backward({"x": a.sum() + b.sum(), "y": a.sum()})
    assert [(t.dtype, tuple(t.shape)) for t in opt._training.pending._capture._buffers] == [
        (torch.bfloat16, (3, 128)),
        (torch.float32, (3, 256)),
    ]


def test_autograd_keeps_no_second_copy() -> None:
    """Every gradient is in its place before autograd makes the next one."""
    model = TwoHeads(2)
    opt = arena(model)
    opt.backward(model.losses())
    opt.zero_grad()
    found: list[int] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: found.append(p.grad.data_ptr()))
    opt.backward(model.losses(), accumulate=True)
    assert sorted(found) == sorted(
        filter(None, addresses(g for row in opt._training.pending.rows.values() for g in row))
    )


def test_a_task_that_comes_later_moves_no_row() -> None:
    model = TwoHeads(4)
    opt = arena(model)
    first, second, third, _ = model.losses()
    for name, loss in (("a", first), ("b", second)):
        with opt.task(name):
            loss.backward(retain_graph=True)
    before = addresses(opt._training.pending.rows["a"])
    content = [None if g is None else g.clone() for g in opt._training.pending.rows["a"]]
    with opt.task("c"):
        third.backward()
    assert all(same_bits(a, b) for a, b in zip(opt._training.pending.rows["a"], content, strict=True))
    opt.step()
    opt.zero_grad()
    opt.backward({"d": model.losses(1)[3], "a": model.losses(1)[0]}, accumulate=True)
    assert addresses(opt._training.pending.rows["a"]) == before and len(opt._training.pending._capture._rows) == 4


def test_parameters_that_change() -> None:
    model = TwoHeads(2)
    opt = arena(model)
    opt.backward(model.losses())
    rows = len(opt._training.pending._capture._rows["0"])
    opt.add_param_group({"params": [extra := nn.Parameter(torch.ones(2, dtype=torch.float64))]})
    opt.zero_grad()
    opt.backward([loss * extra.sum() for loss in model.losses()])
    assert len(opt._training.pending._capture._rows["0"]) == rows + 1 and extra.grad is not None
    model.to(torch.float32)
    extra.data = extra.data.float()
    opt.zero_grad()
    opt.backward([loss * extra.sum() for loss in model.losses()])
    assert model.trunk[0].weight.grad.dtype == torch.float32
    assert len(extra._post_accumulate_grad_hooks) == 1


def test_gradients_in_the_rows_survive_the_next_pass() -> None:
    model = TwoHeads(2)
    opt = arena(model, Mean())
    opt.backward(model.losses(0))
    before = [p.grad.clone() for p in model.parameters()]
    with opt.task("0"):
        model.losses(1)[0].backward()
    assert all(torch.equal(p, g) for p, g in zip(uncombined(model.parameters()), before, strict=True))


def test_what_has_no_plain_memory_is_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    opt = arena(embedding)
    out = embedding(torch.tensor([1, 3]))
    with pytest.raises(TypeError, match=r"dense gradients, found a Tensor with layout sparse_coo.*\"harvest\""):
        opt.backward([out.sum(), out.square().sum()])
    assert embedding.weight.grad is None and not opt._training.pending.rows

    class Tagged(Tensor):
        pass

    opt = MultiTaskOptimizer(
        torch.optim.SGD([nn.Parameter(torch.ones(3).as_subclass(Tagged))], lr=0.1), Mean(), capture="arena"
    )
    with pytest.raises(TypeError, match="plain memory, found a Tagged"):
        opt.backward([param.sum() for param in opt.param_groups[0]["params"]])
    with pytest.raises(ValueError, match="capture='pool' is unknown; choose one of 'harvest', 'arena'"):
        MultiTaskOptimizer(opt.optimizer, Mean(), capture="pool")


def test_nothing_is_left_behind() -> None:
    model = TwoHeads(2)
    opt = arena(model)
    opt.backward(model.losses())
    twin, other = copy.deepcopy((model, opt))
    other.backward(twin.losses(), accumulate=True)
    assert addresses(other._training.pending.rows["0"]) != addresses(p.grad for p in model.parameters())
    assert "capture='arena'" in repr(other)
    weight = model.trunk[0].weight
    assert len(weight._post_accumulate_grad_hooks) == 1
    del opt
    gc.collect()
    assert not weight._post_accumulate_grad_hooks
    model.losses()[0].backward()


def test_buffers_are_waited_for_on_their_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of another device than the current one may still be in use there."""
    model = TwoHeads(2)
    opt = arena(model)
    opt.backward(model.losses())
    devices = [torch.device(name) for name in ("cuda:1", "cuda:1", "cpu", "cuda:3")]
    buffers = [SimpleNamespace(is_cuda=device.type == "cuda", device=device) for device in devices]
    monkeypatch.setattr(opt._training.pending._capture, "_buffers", buffers)
    waited: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    model.trunk[0].requires_grad_(False)
    opt.zero_grad()
    opt.backward(model.losses())
    assert sorted(map(str, waited)) == ["cuda:1", "cuda:3"]
