"""The definitions: the loop that they share, and what happens where the host would have to wait inside a capture."""

import pytest
import torch

import mtl_kernels as mk
from mtl_kernels.backends import BACKENDS, host, triton
from mtl_kernels.definitions import solving


def test_a_definition_sees_its_active_tasks_alone() -> None:
    seen = []
    gram = torch.arange(32.0).double().view(2, 4, 4)
    active = torch.tensor([[True, False, True, True], [False] * 4])
    inputs = torch.arange(4.0).double()

    @solving.defines("throw_away", num_options=1)
    def definition(problem: solving.Problem) -> solving.Answer:
        seen.append(problem)
        return solving.Answer(problem.gram.diagonal(), 0.25, 7)

    try:
        call = mk.SolverCall("throw_away", (3.0,), active, inputs=inputs)
        weights, certificate = mk.ops.solve(gram, call, backend="reference")
    finally:
        del solving.DEFINITIONS["throw_away"]
    (problem,) = seen
    assert problem.gram.tolist() == [[0, 2, 3], [8, 10, 11], [12, 14, 15]]
    assert (problem.tasks, problem.num_tasks, problem.position) == ([0, 2, 3], 4, 0)
    assert problem.options == (3.0,) and problem.inputs.tolist() == [0, 2, 3]
    assert weights.tolist() == [[0, 0, 10, 15], [0] * 4]
    assert certificate.tolist() == [[0.25, 7], [0, 0]]


def test_a_definition_is_short_and_solves_one_problem() -> None:
    """They are there to be read: about 40 lines each, whatever batches, masks and infinities need is shared."""
    import ast
    import inspect

    for module in {definition.answer.__module__ for definition in solving.DEFINITIONS.values()}:
        tree = ast.parse(inspect.getsource(__import__(module, fromlist=["_"])))
        lengths = {
            node.name: node.end_lineno - node.lineno + 1
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and not node.name.endswith(("_weights", "_options"))
        }
        assert max(lengths.values()) <= 46, lengths


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_solve_on_the_host_is_refused_in_a_capture(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "capturing", lambda device: True)
    monkeypatch.setattr(triton, "SOLVERS", ())
    with pytest.raises(RuntimeError, match="solver 'min_norm' would run on the host while a CUDA graph is captured"):
        BACKENDS[backend].solve(mk.SolverCall("min_norm", (0.0, 0.0, 0.0)), torch.eye(3).double())


@pytest.mark.parametrize("compiled", [True, False])
def test_solvers_without_a_triton_kernel_run_on_the_host(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiled solver, bit for bit, or by its definition where there is none."""
    monkeypatch.setattr(triton, "SOLVERS", ())
    expected_from = "cpu" if compiled else "reference"
    if compiled and BACKENDS["cpu"].missing() is not None:
        pytest.skip("the compiled backend is not here")
    if not compiled:
        monkeypatch.setattr(host.CpuBackend, "missing", lambda self: "not built")
    rows = torch.randn(2, 7, 20, dtype=torch.float64)
    gram = rows @ rows.mT
    active = torch.ones(2, 7, dtype=torch.bool)
    active[1, 3] = False
    for name, options in (("min_norm", (0.0, 0.0, 0.0)), ("pcgrad", (1.0, 0.0))):
        call = mk.SolverCall(name, options, active, mk.rng_state(3, device="cpu"))
        found = BACKENDS["triton"].solve(call, gram)
        expected = BACKENDS[expected_from].solve(call, gram)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="unknown solver 'nothing'"):
        BACKENDS["triton"].solve(mk.SolverCall("nothing"), gram)
