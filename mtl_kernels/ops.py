"""The operations: public functions, their `torch.library` schemas and their fakes.

Eager calls on plain tensors go straight to the backend. Under torch.compile, dispatch modes, functorch transforms and
for tensor subclasses the same call goes through a registered operator, opaque to the compiler. Outputs never require
grad: the combination of gradients is not itself differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, dispatch
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
    backend: str | None = None,
) -> Tensor | list[Tensor | None]:
    """The weighted sum of the rows, d = J^T w, summed in float64 and rounded once to the dtype of the rows.

    Args:
        rows: as for `gram`.
        weights: ``[K]``, or ``[S, K]`` with ``groups``; any floating dtype, on the device of the rows.
        out: where to write, shaped like one row (a tensor ``[N]`` for dense rows, else P tensors, ``None`` where no
            task reaches the parameter). It may be any one of the rows itself, but may not overlap one in part.
        groups: as for `gram`: parameter p takes the weights of group ``groups[p]``.
        backend: as for `gram`.

    Returns:
        ``out`` or new tensors of the rows' dtype: ``[N]`` for dense rows, else a list of P tensors with ``None``
        where no task reaches the parameter.

    Raises:
        TypeError, ValueError: rows, weights, groups or ``out`` that do not fit together.
        RuntimeError: the backend asked for is not available.
    """
    if _eager():
        rows = _as_table(rows)
        if rows.plain and _plain(weights, *(out if isinstance(out, Sequence) else (out,))):
            return _combine(rows, weights, out, groups, backend)
    dense = isinstance(rows, Tensor) or (isinstance(rows, RowTable) and rows.dense)
    flat, num_tasks = _flatten(rows)
    if out is not None:
        targets: list[Tensor | None] = [out] if isinstance(out, Tensor) else list(out)
        present = [target for target in targets if target is not None]
        torch.ops.mtl_kernels.combine_out(flat, weights, num_tasks, _int_list(groups), present, backend)
        return out if isinstance(out, Tensor) else targets
    combined: list[Tensor] = torch.ops.mtl_kernels.combine(flat, weights, num_tasks, _int_list(groups), backend)
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
    out = torch.zeros((num_groups, table.num_tasks, table.num_tasks), dtype=torch.float64, device=table.device)
    dispatch.resolve(table.device, backend).gram_into(table, group_list, out)
    return out[0] if groups is None else out


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


def _combine(
    table: RowTable,
    weights: Tensor,
    out: Tensor | Sequence[Tensor | None] | None,
    groups: Sequence[int] | None,
    backend: str | None,
) -> Tensor | list[Tensor | None]:
    weights, group_list = checks.check_weights(table, weights, groups)
    if out is None:
        targets = [None if like is None else torch.empty_like(like) for like in table.like]
        written = targets
    else:
        targets = checks.check_out(table, out)
        written = [
            target.detach() if target is not None and like is not None and _laid_out_alike(target, like) else None
            for target, like in zip(targets, table.like, strict=True)
        ]
        if not (table.disjoint or table.device.type == "meta"):
            checks.check_disjoint(table, written)
        written = [
            torch.empty_like(like) if like is not None and place is None else place
            for place, like in zip(written, table.like, strict=True)
        ]
    dispatch.resolve(table.device, backend).combine_into(table, weights, group_list, written)
    if out is not None:
        _finish_out(targets, written)
    if table.dense:
        return out if isinstance(out, Tensor) else targets[0]  # type: ignore[return-value]
    return targets


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
    if gram.dtype is not torch.float64 or gram.requires_grad or not gram.is_contiguous():
        gram = gram.detach().to(torch.float64).contiguous()
    if active is not None:
        active = checks.per_task(active, gram, "active", torch.bool)
    if inputs is not None:
        inputs = checks.per_task(inputs, gram, "inputs", torch.float64)
    if rng is not None:
        rng = checks.check_rng(rng, gram)
    return dispatch.resolve(gram.device, backend).solve(solver, gram, active, rng, options, inputs, certified)


_library = torch.library.Library("mtl_kernels", "DEF")
_library.define("gram(Tensor?[] rows, int num_tasks, int[]? groups, str? backend) -> Tensor")
_library.define("combine(Tensor?[] rows, Tensor weights, int num_tasks, int[]? groups, str? backend) -> Tensor[]")
_library.define(
    "combine_out(Tensor?[] rows, Tensor weights, int num_tasks, int[]? groups, Tensor(a!)[] out, str? backend) -> ()"
)
_library.define(
    "solve(str solver, Tensor gram, float[] options, Tensor? active, Tensor? rng, Tensor? inputs, str? backend)"
    " -> (Tensor, Tensor)"
)


def _gram_op(rows, num_tasks, groups, backend):  # type: ignore[no-untyped-def]
    return _gram(_unflatten(rows, num_tasks), groups, backend)


def _combine_op(rows, weights, num_tasks, groups, backend):  # type: ignore[no-untyped-def]
    found = _combine(_unflatten(rows, num_tasks), weights, None, groups, backend)
    return [tensor for tensor in found if tensor is not None]


def _spread(table: RowTable, out: Sequence[Tensor]) -> list[Tensor | None]:
    """``out`` holds the reached parameters only: put each at its place among all of them."""
    reached = sum(like is not None for like in table.like)
    if len(out) != reached:
        raise ValueError(f"out has {len(out)} tensors for {reached} parameters that a task reaches")
    given = iter(out)
    return [None if like is None else next(given) for like in table.like]


def _combine_out_op(rows, weights, num_tasks, groups, out, backend):  # type: ignore[no-untyped-def]
    table = _unflatten(rows, num_tasks)
    _combine(table, weights, _spread(table, out), groups, backend)


def _solve_op(solver, gram, options, active, rng, inputs, backend):  # type: ignore[no-untyped-def]
    return _solve(solver, gram, options, active, rng, inputs, True, backend)


def _gram_fake(rows, num_tasks, groups, backend):  # type: ignore[no-untyped-def]
    table = _unflatten(rows, num_tasks)
    _, num_groups = checks.check_groups(groups, table.num_params)
    shape = (num_tasks, num_tasks) if groups is None else (num_groups, num_tasks, num_tasks)
    return torch.empty(shape, dtype=torch.float64, device=table.device)


def _combine_fake(rows, weights, num_tasks, groups, backend):  # type: ignore[no-untyped-def]
    table = _unflatten(rows, num_tasks)
    checks.check_weights(table, weights, groups)
    return [torch.empty_like(like) for like in table.like if like is not None]


def _combine_out_fake(rows, weights, num_tasks, groups, out, backend):  # type: ignore[no-untyped-def]
    table = _unflatten(rows, num_tasks)
    checks.check_weights(table, weights, groups)
    checks.check_out(table, _spread(table, out))


def _solve_fake(solver, gram, options, active, rng, inputs, backend):  # type: ignore[no-untyped-def]
    checks.check_gram(gram)
    return gram.new_empty(gram.shape[:-1], dtype=torch.float64), gram.new_empty(
        (*gram.shape[:-2], 2), dtype=torch.float64
    )


def _below_autograd(op):  # type: ignore[no-untyped-def]
    """The operator without a derivative: its outputs never require grad."""

    def run(*args):  # type: ignore[no-untyped-def]
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return run


for _name, _impl, _fake in (
    ("gram", _gram_op, _gram_fake),
    ("combine", _combine_op, _combine_fake),
    ("combine_out", _combine_out_op, _combine_out_fake),
    ("solve", _solve_op, _solve_fake),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    _library.impl(_name, _below_autograd(getattr(torch.ops.mtl_kernels, _name).default), "Autograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"mtl_kernels::{_name}", _fake, lib=_library)
