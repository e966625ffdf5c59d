"""The operations: public functions, their `torch.library` schemas and their fakes.

Eager calls on plain tensors go straight to the backend. Under torch.compile, dispatch modes, functorch transforms and
for tensor subclasses the same call goes through a registered operator, opaque to the compiler. Outputs never require
grad: the combination of gradients is not itself differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch
from .backends import Backend, is_fused
from .rows import Row, RowTable, check_num_tasks

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
        entry counts as zero. Sums are taken in float64; over many float32, bfloat16 or float16
            elements also in float32, at most 32 products at a time.

    Raises:
        TypeError, ValueError: rows that do not fit together (see `RowTable`), or groups that do not fit the rows.
        RuntimeError: the backend asked for is not available.
    """
    if _eager():
        rows = _as_table(rows)
        if rows.plain:
            return _gram(rows, groups, backend)
    flat, num_tasks = _flatten(rows)
    found: Tensor = torch.ops.mtl_kernels.gram(flat, num_tasks, _int_list(groups), backend)
    return found


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
    if _eager():
        rows = _as_table(rows)
        if rows.plain:
            return Statistics(*_statistics(rows, groups, backend))
    flat, num_tasks = _flatten(rows)
    return Statistics(*torch.ops.mtl_kernels.statistics(flat, num_tasks, _int_list(groups), backend))


def gram_solve(
    rows: Tensor | Sequence[Row] | RowTable,
    solver: str,
    *,
    options: Sequence[float] = (),
    groups: Sequence[int] | None = None,
    active: Tensor | None = None,
    rng: Tensor | None = None,
    advance_rng: bool = False,
    inputs: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gram` and `solve` of its result, on a GPU in a single launch: the last block of the Gram kernel runs the solver.

    Args:
        rows, groups: as for `gram`.
        solver, options, active, rng, inputs: as for `solve`.
        advance_rng: add one to the step of ``rng`` on the device, once every problem has read it.
        backend: as for `gram`.

    Returns:
        gram ``[K, K]``, weights ``[K]`` and certificate ``[2]`` (gap or residual, iterations), float64; with ``groups``
        ``[S, K, K]``, ``[S, K]`` and ``[S, 2]``.

    Raises:
        TypeError, ValueError, RuntimeError: as `gram` and `solve`.
    """
    if advance_rng and rng is None:
        raise ValueError("advance_rng needs an rng state; pass rng=rng_state(seed, step)")
    if _eager():
        rows = _as_table(rows)
        if rows.plain and _plain(active, rng, inputs):
            return _gram_solve(rows, solver, options, groups, active, rng, advance_rng, inputs, backend)
    flat, num_tasks = _flatten(rows)
    gram, weights, certificate = torch.ops.mtl_kernels.gram_solve(
        flat, num_tasks, _int_list(groups), solver, list(options), active, rng, inputs, backend
    )
    if advance_rng and rng is not None:
        rng[1:].add_(1)
    return gram, weights, certificate


def norms(gram: Tensor) -> Tensor:
    """The length of every row, n_k = sqrt(G_kk): ``[..., K]`` from ``[..., K, K]``."""
    checks.check_gram(gram)
    return gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()


def cosines(gram: Tensor) -> Tensor:
    """The cosine of every pair of rows, G_ij / (n_i n_j), in [-1, 1]: ``[..., K, K]``.

    A zero row has cosine 0 with every row, itself included; the diagonal of any other row is exactly 1.
    """
    length = norms(gram)
    unit = torch.where(length > 0, length.reciprocal(), torch.zeros_like(length))
    scaled = (gram * unit.unsqueeze(-1) * unit.unsqueeze(-2)).clamp(-1, 1).tril()
    scaled = scaled + scaled.tril(-1).mT
    one = torch.where(length == 0, torch.zeros_like(length), length / length)
    return torch.where(
        torch.eye(gram.shape[-1], dtype=torch.bool, device=gram.device),
        one.unsqueeze(-1).expand_as(scaled),
        scaled,
    )


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
    if _eager():
        rows = _as_table(rows)
        if rows.plain and _plain(weights, scale, found_inf, *(out if isinstance(out, Sequence) else (out,))):
            return _combine(rows, weights, out, groups, backend, scale, found_inf, accumulate)
    dense = isinstance(rows, Tensor) or (isinstance(rows, RowTable) and rows.dense)
    flat, num_tasks = _flatten(rows)
    if out is not None:
        targets: list[Tensor | None] = [out] if isinstance(out, Tensor) else list(out)
        present = [target for target in targets if target is not None]
        torch.ops.mtl_kernels.combine_out(
            flat, weights, num_tasks, _int_list(groups), present, backend,
            scale=scale, found_inf=found_inf, accumulate=accumulate,
        )  # fmt: skip
        return out if isinstance(out, Tensor) else targets
    if accumulate:
        raise ValueError("accumulate adds to out: pass out as well")
    combined: list[Tensor] = torch.ops.mtl_kernels.combine(
        flat, weights, num_tasks, _int_list(groups), backend, scale=scale
    )
    if found_inf is not None:
        _flag_non_finite(combined, found_inf)
    if dense:
        return combined[0]
    num_params = len(flat) // num_tasks
    reached = [any(flat[k * num_params + p] is not None for k in range(num_tasks)) for p in range(num_params)]
    given = iter(combined)
    return [next(given) if reached[p] else None for p in range(num_params)]


def solve(
    solver: str,
    gram: Tensor,
    *,
    options: Sequence[float] = (),
    active: Tensor | None = None,
    rng: Tensor | None = None,
    inputs: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs one solver over a batch of Gram matrices; the functions of `mtl_kernels.solvers` are its users.

    Args:
        solver: a name of `mtl_kernels.solvers.REFERENCE`.
        gram: ``[..., K, K]`` symmetric, floating point; used in float64.
        options: the solver's hyper-parameters, in its own order.
        active: bool ``[K]`` or ``[..., K]``; tasks that are False get weight 0 and take no part.
        rng: int64 ``[2]``, seed and step, see `mtl_kernels.rng_state`.
        inputs: per-task extra inputs ``[K]`` or ``[..., K]``.
        backend: as for `gram`.

    Returns:
        weights float64 ``[..., K]`` and certificate float64 ``[..., 2]`` (gap or residual, iterations).

    Raises:
        TypeError, ValueError: arguments that do not fit the Gram matrix or the solver.
        RuntimeError: the backend asked for is not available.
    """
    weights, certificate = _dispatch_solve(solver, gram, options, active, rng, inputs, True, backend)
    if certificate is None:
        raise RuntimeError(f"the backend returned no certificate for solver {solver!r}")
    return weights, certificate


def solve_weights(
    solver: str,
    gram: Tensor,
    *,
    options: Sequence[float] = (),
    active: Tensor | None = None,
    rng: Tensor | None = None,
    inputs: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The weights of `solve`, for solvers in closed form, whose certificate says nothing."""
    return _dispatch_solve(solver, gram, options, active, rng, inputs, False, backend)[0]


def _dispatch_solve(
    solver: str,
    gram: Tensor,
    options: Sequence[float],
    active: Tensor | None,
    rng: Tensor | None,
    inputs: Tensor | None,
    certified: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    if _eager() and _plain(gram, active, rng, inputs):
        return _solve(solver, gram, options, active, rng, inputs, certified, backend)
    weights, certificate = torch.ops.mtl_kernels.solve(solver, gram, list(options), active, rng, inputs, backend)
    return weights, certificate


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


def _flatten(rows: Tensor | Sequence[Row] | RowTable) -> tuple[list[Tensor | None], int]:
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


def _unflatten(flat: Sequence[Tensor | None], num_tasks: int) -> RowTable:
    num_params = len(flat) // num_tasks
    return RowTable([flat[k * num_params : (k + 1) * num_params] for k in range(num_tasks)])


def _int_list(groups: Sequence[int] | None) -> list[int] | None:
    return None if groups is None else list(groups)


def _gram(table: RowTable, groups: Sequence[int] | None, backend: str | None) -> Tensor:
    group_list, num_groups = checks.check_groups(groups, table.num_params)
    chosen = dispatch.resolve(table.device, backend)
    out = _new_gram(chosen, (num_groups, table.num_tasks, table.num_tasks), table.device)
    chosen.gram_into(table, group_list, out)
    return out[0] if groups is None else out


def _new_gram(backend: Backend, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Room for Gram matrices; fused backends write every element, the others want zeros."""
    new = torch.empty if backend.fused else torch.zeros
    return new(shape, dtype=torch.float64, device=device)


def _statistics(table: RowTable, groups: Sequence[int] | None, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    group_list, num_groups = checks.check_groups(groups, table.num_params)
    shape = (num_groups, table.num_tasks, table.num_tasks)
    chosen = dispatch.resolve(table.device, backend)
    out = _new_gram(chosen, shape, table.device)
    if is_fused(chosen):
        found = (out, out.new_empty(shape[:2]), torch.empty_like(out))
        chosen.statistics_into(table, group_list, *found)
    else:
        chosen.gram_into(table, group_list, out)
        found = (out, norms(out), cosines(out))
    return found if groups is not None else (found[0][0], found[1][0], found[2][0])


def _gram_solve(
    table: RowTable,
    solver: str,
    options: Sequence[float],
    groups: Sequence[int] | None,
    active: Tensor | None,
    rng: Tensor | None,
    advance_rng: bool,
    inputs: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    group_list, num_groups = checks.check_groups(groups, table.num_params)
    lead = () if groups is None else (num_groups,)
    chosen = dispatch.resolve(table.device, backend)
    gram = _new_gram(chosen, (*lead, table.num_tasks, table.num_tasks), table.device)
    active, state, inputs = _solver_arguments(gram, active, rng, inputs)
    batch = gram if groups is not None else gram.unsqueeze(0)
    if is_fused(chosen) and (rng is None or state is rng):
        weights, certificate = chosen.gram_solve_into(
            table, group_list, batch, solver, active, state, advance_rng, options, inputs
        )
        return gram, weights.view(gram.shape[:-1]), certificate.view((*lead, 2))
    chosen.gram_into(table, group_list, batch)
    weights, certified = chosen.solve(solver, gram, active, state, options, inputs, True)
    if certified is None:
        raise RuntimeError(f"the backend returned no certificate for solver {solver!r}")
    if advance_rng and rng is not None:
        rng[1:].add_(1)
    return gram, weights, certified


def _laid_out_alike(target: Tensor, like: Tensor) -> bool:
    """Whether what belongs in the memory of ``like`` can be written to that of ``target``."""
    return target.stride() == like.stride() and not target.is_neg()


def _finish_out(targets: Sequence[Tensor | None], written: Sequence[Tensor | None]) -> None:
    """Copies what was written elsewhere, and tells autograd about memory that changed behind its back."""
    for target, result in zip(targets, written, strict=True):
        if target is None or result is None:
            continue
        if not _laid_out_alike(target, result):
            target.detach().copy_(result)
        elif not target.is_inference():
            torch.autograd.graph.increment_version(target)


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _elsewhere(like: Tensor, target: Tensor, accumulate: bool) -> Tensor:
    """Room laid out like the rows for a target that is not."""
    place = torch.empty_like(like, dtype=target.dtype)
    return place.copy_(target.detach()) if accumulate else place


def _flag_non_finite(written: Sequence[Tensor | None], found_inf: Tensor) -> None:
    for target in written:
        if target is not None:
            found_inf.masked_fill_(target.isfinite().all().logical_not(), 1.0)


def _combine(
    table: RowTable,
    weights: Tensor,
    out: Tensor | Sequence[Tensor | None] | None,
    groups: Sequence[int] | None,
    backend: str | None,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor | list[Tensor | None]:
    chosen = dispatch.resolve(table.device, backend)
    weights, group_list = checks.check_weights(table, weights, groups)
    scale, found_inf = checks.check_epilogue(table, scale, found_inf)
    if out is None:
        if accumulate:
            raise ValueError("accumulate adds to out: pass out as well")
        targets = [None if like is None else torch.empty_like(like) for like in table.like]
        written = targets
    else:
        targets = checks.check_out(table, out)
        written = [
            target.detach() if target is not None and like is not None and _laid_out_alike(target, like) else None
            for target, like in zip(targets, table.like, strict=True)
        ]
        if not (table.disjoint or table.device.type == "meta"):
            checks.check_disjoint(table, written, accumulate)
        written = [
            _elsewhere(like, target, accumulate) if like is not None and target is not None and place is None else place
            for place, like, target in zip(written, table.like, targets, strict=True)
        ]
    if is_fused(chosen):
        chosen.combine_into(table, weights, group_list, written, accumulate, scale, found_inf)
    else:
        chosen.combine_into(table, weights if scale is None else weights * scale, group_list, written, accumulate)
        if found_inf is not None:
            _flag_non_finite(written, found_inf)
    if out is not None:
        _finish_out(targets, written)
    if table.dense:
        return out if isinstance(out, Tensor) else targets[0]  # type: ignore[return-value]
    return targets


def _solver_arguments(
    gram: Tensor, active: Tensor | None, rng: Tensor | None, inputs: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if active is not None:
        active = checks.per_task(active, gram, "active", torch.bool)
    if inputs is not None:
        inputs = checks.per_task(inputs, gram, "inputs", torch.float64)
    if rng is not None:
        rng = checks.check_rng(rng, gram)
    return active, rng, inputs


def _solve(
    solver: str,
    gram: Tensor,
    options: Sequence[float],
    active: Tensor | None,
    rng: Tensor | None,
    inputs: Tensor | None,
    certified: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    checks.check_gram(gram)
    chosen = dispatch.resolve(gram.device, backend)  # before float64, which the device may not have
    if gram.dtype is not torch.float64 or gram.requires_grad or not gram.is_contiguous():
        gram = gram.detach().to(torch.float64).contiguous()
    active, rng, inputs = _solver_arguments(gram, active, rng, inputs)
    return chosen.solve(solver, gram, active, rng, options, inputs, certified)


_library = torch.library.Library("mtl_kernels", "DEF")
_library.define("gram(Tensor?[] rows, int num_tasks, int[]? groups, str? backend) -> Tensor")
_library.define("statistics(Tensor?[] rows, int num_tasks, int[]? groups, str? backend) -> (Tensor, Tensor, Tensor)")
_library.define(
    "gram_solve(Tensor?[] rows, int num_tasks, int[]? groups, str solver, float[] options, Tensor? active, Tensor? rng,"
    " Tensor? inputs, str? backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "combine(Tensor?[] rows, Tensor weights, int num_tasks, int[]? groups, str? backend, *, Tensor? scale=None)"
    " -> Tensor[]"
)
_library.define(
    "combine_out(Tensor?[] rows, Tensor weights, int num_tasks, int[]? groups, Tensor(a!)[] out, str? backend, *,"
    " Tensor? scale=None, Tensor(b!)? found_inf=None, bool accumulate=False) -> ()"
)
_library.define(
    "solve(str solver, Tensor gram, float[] options, Tensor? active, Tensor? rng, Tensor? inputs, str? backend)"
    " -> (Tensor, Tensor)"
)


def _gram_op(rows, num_tasks, groups, backend):  # type: ignore[no-untyped-def]
    return _gram(_unflatten(rows, num_tasks), groups, backend)


def _statistics_op(rows, num_tasks, groups, backend):  # type: ignore[no-untyped-def]
    return _statistics(_unflatten(rows, num_tasks), groups, backend)


def _gram_solve_op(rows, num_tasks, groups, solver, options, active, rng, inputs, backend):  # type: ignore[no-untyped-def]
    return _gram_solve(_unflatten(rows, num_tasks), solver, options, groups, active, rng, False, inputs, backend)


def _combine_op(rows, weights, num_tasks, groups, backend, scale=None):  # type: ignore[no-untyped-def]
    found = _combine(_unflatten(rows, num_tasks), weights, None, groups, backend, scale)
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
    table = _unflatten(rows, num_tasks)
    _combine(table, weights, _spread(table, out), groups, backend, scale, found_inf, accumulate)


def _solve_op(solver, gram, options, active, rng, inputs, backend):  # type: ignore[no-untyped-def]
    return _solve(solver, gram, options, active, rng, inputs, True, backend)


def _gram_fake(rows, num_tasks, groups, backend):  # type: ignore[no-untyped-def]
    table = _unflatten(rows, num_tasks)
    _, num_groups = checks.check_groups(groups, table.num_params)
    shape = (num_tasks, num_tasks) if groups is None else (num_groups, num_tasks, num_tasks)
    return torch.empty(shape, dtype=torch.float64, device=table.device)


def _statistics_fake(rows, num_tasks, groups, backend):  # type: ignore[no-untyped-def]
    gram = _gram_fake(rows, num_tasks, groups, backend)  # type: ignore[no-untyped-call]
    return gram, gram.new_empty(gram.shape[:-1]), torch.empty_like(gram)


def _gram_solve_fake(rows, num_tasks, groups, solver, options, active, rng, inputs, backend):  # type: ignore[no-untyped-def]
    gram = _gram_fake(rows, num_tasks, groups, backend)  # type: ignore[no-untyped-call]
    return gram, gram.new_empty(gram.shape[:-1]), gram.new_empty((*gram.shape[:-2], 2))


def _combine_fake(rows, weights, num_tasks, groups, backend, scale=None):  # type: ignore[no-untyped-def]
    table = _unflatten(rows, num_tasks)
    checks.check_weights(table, weights, groups)
    checks.check_epilogue(table, scale, None)
    return [torch.empty_like(like) for like in table.like if like is not None]


def _combine_out_fake(  # type: ignore[no-untyped-def]
    rows, weights, num_tasks, groups, out, backend, scale=None, found_inf=None, accumulate=False
):
    table = _unflatten(rows, num_tasks)
    checks.check_weights(table, weights, groups)
    checks.check_epilogue(table, scale, found_inf)
    checks.check_out(table, _spread(table, out))


def _solve_fake(solver, gram, options, active, rng, inputs, backend):  # type: ignore[no-untyped-def]
    checks.check_gram(gram)
    return gram.new_empty(gram.shape[:-1], dtype=torch.float64), gram.new_empty(
        (*gram.shape[:-2], 2), dtype=torch.float64
    )


def _below_autograd(op):  # type: ignore[no-untyped-def]
    """The operator without a derivative: its outputs never require grad."""

    def run(*args, **kwargs):  # type: ignore[no-untyped-def]
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    return run


for _name, _impl, _fake in (
    ("gram", _gram_op, _gram_fake),
    ("statistics", _statistics_op, _statistics_fake),
    ("gram_solve", _gram_solve_op, _gram_solve_fake),
    ("combine", _combine_op, _combine_fake),
    ("combine_out", _combine_out_op, _combine_out_fake),
    ("solve", _solve_op, _solve_fake),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    _library.impl(_name, _below_autograd(getattr(torch.ops.mtl_kernels, _name).default), "Autograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"mtl_kernels::{_name}", _fake, lib=_library)
