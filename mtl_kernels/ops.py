"""The public operations on rows.

Eager calls on plain tensors go straight to the backend. Under torch.compile, dispatch modes, functorch transforms and
for tensor subclasses the same call goes through a registered operator, opaque to the compiler. Outputs never require
grad: the combination of gradients is not itself differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import run
from .angles import cosines, norms
from .call import ColumnCall, SolverCall, StateCall
from .library import flat_call, flatten
from .rows import MAX_TASKS, Part, Row, RowTable

_PLAIN = frozenset({Tensor, type(None)})


def gram(
    rows: Tensor | Sequence[Row] | RowTable,
    *,
    groups: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """The Gram matrix of the rows, G_ij = <g_i, g_j>.

    Args:
        rows: a tensor ``[K, N]``, K sequences of P tensors or ``None``, or a `RowTable` of them.
        groups: length P, the group of each parameter: one Gram matrix per group instead of one over all parameters.
        backend: a backend's name; default see `mtl_kernels.use_backend`.

    Returns:
        float64 ``[K, K]``, or ``[S, K, K]`` with ``groups`` (S = highest group + 1), symmetric to the bit. A ``None``
        entry counts as zero. Sums are taken in float64; over many float32, bfloat16 or float16 elements also in
        float32, at most 32 products at a time.

    Raises:
        TypeError, ValueError: rows that do not fit together (see `RowTable`), or groups that do not fit the rows.
        RuntimeError: the backend asked for is not available.
    """
    if isinstance(rows, RowTable) and rows.part is not None:
        return _gram_of_part(rows, rows.part, groups, backend)
    return _gram(rows, groups, backend)


def _gram_of_part(table: RowTable, part: Part, groups: Sequence[int] | None, backend: str | None) -> Tensor:
    """That of the rows of which some are here."""
    return part.total(_gram(table.counted(), groups, backend))


def _gram(rows: Tensor | Sequence[Row] | RowTable, groups: Sequence[int] | None, backend: str | None) -> Tensor:
    """That of the rows that are here."""
    if _eager():
        rows = _as_table(rows)
        if rows.plain:
            return run.gram(rows, groups, backend)
    flat, num_tasks = flatten(rows)
    found: Tensor = torch.ops.mtl_kernels.gram(flat, num_tasks, _int_list(groups), backend)
    return found


def cross_gram(
    rows_a: Tensor | Sequence[Row] | RowTable,
    rows_b: Tensor | Sequence[Row] | RowTable,
    *,
    groups: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """The products of the rows of two tables, A_ij = <a_i, b_j>: those of a task's gradients on two batches.

    Args:
        rows_a, rows_b: each as for `gram`, of one kind: parameters of the same shapes, dtypes and device.
        groups, backend: as for `gram`.

    Returns:
        float64 ``[K_a, K_b]``, or ``[S, K_a, K_b]`` with ``groups``: the entries that `gram` of all rows has. Up to
        128 rows in all are read once; of more than 64 in a table, each is read as often as the other has parts of 64.

    Raises:
        TypeError, ValueError, RuntimeError: as `gram`, for all rows together.
    """
    a, b = _row_list(rows_a), _row_list(rows_b)
    captured = all(isinstance(rows, RowTable) and rows.captured for rows in (rows_a, rows_b))
    part = rows_a.part if isinstance(rows_a, RowTable) else None

    def block(some_a: Sequence[Row], some_b: Sequence[Row]) -> Tensor:
        both = [*some_a, *some_b]
        table = both if part is None and not (captured and _eager()) else RowTable(both, captured=captured, part=part)
        return gram(table, groups=groups, backend=backend)[..., : len(some_a), len(some_a) :]

    if len(a) + len(b) <= MAX_TASKS:
        return block(a, b).contiguous()
    half = MAX_TASKS // 2
    return torch.cat(
        [
            torch.cat([block(a[i : i + half], b[j : j + half]) for j in range(0, len(b), half)], -1)
            for i in range(0, len(a), half)
        ],
        -2,
    )


def _row_list(rows: Tensor | Sequence[Row] | RowTable) -> list[Row]:
    """The rows one by one, each a list of parameters. Raise ValueError for too many, or none."""
    flat, num_tasks = flatten(rows)
    num_params = len(flat) // num_tasks
    return [flat[k * num_params : (k + 1) * num_params] for k in range(num_tasks)]


class Statistics(NamedTuple):
    """What one read of the rows tells about them, float64.

    Attributes:
        gram: ``[K, K]`` or ``[S, K, K]``. norms: ``[K]`` or ``[S, K]``. cosines: shaped like ``gram``.
    """

    gram: Tensor
    norms: Tensor
    cosines: Tensor


def statistics(
    rows: Tensor | Sequence[Row] | RowTable,
    *,
    groups: Sequence[int] | None = None,
    backend: str | None = None,
) -> Statistics:
    """`gram`, `norms` and `cosines` of the rows, from a single launch on a GPU; arguments and errors as for `gram`."""
    if isinstance(rows, RowTable) and rows.part is not None:
        found = _gram_of_part(rows, rows.part, groups, backend)
        return Statistics(found, norms(found), cosines(found))
    if _eager():
        rows = _as_table(rows)
        if rows.plain:
            return Statistics(*run.statistics(rows, groups, backend))
    flat, num_tasks = flatten(rows)
    return Statistics(*torch.ops.mtl_kernels.statistics(flat, num_tasks, _int_list(groups), backend))


def gram_solve(
    rows: Tensor | Sequence[Row] | RowTable,
    call: SolverCall,
    *,
    groups: Sequence[int] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`gram` and `solve` of its result, on a GPU in a single launch: the last block of the Gram kernel runs the solver.

    Args:
        rows, groups: as for `gram`.
        call: the solver, its options and inputs, see `SolverCall`.
        backend: as for `gram`.

    Returns:
        gram ``[K, K]``, weights ``[K]`` and certificate ``[2]`` (gap or residual, iterations), float64; with ``groups``
        ``[S, K, K]``, ``[S, K]`` and ``[S, 2]``. The certificate may be None where ``call`` asks for none.

    Raises:
        TypeError, ValueError, RuntimeError: as `gram` and `solve`.
    """
    _check_call(call)
    if isinstance(rows, RowTable) and rows.part is not None:
        whole = _gram_of_part(rows, rows.part, groups, backend)
        return (whole, *solve(whole, call, backend=backend))
    if _eager():
        rows = _as_table(rows)
        if rows.plain and _plain(call.active, call.rng, call.inputs, call.state):
            return run.gram_solve(rows, call, groups, backend)
    flat, num_tasks = flatten(rows)
    found = torch.ops.mtl_kernels.gram_solve(flat, num_tasks, _int_list(groups), backend, *flat_call(call))
    _advance(call)
    gram, weights, certificate = found
    return gram, weights, certificate


def combine(
    rows: Tensor | Sequence[Row] | RowTable,
    weights: Tensor,
    out: Tensor | Sequence[Tensor | None] | None = None,
    *,
    groups: Sequence[int] | None = None,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> Tensor | list[Tensor | None]:
    """The weighted sum of the rows, d = scale * J^T w, summed in float64 and rounded once to the dtype of the output.

    Args:
        rows: as for `gram`.
        weights: ``[K]``, or ``[S, K]`` with ``groups``; any floating dtype, on the device of the rows.
        out: where to write, shaped like one row (a tensor ``[N]`` for dense rows, else P tensors, ``None`` where no
            task reaches the parameter). It may be any one of the rows itself, but may not overlap one in part.
            Its dtype may differ from the rows': d is rounded to the dtype of ``out``.
        groups: as for `gram`: parameter p takes the weights of group ``groups[p]``.
        scale: one floating-point element on the device of the rows, such as 1 / loss scale or a clipping factor; it
            is read on the device.
        found_inf: float32 with one element on the device of the rows: set to 1 if anything written is inf or nan, else
            left as it is (the convention of `torch.amp.GradScaler`).
        accumulate: add to what ``out`` holds instead of replacing it; ``out`` may then not be one of the rows.
        backend: as for `gram`.

    On the cuda backend all of this is one launch.

    Returns:
        ``out`` or new tensors of the rows' dtype: ``[N]`` for dense rows, else a list of P tensors with ``None``
        where no task reaches the parameter.

    Raises:
        TypeError, ValueError: rows, weights, groups or ``out`` that do not fit together.
        RuntimeError: the backend asked for is not available.
    """
    if accumulate and out is None:
        raise ValueError("accumulate adds to out: pass out as well")
    if _eager():
        rows = _as_table(rows)
        if rows.plain and _plain(weights, scale, found_inf, *(out if isinstance(out, Sequence) else (out,))):
            return run.combine(rows, weights, out, groups, backend, scale, found_inf, accumulate)
    flat, num_tasks = flatten(rows)
    if out is not None:
        targets: list[Tensor | None] = [out] if isinstance(out, Tensor) else list(out)
        present = [target for target in targets if target is not None]
        torch.ops.mtl_kernels.combine_out(
            flat, weights, num_tasks, _int_list(groups), present, backend,
            scale=scale, found_inf=found_inf, accumulate=accumulate,
        )  # fmt: skip
        return out if isinstance(out, Tensor) else targets
    combined: list[Tensor] = torch.ops.mtl_kernels.combine(
        flat, weights, num_tasks, _int_list(groups), backend, scale=scale
    )
    if found_inf is not None:
        run.flag_non_finite(combined, found_inf)
    return _like_a_row(rows, combined, flat, num_tasks)


def graddrop(
    rows: Tensor | Sequence[Row] | RowTable,
    rng: Tensor,
    *,
    leak: Tensor | None = None,
    out: Tensor | Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> Tensor | list[Tensor | None]:
    """Gradient sign dropout: every element keeps the task gradients of one sign, drawn by how pure the signs are.

    P = (1 + sum_k g_k / sum_k |g_k|) / 2 and a uniform U of its own for every element; positive g_k are kept where
    P > U, negative ones where P < U, and d = sum_k (leak_k + (1 - leak_k) kept_k) g_k, in float64, rounded once.
    Chen et al. 2020 (arXiv 2010.06808), algorithm 1 with the identity for f.

    U is a function of ``rng`` and the number of the element alone, the same on every backend: elements are numbered
    through the parameters that a task reaches, in order and in the order of their memory.

    Args:
        rows: as for `gram`.
        rng: int64 ``[2]``, see `rng_state`; it is read, not advanced.
        leak: ``[K]``, from 0 to 1, what of a dropped value remains; None for nothing. Its values are not looked at.
        out: as for `combine`, of the dtype of the rows; it may be one of the rows.
        backend: as for `gram`.

    Returns:
        As `combine`. Not finite where one of the K values is not.

    Raises:
        TypeError, ValueError: arguments that do not fit together.
        RuntimeError: the backend asked for is not available.
    """
    return _reduce_columns(rows, ColumnCall("graddrop", leak, rng), out, backend)


def trimmed_mean(
    rows: Tensor | Sequence[Row] | RowTable,
    trim: int,
    *,
    out: Tensor | Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> Tensor | list[Tensor | None]:
    """Element by element the mean of the rows without the ``trim`` largest and the ``trim`` smallest of the K values.

    Yin et al. 2018 (arXiv 1803.01498), definition 2. A ``None`` entry counts as zero.

    Args:
        rows: as for `gram`, K >= 2 trim + 1.
        trim: at least 0.
        out, backend: as for `graddrop`.

    Returns:
        As `combine`, summed in float64 and rounded once. NaN where one of the K values is NaN; infinite values are the
        largest and smallest there are, and are left out with these.

    Raises:
        TypeError, ValueError: arguments that do not fit together.
        RuntimeError: the backend asked for is not available.
    """
    return _reduce_columns(rows, ColumnCall("trimmed_mean", trim=trim), out, backend)


def update_average(
    state: Tensor | Sequence[Row] | RowTable,
    rows: Tensor | Sequence[Row] | RowTable,
    keep: Tensor,
    gain: Tensor,
    *,
    groups: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Moving averages of the rows, in place: state_k <- keep_k state_k + gain_k g_k, in float64, rounded once.

    A factor 0 leaves its operand out, whatever that holds: with gain 0 a row that is not finite changes nothing, with
    keep 0 a state that is not finite is gone. Where keep is 1 and gain 0, the state keeps its bits.

    Args:
        state: like the rows, of any row dtype; there is a tensor where the row has one, and may be one where it has
            none: a ``None`` entry counts as zero. Memory of its own.
        rows: as for `gram`.
        keep, gain: ``[K]``, or ``[S, K]`` with ``groups``; any floating dtype, on the device of the rows.
        groups, backend: as for `gram`.

    Returns:
        The squared norms of the new state, as it is rounded: float64 ``[K]``, or ``[S, K]`` with ``groups``.

    Raises:
        TypeError, ValueError: arguments that do not fit together.
        RuntimeError: the backend asked for is not available.
    """
    return _update_state(state, rows, StateCall("average", gain, keep), groups, backend)


def accumulate_squares(
    state: Tensor | Sequence[Row] | RowTable,
    rows: Tensor | Sequence[Row] | RowTable,
    gain: Tensor,
    *,
    eps: float = 1e-7,
    groups: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sums of squared gradients, in place: state_k <- state_k + gain_k g_k^2, in float64, rounded once.

    Where gain is 0, the state keeps its bits whatever the row holds.

    Args:
        state, rows, groups, backend: as for `update_average`.
        gain: ``[K]``, or ``[S, K]`` with ``groups``.
        eps: at least 0. With 0, an element whose state and gradient are 0 makes the sum nan.

    Returns:
        sum g_k^2 / sqrt(state_k + eps) over all elements, with the new state as it is rounded: float64 ``[K]``, or
        ``[S, K]`` with ``groups`` (the excess risk of He et al. 2024, ExcessMTL).

    Raises:
        TypeError, ValueError: arguments that do not fit together.
        RuntimeError: the backend asked for is not available.
    """
    return _update_state(state, rows, StateCall("squares", gain, None, eps), groups, backend)


def _reduce_columns(
    rows: Tensor | Sequence[Row] | RowTable,
    call: ColumnCall,
    out: Tensor | Sequence[Tensor | None] | None,
    backend: str | None,
) -> Tensor | list[Tensor | None]:
    if _eager():
        rows = _as_table(rows)
        if rows.plain and _plain(call.leak, call.rng, *(out if isinstance(out, Sequence) else (out,))):
            return run.reduce_columns(rows, call, out, backend)
    flat, num_tasks = flatten(rows)
    if out is not None:
        targets: list[Tensor | None] = [out] if isinstance(out, Tensor) else list(out)
        present = [target for target in targets if target is not None]
        torch.ops.mtl_kernels.reduce_columns_out(flat, num_tasks, present, backend, *call)
        return out if isinstance(out, Tensor) else targets
    found: list[Tensor] = torch.ops.mtl_kernels.reduce_columns(flat, num_tasks, backend, *call)
    return _like_a_row(rows, found, flat, num_tasks)


def _update_state(
    state: Tensor | Sequence[Row] | RowTable,
    rows: Tensor | Sequence[Row] | RowTable,
    call: StateCall,
    groups: Sequence[int] | None,
    backend: str | None,
) -> Tensor:
    if _eager():
        rows = _as_table(rows)
        kept = _as_table(state)
        if rows.plain and kept.plain and _plain(call.gain, call.keep):
            return run.update_state(state, kept, rows, call, groups, backend)
    flat, num_tasks = flatten(rows)
    places, num_states = flatten(state)
    if num_states != num_tasks:
        raise ValueError(f"the state is of {num_states} tasks, the rows of {num_tasks}; expected the same of both")
    there = [place is not None for place in places]
    present = [place for place in places if place is not None]
    found: Tensor = torch.ops.mtl_kernels.update_state(
        present, there, flat, num_tasks, _int_list(groups), backend, *call
    )
    return found


def _like_a_row(
    rows: Tensor | Sequence[Row] | RowTable, found: list[Tensor], flat: Sequence[Tensor | None], num_tasks: int
) -> Tensor | list[Tensor | None]:
    """What an operator found for the parameters that a task reaches, as the functions return it."""
    if isinstance(rows, Tensor) or (isinstance(rows, RowTable) and rows.dense):
        return found[0]
    num_params = len(flat) // num_tasks
    reached = [any(flat[k * num_params + p] is not None for k in range(num_tasks)) for p in range(num_params)]
    given = iter(found)
    return [next(given) if reached[p] else None for p in range(num_params)]


def solve(gram: Tensor, call: SolverCall, *, backend: str | None = None) -> tuple[Tensor, Tensor | None]:
    """Runs one solver over a batch of Gram matrices; the functions of `mtl_kernels.solvers` are its users.

    Args:
        gram: ``[..., K, K]``, floating point; used in float64. Symmetric, but for solvers that say otherwise.
        call: the solver, its options and inputs, see `SolverCall`.
        backend: as for `gram`.

    Returns:
        weights float64 ``[..., K]`` and certificate float64 ``[..., 2]`` (gap or residual, iterations), which may be
        None where ``call`` asks for none.

    Raises:
        TypeError, ValueError: arguments that do not fit the Gram matrix or the solver; on a CPU also a finite Gram
            matrix whose norms differ so much that the weights are not finite (on a GPU, where the host does not wait
            for them, such weights are returned).
        RuntimeError: the backend asked for is not available.
    """
    _check_call(call)
    if _eager() and _plain(gram, call.active, call.rng, call.inputs, call.state):
        return run.solve(gram, call, backend)
    weights, certificate = torch.ops.mtl_kernels.solve(gram, backend, *flat_call(call))
    _advance(call)
    return weights, certificate


def _check_call(call: SolverCall) -> None:
    if not isinstance(call, SolverCall):
        raise TypeError(f"expected a SolverCall, found {call!r}; use SolverCall(solver, options, ...)")
    if call.advance_rng and call.rng is None:
        raise ValueError("advance_rng needs an rng state; pass rng=rng_state(seed, step)")


def _advance(call: SolverCall) -> None:
    if call.advance_rng and call.rng is not None:
        call.rng[1:].add_(1)


def _eager() -> bool:
    """Whether nothing wants to see the operators: no compiler, no dispatch mode, no functorch transform."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _plain(*arguments: object) -> bool:
    """Whether no argument is of a subclass of `torch.Tensor`."""
    kinds = set(map(type, arguments))
    return kinds <= _PLAIN or not any(issubclass(kind, Tensor) for kind in kinds - _PLAIN)


def _as_table(rows: Tensor | Sequence[Row] | RowTable) -> RowTable:
    return rows if isinstance(rows, RowTable) else RowTable(rows)


def _int_list(groups: Sequence[int] | None) -> list[int] | None:
    return None if groups is None else list(groups)
