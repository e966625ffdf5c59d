"""Whole steps in CUDA graphs: replays equal eager steps, and what cannot be replayed is refused."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import mtl_kernels as mk
from mtl_optim import (
    DBMTL,
    MGDA,
    Constant,
    ExcessMTL,
    GradDrop,
    Mean,
    MoCo,
    MultiTaskOptimizer,
    PCGrad,
    TrimmedMean,
)
from optim.oracle import TwoHeads
from optim.recording import record, warm_up

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PRESENT = {"0", "1", "2"}


class Net(nn.Module):
    """Sums of products, whose order does not depend on whether a graph is captured.

    Three tasks: all reach the trunk, two of them a bridge, one each head, none the last parameter.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"trunk": (4, 300), "mix": (300,), "bridge": (300,), "a": (300,), "b": (300,), "c": (300,), "no": (3,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator).mul_(0.3).to(device)))

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh((x.unsqueeze(-1) * self.trunk).sum(1)) * self.mix
        bridged = torch.tanh(hidden + self.bridge)
        outputs = [(bridged * self.a).sum(-1), (bridged * self.b).sum(-1), (hidden * self.c).sum(-1)]
        return {str(k): (out - (-1) ** k * 3).square().mean() for k, out in enumerate(outputs)}


class Trainer:
    """A model with its optimizer and the buffer that its batches are put in."""

    def __init__(self, device: str, method, how: str = "backward", **options) -> None:  # type: ignore[no-untyped-def]
        self.model, self.how = Net(device), how
        self.x = torch.zeros(8, 4, device=device)
        names = dict(self.model.named_parameters())
        plain = [names.pop("c")] if options.pop("plain", False) else []
        groups = [{"params": [names.pop("trunk"), names.pop("mix")]}, {"params": list(names.values())}]
        groups[0]["gram"] = not options.pop("partial", False)
        groups += [{"params": plain, "mtl": False}] if plain else []
        inner = torch.optim.AdamW(groups, lr=0.01, fused=True, capturable=device == "cuda")
        self.opt = MultiTaskOptimizer(inner, copy.deepcopy(method), **options)

    def step(self) -> None:
        self.opt.zero_grad()
        if self.how == "backward":
            self.opt.backward(self.model.losses(self.x))
        elif self.how == "micro-batches":
            for k, half in enumerate(self.x.chunk(2)):
                self.opt.backward(self.model.losses(half), accumulate=k == 0)
        else:
            for name in sorted(PRESENT):
                with self.opt.task(name) as task:
                    task.loss = self.model.losses(self.x)[name]
                    task.loss.backward()
        self.opt.step()

    def feed(self, seed: int) -> None:
        self.x.copy_(torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)))

    def outcome(self) -> dict[str, Tensor]:
        report = self.opt.report
        found = {"gram": report.gram, "active": report.active, **self.opt.method.state}
        if report.weights is not None:
            found["weights of the report"] = report.weights
        for name, param in self.model.named_parameters():
            found[name] = param.detach()
            if param.grad is not None:
                found[f"{name}.grad"] = param.grad
        return {name: value.clone() for name, value in found.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("capture", ["arena", "harvest"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (PCGrad(seed=3), {}),
        (MGDA(), {}),
        (PCGrad(seed=4), {"how": "micro-batches"}),
        (MGDA(), {"how": "blocks", "tasks": ["x", "0", "1", "2"]}),
        (PCGrad(reduction="mean"), {"granularity": "parameter", "head_scaling": "weights"}),
        (MGDA(normalize="loss+"), {"granularity": "group", "plain": True}),
        (PCGrad(seed=5), {"partial": True, "plain": True}),
        (Constant([1.0, 0.5, 2.0]), {"head_scaling": "weights"}),
        (GradDrop(leak=[0.0, 0.5, 1.0]), {"plain": True}),
        (TrimmedMean(1), {"tasks": ["0", "1", "2", "x"]}),
        (ExcessMTL(0.1, warmup=4), {"how": "micro-batches", "head_scaling": "weights"}),
        (MoCo(state_dtype=torch.float64), {"granularity": "group"}),
        (DBMTL(), {"how": "blocks", "tasks": ["x", "0", "1", "2"]}),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_replays_equal_eager_steps(device: str, capture: str, method, options) -> None:  # type: ignore[no-untyped-def]
    ours, eager = (Trainer(device, method, capture=capture, **options) for _ in range(2))
    for trainer in (ours, eager):
        trainer.feed(0)
        warm_up(device, trainer.step)
    replay = record(device, ours.step)
    eager.step()
    report = ours.opt.report
    for seed in range(1, 6):
        for trainer, step in ((ours, replay), (eager, eager.step)):
            trainer.feed(seed)
            step()
        found, expected = ours.outcome(), eager.outcome()
        assert found.keys() == expected.keys() and "no.grad" not in found
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert ours.opt.report is report and str(report) == str(eager.opt.report)
    ours.step()  # back to eager steps, which go on from there
    eager.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.model.parameters(), eager.model.parameters(), strict=True))


@pytest.mark.parametrize("capture", ["arena", "harvest"])
@pytest.mark.parametrize("method", [PCGrad(), MGDA()], ids=repr)
def test_a_combination_is_the_kernels_and_no_more(capture: str, method) -> None:  # type: ignore[no-untyped-def]
    """Operations of PyTorch that would be launches of their own on a GPU."""
    trainer = Trainer("cpu", method, capture=capture)
    if mk.available_backends()["cpu"] is not None:
        pytest.skip("the reference consists of such operations")
    warm_up("cpu", trainer.step)
    trainer.opt.zero_grad()
    trainer.opt.backward(trainer.model.losses(trainer.x), accumulate=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer.opt.combine()
    names = {event.name.removeprefix("aten::") for event in profile.events()}
    memory = {"empty", "new_empty", "zeros", "zero_"}  # the Gram matrix is zeroed by the kernel layer
    views = {"select", "slice", "unsqueeze", "view", "reshape", "as_strided", "detach", "to"}
    on_a_cpu = {"add_"}  # the step of the random state, which a backend that fuses gram and solve adds by itself
    assert "empty" in names and names <= memory | views | on_a_cpu


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Makes the library believe that a capture is under way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield


def wrap(model: nn.Module, method=None, **options) -> MultiTaskOptimizer:  # type: ignore[no-untyped-def]
    return MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method or PCGrad(), **options)


@pytest.mark.parametrize(
    ("capture", "text"), [("arena", "would lay out its memory"), ("harvest", "the mask of which task reaches")]
)
def test_setting_up_in_a_capture_is_refused(capture: str, text: str) -> None:
    model = TwoHeads()
    opt = wrap(model, Mean(), capture=capture)
    with capturing(), pytest.raises(RuntimeError, match=f"{text}.*while a CUDA graph is captured.*three whole steps"):
        opt.backward(model.losses())
    assert all(p.grad is None for p in model.parameters())
    opt.backward(model.losses())


@pytest.mark.parametrize("method", [PCGrad(), Constant([1.0, 2.0])], ids=repr)
def test_state_of_methods_is_set_up_before(method) -> None:  # type: ignore[no-untyped-def]
    with capturing(), pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        method.weights(torch.eye(2))
    method.weights(torch.eye(2))
    with capturing():
        method.weights(torch.eye(2))


def test_what_a_capture_may_not_do() -> None:
    model = TwoHeads(3)
    opt, reusing = wrap(model, capture="arena"), wrap(model, refresh_every=2)
    losses = model.losses()
    opt.backward(losses[:2], retain_graph=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with capturing():
        with pytest.raises(RuntimeError, match=r"earlier step would be copied.*opt\.zero_grad\(\)"):
            opt.backward(losses[:2], retain_graph=True)
        opt.zero_grad()
        opt.backward(losses[:2], retain_graph=True)
        with pytest.raises(RuntimeError, match="memory for task '2'"), opt.task("2"):
            pass
        with pytest.raises(RuntimeError, match="refresh_every=2 decides on the host"):
            reusing.backward(losses)
        with pytest.raises(RuntimeError, match=r"would look through the autograd.*while a CUDA graph"):
            wrap(model, capture="factored").backward(losses)
        with pytest.raises(RuntimeError, match="closure"):
            opt.step(lambda: None)
        with pytest.raises(RuntimeError, match="GradScaler decides on the host"):
            scaler.step(opt)
        opt.step()


def test_memory_of_a_captured_graph_is_kept() -> None:
    """A graph goes on writing to the rows and reading the masks it was captured with."""
    model = TwoHeads()
    opt = wrap(model, capture="arena")
    opt.backward(model.losses())
    opt.zero_grad()
    with capturing():
        opt.backward(model.losses())
    held = list(opt._training.pending._capture._buffers)
    model.trunk[0].requires_grad_(False)
    opt.zero_grad()
    opt.backward(model.losses())
    assert opt._training.pending._capture._kept == held and opt._training.pending._capture._buffers[0] is not held[0]


@pytest.mark.gpu
@pytest.mark.parametrize("capture", ["arena", "harvest"])
def test_a_real_capture_without_warm_up_is_refused(capture: str) -> None:
    trainer = Trainer("cuda", PCGrad(), capture=capture)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        trainer.step()
    torch.cuda.synchronize()
    trainer.step()
