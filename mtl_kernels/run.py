"""The operations on plain tensors: check the arguments, choose the backend, make room for its results, call it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, dispatch, ranges
from .angles import cosines, norms
from .backends import Backend, is_fused
from .call import ColumnCall, SolverCall, StateCall
from .definitions import solving
from .rows import Row, RowTable


def gram(table: RowTable, groups: Sequence[int] | None, backend: str | None) -> Tensor:
    """`ops.gram` of a table of plain tensors."""
    group_list, num_groups = checks.check_groups(groups, table.num_params)
    chosen = dispatch.resolve(table.device, backend)
    out = _new_gram(chosen, (num_groups, table.num_tasks, table.num_tasks), table.device)
    chosen.gram_into(table, group_list, out)
    return out[0] if groups is None else out


def _new_gram(backend: Backend, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Room for Gram matrices; fused backends write every element, the others want zeros."""
    new = torch.empty if backend.fused else torch.zeros
    return new(shape, dtype=torch.float64, device=device)


def statistics(table: RowTable, groups: Sequence[int] | None, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.statistics` of a table of plain tensors."""
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


def gram_solve(
    table: RowTable, call: SolverCall, groups: Sequence[int] | None, backend: str | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`ops.gram_solve` of a table of plain tensors."""
    group_list, num_groups = checks.check_groups(groups, table.num_params)
    lead = () if groups is None else (num_groups,)
    chosen = dispatch.resolve(table.device, backend)
    gram = _new_gram(chosen, (*lead, table.num_tasks, table.num_tasks), table.device)
    checked = checks.check_call(call, gram)
    if is_fused(chosen) and chosen.fuses(call.solver) and checked.rng is call.rng:
        return gram, *chosen.gram_solve_into(table, group_list, gram, checked)
    chosen.gram_into(table, group_list, gram.view(-1, *gram.shape[-2:]))
    definition = solving.DEFINITIONS.get(call.solver)
    if definition is not None and not definition.scale_free:
        ranges.check_range(table, gram, groups)
        return gram, *_solve(chosen, call, checked, gram)
    if not ranges.leaves_range(table, gram):
        return gram, *_solve(chosen, call, checked, gram)
    scaled = ranges.scaled_gram(table, group_list, num_groups)
    if scaled is None:
        return gram, *_solve(chosen, call, checked, gram)
    weights, found = _solve(chosen, call, checked, scaled[0].view(gram.shape))
    if found is not None and definition is not None and definition.gap_of_gram:
        gap = found.view(-1, 2)[:, 0]
        gap.div_(scaled[1]).div_(scaled[1])  # in units of the Gram matrix; the square may be zero
    return gram, weights, found


def _solve(backend: Backend, call: SolverCall, checked: SolverCall, gram: Tensor) -> tuple[Tensor, Tensor | None]:
    found = backend.solve(checked, gram)
    if call.advance_rng and call.rng is not None:
        call.rng[1:].add_(1)
    return found


def _in_place(target: Tensor | None, like: Tensor | None) -> Tensor | None:
    """The target as a kernel writes to it: laid out as the rows are; None where it is not."""
    if target is None or like is None or target.stride() != like.stride() or target.is_neg():
        return None
    return target.detach() if target.requires_grad else target


def _finish_out(targets: Sequence[Tensor | None], written: Sequence[Tensor | None]) -> None:
    """Copies what was written elsewhere, and tells autograd about memory that changed behind its back."""
    in_place = []
    for target, result in zip(targets, written, strict=True):
        if target is None or result is None:
            continue
        if target is not result and target.data_ptr() != result.data_ptr():
            target.detach().copy_(result)
        elif not target.is_inference():
            in_place.append(target)
    torch.autograd.graph.increment_version(in_place)


def _elsewhere(like: Tensor, target: Tensor, accumulate: bool) -> Tensor:
    """Room laid out like the rows for a target that is not."""
    place = torch.empty_like(like, dtype=target.dtype)
    return place.copy_(target.detach()) if accumulate else place


def flag_non_finite(written: Sequence[Tensor | None], found_inf: Tensor) -> None:
    """Sets ``found_inf`` to 1 if anything written is inf or nan."""
    for target in written:
        if target is not None:
            found_inf.masked_fill_(target.isfinite().all().logical_not(), 1.0)


def combine(
    table: RowTable,
    weights: Tensor,
    out: Tensor | Sequence[Tensor | None] | None,
    groups: Sequence[int] | None,
    backend: str | None,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor | list[Tensor | None]:
    """`ops.combine` of a table of plain tensors; ``accumulate`` with ``out`` alone."""
    chosen = dispatch.resolve(table.device, backend)
    weights, group_list = checks.check_weights(table, weights, groups)
    scale, found_inf = checks.check_epilogue(table, scale, found_inf)
    targets, written = _outputs(table, out, accumulate)
    if is_fused(chosen):
        chosen.combine_into(table, weights, group_list, written, accumulate, scale, found_inf)
    else:
        chosen.combine_into(table, weights if scale is None else weights * scale, group_list, written, accumulate)
        if found_inf is not None:
            flag_non_finite(written, found_inf)
    return _results(table, out, targets, written)


def reduce_columns(
    table: RowTable, call: ColumnCall, out: Tensor | Sequence[Tensor | None] | None, backend: str | None
) -> Tensor | list[Tensor | None]:
    """`ops.graddrop` and `ops.trimmed_mean` of a table of plain tensors."""
    chosen = dispatch.resolve(table.device, backend)
    checked = checks.check_columns(table, call)
    targets, written = _outputs(table, out, same_dtype=True)
    chosen.reduce_columns_into(table, checked, written)
    return _results(table, out, targets, written)


def update_state(
    given: Tensor | Sequence[Row] | RowTable,
    state: RowTable,
    table: RowTable,
    call: StateCall,
    groups: Sequence[int] | None,
    backend: str | None,
) -> Tensor:
    """`ops.update_average` and `ops.accumulate_squares` of plain tensors: the state as given, and as a table."""
    group_list, num_groups = checks.check_groups(groups, state.num_params)
    chosen = dispatch.resolve(state.device, backend)
    checked = checks.check_state(table, state, call, groups)
    if isinstance(given, RowTable):
        if given.copied:
            raise ValueError(
                "expected the state in place, found a RowTable of copies: its tensors are not dense, or of several "
                "layouts; pass the tensors themselves"
            )
        targets: Sequence[Row] = state.entries
    else:
        targets = [[row] for row in given.unbind(0)] if isinstance(given, Tensor) else given
    places = _laid_out(state, table)
    if not (table.captured or state.device.type == "meta"):
        checks.check_state_apart(table, places)
        written = [place for row in places.entries for place in row]
        checks.check_loose([target for row in targets for target in row], written, "state")
    sums = torch.zeros((num_groups, state.num_tasks), dtype=torch.float64, device=state.device)
    chosen.update_state(table, places, checked, group_list, sums)
    for target, place in zip(targets, places.entries, strict=True):
        _finish_out(target, place)
    return sums[0] if groups is None else sums


def _laid_out(state: RowTable, table: RowTable) -> RowTable:
    """The state with every tensor laid out as the rows are; what is not is copied."""
    entries = state.entries
    for p, (kept, row) in enumerate(zip(state.like, table.like, strict=True)):
        if kept is None or row is None or kept.stride() == row.stride():
            continue
        if entries is state.entries:
            entries = [list(states) for states in entries]
        for states in entries:
            if (tensor := states[p]) is not None:
                states[p] = _elsewhere(row, tensor, True)
    return state if entries is state.entries else RowTable(entries)


def _outputs(
    table: RowTable, out: Tensor | Sequence[Tensor | None] | None, accumulate: bool = False, same_dtype: bool = False
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The P targets, and where the kernels write what they are to hold: there, if it is laid out as the rows are."""
    if out is None:
        targets = [None if like is None else torch.empty_like(like) for like in table.like]
        return targets, targets
    if out is table.like and table.captured and not accumulate:  # the rows' own memory, known to fit
        return table.like, table.like
    targets = checks.check_out(table, out, same_dtype)
    written = [_in_place(target, like) for target, like in zip(targets, table.like, strict=True)]
    if not (table.captured or table.device.type == "meta"):
        checks.check_disjoint(table, written, accumulate)
        checks.check_loose(targets, written, "out")
    for p, (place, like, target) in enumerate(zip(written, table.like, targets, strict=True)):
        if place is None and like is not None and target is not None:
            written[p] = _elsewhere(like, target, accumulate)
    return targets, written


def _results(
    table: RowTable,
    out: Tensor | Sequence[Tensor | None] | None,
    targets: list[Tensor | None],
    written: Sequence[Tensor | None],
) -> Tensor | list[Tensor | None]:
    """What an operation returns that wrote to its outputs, or beside them."""
    if out is not None:
        _finish_out(targets, written)
    if table.dense:
        return out if isinstance(out, Tensor) else targets[0]  # type: ignore[return-value]
    return targets


def solve(gram: Tensor, call: SolverCall, backend: str | None) -> tuple[Tensor, Tensor | None]:
    """`ops.solve` of a plain tensor."""
    checks.check_gram(gram)
    chosen = dispatch.resolve(gram.device, backend)  # before float64, which the device may not have
    if gram.dtype is not torch.float64 or gram.requires_grad or not gram.is_contiguous():
        gram = gram.detach().to(torch.float64).contiguous()
    return _solve(chosen, call, checks.check_call(call, gram), gram)
