"""The operators of `torch.library`: their schemas, implementations and fakes, and rows as they take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, run
from .call import ColumnCall, SolverCall, StateCall
from .rows import Row, RowTable, check_num_tasks

_CALL = "str solver, float[] options, Tensor? active, Tensor? rng, Tensor? inputs, Tensor(a!)? state=None"
"""A `SolverCall`, flat. Operators change no argument but ``out`` and the state: ``advance_rng`` is left to callers."""

_COLUMN_CALL = "str operation, Tensor? leak, Tensor? rng, int trim"
"""A `ColumnCall`, flat."""

_STATE_CALL = "str operation, Tensor gain, Tensor? keep, float epsilon"
"""A `StateCall`, flat."""

_library = torch.library.Library("mtl_kernels", "DEF")
_library.define("gram(Tensor?[] rows, int num_tasks, int[]? groups, str? backend) -> Tensor")
_library.define("statistics(Tensor?[] rows, int num_tasks, int[]? groups, str? backend) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"gram_solve(Tensor?[] rows, int num_tasks, int[]? groups, str? backend, {_CALL}) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "combine(Tensor?[] rows, Tensor weights, int num_tasks, int[]? groups, str? backend, *, Tensor? scale=None)"
    " -> Tensor[]"
)
_library.define(
    "combine_out(Tensor?[] rows, Tensor weights, int num_tasks, int[]? groups, Tensor(a!)[] out, str? backend, *,"
    " Tensor? scale=None, Tensor(b!)? found_inf=None, bool accumulate=False) -> ()"
)
_library.define(f"reduce_columns(Tensor?[] rows, int num_tasks, str? backend, {_COLUMN_CALL}) -> Tensor[]")
_library.define(
    f"reduce_columns_out(Tensor?[] rows, int num_tasks, Tensor(a!)[] out, str? backend, {_COLUMN_CALL}) -> ()"
)
_library.define(
    "update_state(Tensor(a!)[] state, bool[] there, Tensor?[] rows, int num_tasks, int[]? groups, str? backend,"
    f" {_STATE_CALL}) -> Tensor"
)
_library.define(f"solve(Tensor gram, str? backend, {_CALL}) -> (Tensor, Tensor)")


def flatten(rows: Tensor | Sequence[Row] | RowTable) -> tuple[list[Tensor | None], int]:
    """Rows as the operators take them: K * P entries and K."""
    if isinstance(rows, RowTable):
        rows = rows.entries
    elif isinstance(rows, Tensor):
        if rows.dim() != 2:
            raise ValueError(f"expected rows of shape [K, N], found {list(rows.shape)}: flatten each gradient")
        check_num_tasks(rows.shape[0])
        rows = [[row] for row in rows.unbind(0)]
    check_num_tasks(len(rows))
    if any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("every row needs one entry per parameter; use None for one that a task does not reach")
    return [tensor for row in rows for tensor in row], len(rows)


def flat_call(
    call: SolverCall,
) -> tuple[str, list[float], Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """A call as the operators take it."""
    return call.solver, list(call.options), call.active, call.rng, call.inputs, call.state


def unflatten(flat: Sequence[Tensor | None], num_tasks: int) -> RowTable:
    """The rows that `flatten` made K * P entries of."""
    num_params = len(flat) // num_tasks
    return RowTable([flat[k * num_params : (k + 1) * num_params] for k in range(num_tasks)])


def _gram_op(rows, num_tasks, groups, backend):  # type: ignore[no-untyped-def]
    return run.gram(unflatten(rows, num_tasks), groups, backend)


def _statistics_op(rows, num_tasks, groups, backend):  # type: ignore[no-untyped-def]
    return run.statistics(unflatten(rows, num_tasks), groups, backend)


def _gram_solve_op(rows, num_tasks, groups, backend, *call):  # type: ignore[no-untyped-def]
    return run.gram_solve(unflatten(rows, num_tasks), SolverCall(*call), groups, backend)


def _combine_op(rows, weights, num_tasks, groups, backend, scale=None):  # type: ignore[no-untyped-def]
    found = run.combine(unflatten(rows, num_tasks), weights, None, groups, backend, scale)
    return [tensor for tensor in found if tensor is not None]


def _spread(table: RowTable, out: Sequence[Tensor]) -> list[Tensor | None]:
    """``out`` holds the reached parameters only: put each at its place among all of them."""
    reached = sum(like is not None for like in table.like)
    if len(out) != reached:
        raise ValueError(f"out has {len(out)} tensors for {reached} parameters that a task reaches")
    given = iter(out)
    return [None if like is None else next(given) for like in table.like]


def _combine_out_op(  # type: ignore[no-untyped-def]
    rows, weights, num_tasks, groups, out, backend, scale=None, found_inf=None, accumulate=False
):
    table = unflatten(rows, num_tasks)
    run.combine(table, weights, _spread(table, out), groups, backend, scale, found_inf, accumulate)


def _reduce_columns_op(rows, num_tasks, backend, *call):  # type: ignore[no-untyped-def]
    found = run.reduce_columns(unflatten(rows, num_tasks), ColumnCall(*call), None, backend)
    return [tensor for tensor in found if tensor is not None]


def _reduce_columns_out_op(rows, num_tasks, out, backend, *call):  # type: ignore[no-untyped-def]
    table = unflatten(rows, num_tasks)
    run.reduce_columns(table, ColumnCall(*call), _spread(table, out), backend)


def _spread_state(state: Sequence[Tensor], there: Sequence[bool], num_tasks: int) -> list[list[Tensor | None]]:
    """``state`` holds the tensors that are there only: put each at its place among K * P."""
    given, num_params = iter(state), len(there) // num_tasks
    flat = [next(given) if is_there else None for is_there in there]
    return [flat[k * num_params : (k + 1) * num_params] for k in range(num_tasks)]


def _update_state_op(  # type: ignore[no-untyped-def]
    state, there, rows, num_tasks, groups, backend, *call
):
    spread = _spread_state(state, there, num_tasks)
    return run.update_state(spread, RowTable(spread), unflatten(rows, num_tasks), StateCall(*call), groups, backend)


def _solve_op(gram, backend, *call):  # type: ignore[no-untyped-def]
    return run.solve(gram, SolverCall(*call), backend)


def _gram_fake(rows, num_tasks, groups, backend):  # type: ignore[no-untyped-def]
    table = unflatten(rows, num_tasks)
    _, num_groups = checks.check_groups(groups, table.num_params)
    shape = (num_tasks, num_tasks) if groups is None else (num_groups, num_tasks, num_tasks)
    return torch.empty(shape, dtype=torch.float64, device=table.device)


def _statistics_fake(rows, num_tasks, groups, backend):  # type: ignore[no-untyped-def]
    gram = _gram_fake(rows, num_tasks, groups, backend)  # type: ignore[no-untyped-call]
    return gram, gram.new_empty(gram.shape[:-1]), torch.empty_like(gram)


def _gram_solve_fake(rows, num_tasks, groups, backend, *call):  # type: ignore[no-untyped-def]
    gram = _gram_fake(rows, num_tasks, groups, backend)  # type: ignore[no-untyped-call]
    return gram, gram.new_empty(gram.shape[:-1]), gram.new_empty((*gram.shape[:-2], 2))


def _combine_fake(rows, weights, num_tasks, groups, backend, scale=None):  # type: ignore[no-untyped-def]
    table = unflatten(rows, num_tasks)
    checks.check_weights(table, weights, groups)
    checks.check_epilogue(table, scale, None)
    return [torch.empty_like(like) for like in table.like if like is not None]


def _combine_out_fake(  # type: ignore[no-untyped-def]
    rows, weights, num_tasks, groups, out, backend, scale=None, found_inf=None, accumulate=False
):
    table = unflatten(rows, num_tasks)
    checks.check_weights(table, weights, groups)
    checks.check_epilogue(table, scale, found_inf)
    checks.check_out(table, _spread(table, out))


def _reduce_columns_fake(rows, num_tasks, backend, *call):  # type: ignore[no-untyped-def]
    table = unflatten(rows, num_tasks)
    checks.check_columns(table, ColumnCall(*call))
    return [torch.empty_like(like) for like in table.like if like is not None]


def _reduce_columns_out_fake(rows, num_tasks, out, backend, *call):  # type: ignore[no-untyped-def]
    table = unflatten(rows, num_tasks)
    checks.check_columns(table, ColumnCall(*call))
    checks.check_out(table, _spread(table, out), same_dtype=True)


def _update_state_fake(  # type: ignore[no-untyped-def]
    state, there, rows, num_tasks, groups, backend, *call
):
    places = RowTable(_spread_state(state, there, num_tasks))
    checks.check_state(unflatten(rows, num_tasks), places, StateCall(*call), groups)
    _, num_groups = checks.check_groups(groups, places.num_params)
    shape = (num_tasks,) if groups is None else (num_groups, num_tasks)
    return torch.empty(shape, dtype=torch.float64, device=places.device)


def _solve_fake(gram, backend, *call):  # type: ignore[no-untyped-def]
    checks.check_gram(gram)
    return gram.new_empty(gram.shape[:-1], dtype=torch.float64), gram.new_empty(
        (*gram.shape[:-2], 2), dtype=torch.float64
    )


def _below_autograd(op):  # type: ignore[no-untyped-def]
    """The operator without a derivative: its outputs never require grad."""

    def call(*args, **kwargs):  # type: ignore[no-untyped-def]
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    return call


for _name, _impl, _fake in (
    ("gram", _gram_op, _gram_fake),
    ("statistics", _statistics_op, _statistics_fake),
    ("gram_solve", _gram_solve_op, _gram_solve_fake),
    ("combine", _combine_op, _combine_fake),
    ("combine_out", _combine_out_op, _combine_out_fake),
    ("reduce_columns", _reduce_columns_op, _reduce_columns_fake),
    ("reduce_columns_out", _reduce_columns_out_op, _reduce_columns_out_fake),
    ("update_state", _update_state_op, _update_state_fake),
    ("solve", _solve_op, _solve_fake),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    _library.impl(_name, _below_autograd(getattr(torch.ops.mtl_kernels, _name).default), "Autograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"mtl_kernels::{_name}", _fake, lib=_library)
