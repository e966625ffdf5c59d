"""`capture="factored"`: rows as coordinates, exact on every graph, and what it says where it cannot be had."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from mtl_optim import MGDA, CAGrad, GradDrop, Method, MoDo, MultiTaskOptimizer, PCGrad, Sum, UPGrad, gram_groups
from optim.awkward import BATCH, GRAPHS, make
from optim.oracle import uncombined

METHODS: dict[str, Callable[[], Method]] = {
    "pcgrad": lambda: PCGrad(order="fixed"),
    "mgda": MGDA,
    "cagrad": CAGrad,
    "upgrad": UPGrad,
}


ROUNDED = 2e-3
"""Whole rows of weights in bfloat16 are rounded to it, coordinates are not."""


class Outcome:
    """The Gram matrix, the weights and the gradients of one step."""

    def __init__(self, optimizer: MultiTaskOptimizer, params: Sequence[Tensor]) -> None:
        report = optimizer.report
        assert report is not None and report.weights is not None
        self.report, self.gram, self.weights = report, report.gram, report.weights
        self.grads = [None if p.grad is None else p.grad.clone() for p in params]


@functools.cache
def step(
    graph: str, dtype: torch.dtype, method: str, autocast: bool = False, capture: str = "harvest", passes: str = "auto"
) -> Outcome:
    model, run = make(graph, dtype)
    params = list(model.parameters())
    optimizer = MultiTaskOptimizer(torch.optim.SGD(params, lr=0.1), METHODS[method](), capture=capture, passes=passes)
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = run()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "tasks have a backward pass each|the graph of the losses is hidden")
        optimizer.backward([loss.float() for loss in losses] if autocast else losses)
    return Outcome(optimizer, params)


def distance(found: Outcome, expected: Outcome) -> tuple[float, float, float]:
    """Of the Gram matrices relative to the longest row, of the weights, of the gradients relative to the largest."""
    gram = (found.gram - expected.gram).abs().max() / expected.gram.abs().max()
    weights = (found.weights - expected.weights).abs().max() / expected.weights.abs().max()
    pairs = [(a, b) for a, b in zip(found.grads, expected.grads, strict=True) if b is not None]
    assert all(a is not None for a, _ in pairs) and len(pairs) == sum(a is not None for a in found.grads)
    off = [float((a.double() - b.double()).norm()) for a, b in pairs if a is not None]
    scale = max(float(b.double().norm()) for _, b in pairs)
    return float(gram), float(weights), max(off) / scale


@pytest.mark.parametrize(
    ("passes", "method"), [*(("loop", method) for method in METHODS), ("batched", "pcgrad"), ("batched", "upgrad")]
)
@pytest.mark.parametrize("graph", GRAPHS)
def test_rows_as_coordinates_give_the_step_of_whole_rows(graph: str, method: str, passes: str) -> None:
    """In float64 the two agree to its rounding."""
    with refused(graph, passes):
        found = step(graph, torch.float64, method, capture="factored", passes=passes)
        expected = step(graph, torch.float64, method)
        assert max(distance(found, expected)) < (ROUNDED if graph == "halved_by_hand" else 1e-11)
        for a, b in zip(found.grads, expected.grads, strict=True):
            if a is not None and b is not None:
                assert (a.dtype, a.stride()) == (b.dtype, b.stride())
        check_how(found, GRAPHS[graph][1])


@pytest.mark.parametrize(("precision", "method"), [("float32", "mgda"), ("float32", "cagrad"), ("autocast", "upgrad")])
@pytest.mark.parametrize("graph", GRAPHS)
def test_rounding_is_at_most_twice_that_of_whole_rows(graph: str, method: str, precision: str) -> None:
    """Against the step in float64, whose forward pass rounds differently too: that is in both of them."""
    autocast = precision == "autocast"
    if autocast and graph == "recurrent_layer":
        pytest.skip("not every CPU has this layer in bfloat16")
    exact = step(graph, torch.float64, method)
    whole = distance(step(graph, torch.float32, method, autocast), exact)
    floor = 2e-2 if autocast else ROUNDED if graph == "halved_by_hand" else 2e-6
    found = distance(step(graph, torch.float32, method, autocast, "factored"), exact)
    assert all(a <= 2 * b + floor for a, b in zip(found, whole, strict=True)), (found, whole)


@contextlib.contextmanager
def refused(graph: str, passes: str) -> Iterator[None]:
    """What one pass for all tasks cannot do raises where it was asked for."""
    if passes != "batched" or graph not in ("partly_checkpointed", "parameter_hooks", "decay_in_a_loss"):
        yield
        return
    with pytest.raises((RuntimeError, ValueError), match=r"one backward pass for all tasks|passes=\"batched\""):
        yield


def check_how(found: Outcome, factored: int | None) -> None:
    how = found.report.factoring
    if factored == -1:
        assert how is None
    elif factored is not None:
        assert how is not None
        assert sum(text.startswith("factored") for text in how.how) == factored, how.how
        assert f"{factored} of " in found.report.summary()


def linear_pair(tasks: int = 3, width: int = 128) -> tuple[nn.Module, Callable[[], list[Tensor]]]:
    """A trunk of two layers and linear heads, and losses on a batch that changes with every call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(tasks))
    whole = nn.ModuleDict({"trunk": model, "heads": heads}).double()
    generator = torch.Generator().manual_seed(1)

    def losses() -> list[Tensor]:
        z = model(torch.randn(BATCH, width, generator=generator, dtype=torch.float64))
        return [(head(z) - k).square().mean() for k, head in enumerate(heads)]

    losses.generator = generator  # type: ignore[attr-defined]
    return whole, losses


def pair_of_runs(steps: int, **options: object) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters after some steps, of whole rows and of coordinates."""
    found = []
    for capture in ("harvest", "factored"):
        model, losses = linear_pair()
        optimizer = MultiTaskOptimizer(
            torch.optim.Adam(model.parameters(), lr=1e-3), PCGrad(seed=1), capture=capture, **options
        )
        for _ in range(steps):
            optimizer.zero_grad()
            optimizer.backward(losses())
            optimizer.step()
        found.append(list(model.parameters()))
    return found[0], found[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "parameter"},
        {"granularity": "group"},
        {"head_scaling": "weights"},
        {"refresh_every": 3},
        {"outside": "keep"},
    ],
    ids=str,
)
def test_training_is_the_same(options: dict[str, object]) -> None:
    for a, b in zip(*pair_of_runs(8, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("passes", ["loop", "batched"])
@pytest.mark.parametrize("share_every", [None, 2])
def test_a_gram_matrix_over_the_last_layers(passes: str, share_every: int | None) -> None:
    found = []
    for capture in ("harvest", "factored"):
        model, losses = linear_pair()
        groups = gram_groups(model, model["trunk"][2])
        given = {"capture": capture, "passes": passes if capture == "factored" else "auto", "share_every": share_every}
        optimizer = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.01), MGDA(), **given)
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.backward(losses())
            optimizer.step()
        report = optimizer.report
        assert report is not None
        found.append((report, [p.grad for p in model.parameters()]))
    (whole, grads), (factored, own) = found
    torch.testing.assert_close(factored.gram, whole.gram)
    for a, b in zip(own, grads, strict=True):
        torch.testing.assert_close(a, b)
    assert factored.factoring is not None and (factored.gram_share is None) == (share_every is None)
    if factored.gram_share is not None and whole.gram_share is not None:
        torch.testing.assert_close(factored.gram_share.trace, whole.gram_share.trace)


@pytest.mark.parametrize("passes", ["loop", "batched"])
def test_tasks_may_be_absent(passes: str) -> None:
    found = []
    for capture in ("harvest", "factored"):
        model, losses = linear_pair()
        given = {"capture": capture, "passes": passes} if capture == "factored" else {}
        optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), CAGrad(), **given)
        for present in ("abc", "ac", "b", "ba"):
            optimizer.zero_grad()
            named = dict(zip("abc", losses(), strict=True))
            optimizer.backward({name: named[name] for name in present})
            optimizer.step()
        found.append(list(model.parameters()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("passes", ["loop", "batched"])
def test_a_plain_sum_for_others_and_for_what_is_outside(passes: str) -> None:
    """Parameters with mtl=False, an input that requires grad, and a parameter that is in no optimizer."""
    found = []
    for capture in ("harvest", "factored"):
        model, losses = linear_pair()
        shift = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        first, rest = list(model["trunk"][0].parameters()), [*model["trunk"][2].parameters()]
        groups = [{"params": first, "mtl": False}, {"params": rest}]
        given = {"capture": capture, "passes": passes} if capture == "factored" else {}
        optimizer = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.01), MGDA(), **given)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*not in the optimizer")
            for _ in range(2):
                optimizer.backward([loss + (shift * (k + 1)).sum() for k, loss in enumerate(losses())])
        found.append([p.grad for p in (*model.parameters(), shift)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_more_tasks_than_one_batched_pass_takes() -> None:
    found = []
    for capture in ("harvest", "factored"):
        model, losses = linear_pair(tasks=19)
        given = {"capture": capture, "passes": "batched"} if capture == "factored" else {}
        optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), UPGrad(), **given)
        optimizer.backward(losses())
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_no_gradient_of_a_factored_weight_is_computed() -> None:
    """That of the whole would be one of its shape, for every task."""
    model, losses = linear_pair()
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), PCGrad(), capture="factored")

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and func in (torch.ops.aten.mm.default, torch.ops.aten.matmul.default):
                self.made += result.shape == (128, 128)
            return result

    for passes, products in (("loop", 2), ("batched", 2)):
        optimizer = MultiTaskOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.01), PCGrad(), capture="factored", passes=passes
        )
        ready = losses()
        with Sizes() as seen:
            optimizer.backward(ready)
        assert seen.made == products  # one a weight, at the end


def test_a_pass_for_all_falls_back_once_and_says_so() -> None:
    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(nn.functional.dropout, x, use_reentrant=False)

    model, losses = linear_pair()
    model["trunk"].insert(1, Random())
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), PCGrad(), capture="factored")
    with pytest.warns(UserWarning, match="tasks have a backward pass each") as caught:
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.backward(losses())
            assert optimizer.report is not None and optimizer.report.factoring is not None
            assert optimizer.report.factoring.passes == "loop"
    assert sum("a backward pass each" in str(one.message) for one in caught) == 1
    asked = MultiTaskOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), PCGrad(), capture="factored", passes="batched"
    )
    before = [p.grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r'one backward pass for all tasks cannot run.*passes="auto"'):
        asked.backward(losses())
    assert all(a is b.grad for a, b in zip(before, model.parameters(), strict=True))


def test_a_gradient_that_the_graph_does_not_show() -> None:
    """A custom function that runs a pass of its own over a weight that is also used in plain sight."""
    model, losses = linear_pair()
    weight = model["trunk"][2].weight

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
            return x + weight.detach().sum()

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
            with torch.enable_grad():
                (weight.sum() * grad.sum()).backward()
            return grad

    model["trunk"].append(Wrapped(Hidden))
    found, generator = [], losses.generator  # type: ignore[attr-defined]
    start = generator.get_state()
    for capture in ("harvest", "factored"):
        optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), MGDA(), capture=capture)
        for _ in range(2):
            generator.set_state(start)
            optimizer.zero_grad()
            optimizer.backward(losses())
        assert optimizer.report is not None
        found.append((optimizer.report, [p.grad for p in model.parameters()]))
    how = found[1][0].factoring
    assert how is not None and how.how[0].startswith("factored")
    assert how.how[2] == "dense: a custom function has used it unseen"
    torch.testing.assert_close(found[0][0].gram, found[1][0].gram)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b)


class Wrapped(nn.Module):
    """A custom function as a module."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.function.apply(x)
        return found


def test_hidden_parameters_are_said_once() -> None:
    model, run = make("checkpointed_reentrantly", torch.float64)
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), PCGrad(), capture="factored")
    with pytest.warns(UserWarning, match="captured whole as with capture=.harvest") as caught:
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.backward(run())
    assert sum("captured whole" in str(one.message) for one in caught) == 1
    assert optimizer.report is not None and optimizer.report.factoring is None


def test_near_parallel_gradients_stay_apart() -> None:
    """Float32 rows that differ by 1e-3: the length of their difference from the Gram matrix, within 5 %."""
    model, _ = linear_pair()
    model.float()
    z = model["trunk"](torch.randn(BATCH, 128, generator=torch.Generator().manual_seed(3)))
    first, second = (model["heads"][k](z).square().mean() for k in range(2))
    pair = [first, first + 1e-3 * second]
    rows = [torch.autograd.grad(loss, list(model["trunk"].parameters()), retain_graph=True) for loss in pair]
    expected = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(*rows, strict=True))
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(model["trunk"].parameters(), lr=0.0), MGDA(), capture="factored", outside="keep"
    )
    optimizer.backward(pair)
    assert optimizer.report is not None
    gram = optimizer.report.gram
    assert float(gram[0, 0] + gram[1, 1] - 2 * gram[0, 1]) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("passes", ["loop", "batched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_that_are_not_finite_reach_the_gradient(bad: float, passes: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    trunk, heads = nn.Linear(128, 128).to(dtype), [nn.Linear(128, 1).to(dtype) for _ in range(3)]
    x = torch.randn(BATCH, 128, dtype=dtype)
    x[1, 2] = bad
    params = [*trunk.parameters(), *(p for head in heads for p in head.parameters())]
    optimizer = MultiTaskOptimizer(torch.optim.SGD(params, lr=0.0), PCGrad(), capture="factored", passes=passes)
    optimizer.backward([head(trunk(x).clamp(-1, 1).nan_to_num()).mean() for head in heads])
    assert optimizer.report is not None and optimizer.report.weights is not None
    assert trunk.weight.grad is not None and not trunk.weight.grad.isfinite().all()
    torch.testing.assert_close(optimizer.report.weights, torch.full((3,), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "method", "message"),
    [
        ({"passes": "batched"}, PCGrad(), r'passes=.batched. is for capture="factored"'),
        ({"capture": "factored", "passes": "all"}, PCGrad(), "passes"),
        ({"capture": "factored"}, GradDrop(), "GradDrop combines elements"),
        ({"capture": "factored"}, MoDo(), "MoDo takes 3"),
        ({"capture": "factors"}, PCGrad(), "capture"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, str], method: Method, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiTaskOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(2, 2))]), method, **options)


def test_rows_of_several_passes_cannot_be_added() -> None:
    model, losses = linear_pair()
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), Sum(), capture="factored")
    with pytest.raises(ValueError, match=r'accumulate=True\) with capture="factored".*use capture="harvest"'):
        optimizer.backward(losses(), accumulate=True)
    with pytest.raises(ValueError, match=r"task\('a'\) with capture=\"factored\""), optimizer.task("a"):
        pass
    with pytest.raises(ValueError, match="features= holds rows at tensors"):
        z = model["trunk"](torch.randn(BATCH, 128, dtype=torch.float64))
        optimizer.backward([head(z).mean() for head in model["heads"]], features=z)
    assert all(p.grad is None for p in model.parameters())
    optimizer.backward(losses())


def test_an_error_in_a_pass_leaves_everything_as_it_was() -> None:
    model, losses = linear_pair()
    for passes in ("loop", "batched"):
        optimizer = MultiTaskOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.0), PCGrad(), capture="factored", passes=passes
        )
        optimizer.zero_grad()
        optimizer.backward(losses())
        before = uncombined(model.parameters())
        freed = losses()
        sum(freed).backward(inputs=list(model["heads"].parameters()))  # type: ignore[union-attr]
        sum(losses()).backward()  # type: ignore[union-attr]
        for p, grad in zip(model.parameters(), before, strict=True):
            p.grad = None if grad is None else grad.clone()
        with pytest.raises(RuntimeError, match="already freed"):
            optimizer.backward(freed)
        for p, grad in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=0, atol=0)


def test_a_state_dict_of_another_capture_loads() -> None:
    model, losses = linear_pair()
    first = MultiTaskOptimizer(torch.optim.Adam(model.parameters()), PCGrad(), capture="factored")
    first.backward(losses())
    first.step()
    second = MultiTaskOptimizer(torch.optim.Adam(model.parameters()), PCGrad())
    second.load_state_dict(first.state_dict())
    assert second.tasks == first.tasks
