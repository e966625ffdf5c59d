"""AlignedMTL, ConFIG and IMTLG as methods: on vectors, in an optimizer, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import mtl_kernels as mk
from benchmarks.oracles import spectral as oracle
from mtl_optim import IMTLG, AlignedMTL, ConFIG, MultiTaskOptimizer, get_method, methods
from optim.recording import record

PREF = (1.0, 0.5, 3.0, 2.0, 0.25)
BUILD: dict[str, Callable[[], methods.Method]] = {
    "aligned": AlignedMTL,
    "aligned with preferences": lambda: AlignedMTL(PREF, scale_mode="median"),
    "config": ConFIG,
    "config with preferences": lambda: ConFIG(PREF, length="harmonic"),
    "imtlg": IMTLG,
}
EACH = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
ROWS = torch.randn(5, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def direction_of(method: methods.Method, rows: np.ndarray) -> np.ndarray:
    """The combination by the oracle of the method."""
    if isinstance(method, IMTLG):
        expected = oracle.imtl_g(rows)
        return rows.T @ expected.value
    pref = np.array(method.pref or np.ones(len(rows)))
    if isinstance(method, ConFIG):
        expected = oracle.config(rows, pref, method.length)
    else:
        expected = oracle.aligned_mtl(rows, pref if method.pref else pref / len(rows), method.scale_mode)
    return expected.value


@EACH
@pytest.mark.parametrize("seed", range(4))
def test_on_vectors(build: Callable[[], methods.Method], seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((5, 9)) * 10.0 ** np.arange(-2, 3)[:, None]
    found = build()(torch.from_numpy(rows)).numpy()
    expected = direction_of(build(), rows)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.linalg.norm(expected))


@EACH
def test_a_step(build: Callable[[], methods.Method]) -> None:
    """d in `.grad`, from the rows that separate passes leave; and the certificate in the report."""
    torch.manual_seed(0)
    net, inputs = nn.Linear(4, 5, bias=False).double(), torch.randn(7, 4, dtype=torch.float64)
    trunk = nn.Linear(4, 4).double()

    def losses() -> list[torch.Tensor]:
        return list((net(trunk(inputs).tanh()) - torch.arange(5.0)).square().mean(0))

    net.requires_grad_(False)
    weights = [*trunk.parameters()]
    rows = [[*torch.autograd.grad(loss, weights, retain_graph=True)] for loss in losses()]
    matrix = np.array([torch.cat([gradient.flatten() for gradient in row]).numpy() for row in rows])
    optimizer = MultiTaskOptimizer(torch.optim.SGD(weights, lr=0.1), build())
    optimizer.backward(losses())
    found = torch.cat([p.grad.flatten() for p in weights]).numpy()
    expected = direction_of(build(), matrix)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8 * np.linalg.norm(expected))
    assert optimizer.report.gap is not None and optimizer.report.gap < 1e-14
    optimizer.step()


@EACH
def test_batch_active_tasks_and_what_is_not_finite(build: Callable[[], methods.Method]) -> None:
    rows = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    active = torch.ones(3, 5, dtype=torch.bool)
    active[1, [0, 4]] = False
    rows[1, 0] = rows[2, 1] = torch.inf
    found = build().weights(torch.stack([mk.gram(row) for row in rows]), active=active)
    torch.testing.assert_close(found[0], build().weights(mk.gram(rows[0])))
    assert found[2].tolist() == [0.2] * 5 and not found[1, [0, 4]].any()
    method = build()
    pref = getattr(method, "pref", None)
    rest = {} if pref is None else {"pref": pref[1:4]}
    alone = type(method)(**{**method.config(), **rest}).weights(mk.gram(rows[1, 1:4]))
    torch.testing.assert_close(found[1, 1:4], alone, rtol=1e-10, atol=0)


@EACH
def test_nothing_waits_and_nothing_is_kept(build: Callable[[], methods.Method]) -> None:
    method, gram, found = build(), mk.gram(ROWS), torch.zeros(5, dtype=torch.float64)
    expected = method.weights(gram)
    replay = record("cpu", lambda: found.copy_(method.weights(gram)))
    replay()
    assert torch.equal(found, expected) and method.state_dict() == {}
    for twin in (copy.deepcopy(method), pickle.loads(pickle.dumps(method)), type(method)(**method.config())):
        assert torch.equal(twin.weights(gram), expected)


@pytest.mark.gpu
@EACH
def test_on_a_gpu(build: Callable[[], methods.Method]) -> None:
    method = build()
    grams = [mk.gram(ROWS.roll(k, 1)) for k in range(3)]
    on_gpu = [gram.cuda() for gram in grams]
    found = [method.weights(on_gpu[0])]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += [method.weights(gram) for gram in on_gpu[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for gram, weights in zip(grams, found, strict=True):
        torch.testing.assert_close(weights.cpu(), build().weights(gram), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("cls", [AlignedMTL, ConFIG])
def test_preferences_by_name(cls: type[methods.Method]) -> None:
    gram = mk.gram(ROWS[:2])
    named = cls({"depth": 3.0, "edges": 0.5})
    assert torch.equal(named.bound_to(("edges", "depth")).weights(gram), cls([0.5, 3.0]).weights(gram))
    with pytest.raises(ValueError, match="none for task 'normals'"):
        named.bound_to(("depth", "normals"))
    with pytest.raises(ValueError, match=r"call \.bound_to"):
        named.weights(gram)
    with pytest.raises(ValueError, match="2 preferences for 5 tasks"):
        cls([1, 2]).weights(mk.gram(ROWS))


def test_a_task_alone() -> None:
    one = torch.tensor([[4.0]])
    assert AlignedMTL().weights(one).tolist() == ConFIG().weights(one).tolist() == IMTLG().weights(one).tolist() == [1]
    assert AlignedMTL([0.3]).weights(one).item() == pytest.approx(0.3)
    assert AlignedMTL([0.3]).weighs_alone and ConFIG([1]).weighs_alone
    assert not (AlignedMTL().weighs_alone or ConFIG().weighs_alone or IMTLG().weighs_alone)


def test_names() -> None:
    assert type(get_method("Aligned_MTL")) is AlignedMTL and type(get_method("ConFIG")) is ConFIG
    assert type(get_method("imtl-g")) is type(get_method("IMTLG")) is type(get_method("IMTL")) is IMTLG
    assert get_method("alignedmtl", scale_mode="rmse").config() == {"pref": None, "scale_mode": "rmse", "rtol": None}


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: AlignedMTL(scale_mode="max"), ValueError, "scale_mode='max' is unknown"),
        (lambda: ConFIG(length="mean"), ValueError, "length='mean' is unknown"),
        (lambda: AlignedMTL([-1.0, 2.0]), ValueError, "finite numbers >= 0"),
        (lambda: ConFIG([0.0, 0.0]), ValueError, "a number > 0"),
        *(
            (lambda cls=cls, rtol=rtol: cls(rtol=rtol), error, "expected rtol")
            for cls in (AlignedMTL, ConFIG, IMTLG)
            for rtol, error in ((0, ValueError), (1.0, ValueError), (float("nan"), ValueError), ("a", TypeError))
        ),
    ],
)
def test_bad_options(build: Callable[[], methods.Method], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
