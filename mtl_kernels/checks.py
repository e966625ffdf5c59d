"""Whether the arguments of an operation fit together; errors say what was expected, what was found, what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .call import COLUMN_OPERATIONS, STATE_OPERATIONS, ColumnCall, SolverCall, StateCall
from .rows import DTYPE_CODES, ITEMSIZES, RowTable, check_num_tasks

MAX_GROUPS = 1 << 12
"""Groups may be numbered up to here, or up to the number of parameters if there are more."""


def check_groups(groups: Sequence[int] | None, num_params: int) -> tuple[list[int], int]:
    """The group of every parameter, and S."""
    if groups is None:
        return [0] * num_params, 1
    if not isinstance(groups, Sequence) or not all(isinstance(group, int) for group in groups):
        raise TypeError(f"expected groups as a sequence of integers, one per parameter, found {groups!r}")
    if len(groups) != num_params:
        raise ValueError(f"groups has {len(groups)} entries for {num_params} parameters; expected one each")
    highest = max(num_params, MAX_GROUPS) - 1
    for group in groups:
        if not 0 <= group <= highest:
            raise ValueError(f"groups has the entry {group}; expected numbers from 0 to {highest}")
    return list(groups), max(groups, default=0) + 1


def check_gram(gram: Tensor) -> None:
    """Raise unless ``gram`` is a dense floating-point tensor ``[..., K, K]`` with 1 <= K <= MAX_TASKS."""
    if not isinstance(gram, Tensor):
        raise TypeError(f"expected a Gram matrix as a tensor [..., K, K], found {type(gram).__name__}")
    shape = gram.shape
    if len(shape) < 2 or shape[-1] != shape[-2]:
        raise ValueError(f"expected a Gram matrix of shape [..., K, K], found {list(shape)}: pass gram(rows)")
    check_num_tasks(shape[-1])
    check_strided(gram, "the Gram matrix")
    if not gram.is_floating_point():
        raise TypeError(f"expected a Gram matrix of floating dtype, found {gram.dtype}: pass gram(rows)")


def check_weights(
    table: RowTable, weights: Tensor | None, groups: Sequence[int] | None, name: str = "weights"
) -> tuple[Tensor, list[int]]:
    """Weights, or what else there is one of per row, as contiguous float64 ``[S, K]``, and every parameter's group."""
    group_list, num_groups = check_groups(groups, table.num_params)
    if not isinstance(weights, Tensor):
        raise TypeError(f"expected {name} as a tensor, found {type(weights).__name__}")
    check_strided(weights, name)
    if not weights.is_floating_point():
        raise TypeError(f"expected {name} of floating dtype, found {weights.dtype}")
    expected = (table.num_tasks,) if groups is None else (num_groups, table.num_tasks)
    if weights.shape != expected:
        shapes = f"{list(expected)}, found {list(weights.shape)}"
        raise ValueError(f"expected {name} of shape {shapes}: one number per row")
    if weights.device != table.device:
        raise ValueError(f"found {name} on {weights.device}, the rows on {table.device}; move them to one device")
    if weights.dtype is not torch.float64 or weights.requires_grad or not weights.is_contiguous():
        weights = weights.detach().to(torch.float64).contiguous()
    return weights.unsqueeze(0) if groups is None else weights, group_list


def check_out(table: RowTable, out: Tensor | Sequence[Tensor | None], same_dtype: bool = False) -> list[Tensor | None]:
    """The P targets of ``out``, each fit for what the rows hold of its parameter; None where no task reaches it."""
    targets: list[Tensor | None]
    if table.dense:
        if not isinstance(out, Tensor):
            raise TypeError(f"expected out as a tensor [N] for dense rows, found {type(out).__name__}")
        targets = [out]
    else:
        if isinstance(out, Tensor) or not isinstance(out, Sequence):
            raise TypeError(f"expected out as a sequence of {table.num_params} tensors, found {type(out).__name__}")
        targets = list(out)
    if len(targets) != table.num_params:
        raise ValueError(f"out has {len(targets)} tensors for {table.num_params} parameters; expected one each")
    for p, (like, target) in enumerate(zip(table.like, targets, strict=True)):
        if like is None and target is None:
            continue
        if like is None or target is None:
            raise ValueError(
                f"out[{p}] is {'missing' if target is None else 'given'} where "
                f"{'a' if target is None else 'no'} task reaches the parameter"
            )
        if not isinstance(target, Tensor):
            raise TypeError(f"out[{p}] is a {type(target).__name__}; expected a tensor")
        check_strided(target, f"out[{p}]")
        if target.shape != like.shape or target.device != like.device or target.dtype not in DTYPE_CODES:
            raise ValueError(
                f"out[{p}] is {list(target.shape)} {target.dtype} on {target.device}; expected {list(like.shape)} "
                f"on {like.device}, as in the rows, of dtype {', '.join(map(str, DTYPE_CODES))}"
            )
        if same_dtype and target.dtype is not like.dtype:
            raise TypeError(f"out[{p}] has dtype {target.dtype}, the rows {like.dtype}; expected the same")
    return targets


def check_strided(tensor: Tensor, name: str) -> None:
    """Raise unless the tensor is dense; ``name`` says in the error which one it is."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; expected a dense tensor: call .to_dense()")


def check_epilogue(
    table: RowTable, scale: Tensor | None, found_inf: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The scale as float64 ``[1]``, and found_inf as it is."""
    if scale is None and found_inf is None:
        return None, None
    for name, tensor in (("scale", scale), ("found_inf", found_inf)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected {name} as a tensor with one element, found {type(tensor).__name__}")
        if tensor.numel() != 1 or tensor.device != table.device:
            raise ValueError(
                f"expected {name} with one element on {table.device}, found {list(tensor.shape)} on {tensor.device}"
            )
    if found_inf is not None and found_inf.dtype is not torch.float32:
        raise TypeError(f"expected found_inf of dtype float32, found {found_inf.dtype}")
    if scale is None:
        return None, found_inf
    if not scale.is_floating_point():
        raise TypeError(f"expected scale of floating dtype, found {scale.dtype}")
    return scale.detach().to(torch.float64).reshape(1), found_inf


def check_disjoint(table: RowTable, targets: Sequence[Tensor | None], accumulate: bool = False) -> None:
    """Raises where a target shares memory with another, or with a row that is not exactly the target itself.

    With ``accumulate``, or where target and row differ in dtype, a target may not be a row either.
    """
    if table.dense and targets[0] is not None and _apart(table, targets[0]):
        return
    spans: list[tuple[int, int, bool]] = []
    for p, target in enumerate(targets):
        if target is None or target.numel() == 0:
            continue
        size = target.numel() * target.element_size()
        spans.append((target.data_ptr(), size, True))
        like = table.like[p]
        same = not accumulate and like is not None and like.dtype is target.dtype
        row_size = size if like is None else like.numel() * like.element_size()
        for address in table.pointers[p :: table.num_params]:
            if address != 0 and not (same and address == target.data_ptr()):
                spans.append((address, row_size, False))
    _refuse_overlap(spans, "out", "memory of its own, or exactly the memory of one of the rows of the same parameter")


def check_state_apart(table: RowTable, state: RowTable) -> None:
    """Raises where a tensor of a state shares memory with another or with a row."""
    spans = []
    for rows, is_target in ((table, False), (state, True)):
        sizes = [n * ITEMSIZES[code] for n, code in zip(rows.numels, rows.codes, strict=True)]
        for at, address in enumerate(rows.pointers):
            size = sizes[at % rows.num_params]
            if address != 0 and size != 0:
                spans.append((address, size, is_target))
    _refuse_overlap(spans, "state", "memory of its own for every task")


def check_loose(targets: Sequence[Tensor | None], written: Sequence[Tensor | None], name: str) -> None:
    """Raises where a target whose result is copied there in the end shares memory with itself or another target.

    It may be a row, which is read before.
    """
    loose = {
        id(target)
        for target, place in zip(targets, written, strict=True)
        if target is not None and (place is None or place.data_ptr() != target.data_ptr())
    }
    for near in _neighbours([target for target in targets if target is not None and target.numel() > 0]):
        if all(id(target) not in loose for target in near) or (len(near) == 1 and _elements_apart(near[0])):
            continue
        unit = min(target.element_size() for target in near)
        places = torch.cat([_addresses(target, unit) for target in near])
        if len(places.unique()) < len(places):
            raise ValueError(
                f"{name} overlaps itself or other memory that is written here; expected memory of its own for every "
                "tensor"
            )


def _neighbours(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors whose spans of memory meet, together; nearly always each of them alone."""
    found: list[list[Tensor]] = []
    reach = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.data_ptr()):
        begin, end = _span(tensor)
        if begin >= reach:
            found.append([])
        found[-1].append(tensor)
        reach = max(reach, end)
    return found


def _elements_apart(tensor: Tensor) -> bool:
    """Whether strides alone tell that no two elements share memory."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += (size - 1) * stride
    return True


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor, and the one behind its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _addresses(tensor: Tensor, unit: int) -> Tensor:
    """Of all elements, in pieces of ``unit`` bytes."""
    found = torch.arange(0, tensor.element_size(), unit) + tensor.data_ptr()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = (found.unsqueeze(1) + torch.arange(size) * (stride * tensor.element_size())).flatten()
    return found


def _refuse_overlap(spans: list[tuple[int, int, bool]], name: str, expected: str) -> None:
    """Raises where of spans (address, bytes, is written to) one that is written to overlaps another."""
    row_end = target_end = 0
    for begin, size, is_target in sorted(spans):
        if begin < target_end or (is_target and begin < row_end):
            raise ValueError(f"{name} overlaps other memory that is read or written here; expected {expected}")
        if is_target:
            target_end = max(target_end, begin + size)
        else:
            row_end = max(row_end, begin + size)


def check_columns(table: RowTable, call: ColumnCall) -> ColumnCall:
    """The call with tensors as the backends take them, checked against the rows."""
    if call.operation == "trimmed_mean":
        if isinstance(call.trim, bool) or not isinstance(call.trim, int):
            raise TypeError(f"expected trim as an integer, found {type(call.trim).__name__}")
        if not 0 <= call.trim <= (table.num_tasks - 1) // 2:
            raise ValueError(
                f"trim = {call.trim} of {table.num_tasks} rows leaves nothing to average; expected at least 0 and at "
                f"least 2 trim + 1 rows, here trim <= {(table.num_tasks - 1) // 2}"
            )
        return call
    if call.operation not in COLUMN_OPERATIONS:
        raise ValueError(f"unknown operation {call.operation!r}; expected one of {', '.join(COLUMN_OPERATIONS)}")
    leak = None if call.leak is None else check_weights(table, call.leak, None, "leak")[0][0]
    return call._replace(leak=leak, rng=check_rng(call.rng, table.device, "the rows"))


def check_state(table: RowTable, state: RowTable, call: StateCall, groups: Sequence[int] | None) -> StateCall:
    """The call as the backends take it, checked together with the state against the rows."""
    if (state.num_tasks, state.num_params) != (table.num_tasks, table.num_params):
        raise ValueError(
            f"the state is of {state.num_tasks} tasks and {state.num_params} parameters, the rows of {table.num_tasks} "
            f"and {table.num_params}; expected the same of both"
        )
    for p, (like, kept) in enumerate(zip(table.like, state.like, strict=True)):
        if like is None or kept is None:
            if like is not None:
                raise ValueError(f"the state of parameter {p} is missing; expected a tensor {list(like.shape)}")
            continue
        if kept.shape != like.shape or kept.device != like.device:
            raise ValueError(
                f"the state of parameter {p} is {list(kept.shape)} on {kept.device}; expected {list(like.shape)} on "
                f"{like.device}, as in the rows"
            )
    for k, (row, states) in enumerate(zip(table.entries, state.entries, strict=True)):
        for p, (tensor, kept) in enumerate(zip(row, states, strict=True)):
            if kept is None and tensor is not None:
                raise ValueError(f"the state of task {k}, parameter {p} is missing where the row has an entry")
    if call.operation not in STATE_OPERATIONS:
        raise ValueError(f"unknown operation {call.operation!r}; expected one of {', '.join(STATE_OPERATIONS)}")
    if not (isinstance(call.epsilon, (int, float)) and 0 <= call.epsilon < float("inf")):
        raise ValueError(f"expected eps as a finite number of at least 0, found {call.epsilon!r}")
    gain, _ = check_weights(state, call.gain, groups, "gain")
    keep = check_weights(state, call.keep, groups, "keep")[0] if call.operation == "average" else None
    return call._replace(gain=gain, keep=keep)


def check_call(call: SolverCall, gram: Tensor) -> SolverCall:
    """The call with tensors as the backends take them, checked against the Gram matrix."""
    active, inputs = call.active, call.inputs
    if call.state is not None:
        check_solver_state(call.state, gram)
    rng = None if call.rng is None else check_rng(call.rng, gram.device, "the Gram matrix")
    if active is None and inputs is None and rng is call.rng:
        return call
    return call._replace(
        active=None if active is None else per_task(active, gram, "active", torch.bool),
        rng=rng,
        inputs=None if inputs is None else per_task(inputs, gram, "inputs", torch.float64),
    )


def _apart(table: RowTable, target: Tensor) -> bool:
    """Whether the target lies before or behind all rows of a matrix."""
    begin, rows = target.data_ptr(), table.pointers
    end = begin + target.numel() * target.element_size()
    return end <= rows[0] or begin >= rows[-1] + table.numels[0] * ITEMSIZES[table.codes[0]]


def check_rng(rng: Tensor | None, device: torch.device, beside: str) -> Tensor:
    """The state as contiguous int64 ``[2]`` on the device of what is named ``beside`` it."""
    if not isinstance(rng, Tensor) or rng.dtype is not torch.int64:
        found = rng.dtype if isinstance(rng, Tensor) else type(rng).__name__
        raise TypeError(f"expected rng as an int64 tensor, found {found}; use rng_state(seed, step)")
    if rng.shape != (2,):
        raise ValueError(f"expected rng of shape [2], found {list(rng.shape)}; use rng_state(seed, step)")
    if rng.device != device:
        raise ValueError(f"rng is on {rng.device}, {beside} on {device}; use rng_state(..., device=)")
    return rng.contiguous()


def check_solver_state(state: Tensor, gram: Tensor) -> None:
    """Raise unless ``state`` is contiguous float64 ``[..., n]`` on the device of the Gram matrix: it is written to."""
    if not isinstance(state, Tensor) or state.dtype is not torch.float64:
        found = state.dtype if isinstance(state, Tensor) else type(state).__name__
        raise TypeError(f"expected state as a float64 tensor, found {found}")
    if state.dim() != gram.dim() - 1 or state.shape[:-1] != gram.shape[:-2]:
        raise ValueError(f"expected state of shape {[*gram.shape[:-2], 'n']}, found {list(state.shape)}")
    if state.device != gram.device:
        raise ValueError(f"state is on {state.device}, the Gram matrix on {gram.device}; move it")
    if not state.is_contiguous():
        raise ValueError("expected state contiguous, because it is changed in place; pass state.contiguous()")


def per_task(values: Tensor, gram: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """A per-task argument as contiguous ``[K]`` or ``[..., K]``, checked against the Gram matrix."""
    if not isinstance(values, Tensor) or (values.dtype is torch.bool) != (dtype is torch.bool):
        found = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"expected {name} as a tensor of {dtype}, found {found}")
    check_strided(values, name)
    if values.device != gram.device:
        raise ValueError(f"{name} is on {values.device}, the Gram matrix on {gram.device}; move it")
    num_tasks = gram.shape[-1]
    if values.shape == gram.shape[:-1] or values.shape == (num_tasks,):
        return values.detach().to(dtype).contiguous()
    raise ValueError(f"expected {name} of shape [{num_tasks}] or {list(gram.shape[:-1])}, found {list(values.shape)}")


def rtol_option(rtol: object) -> float:
    """``rtol`` as solvers take it, 0 for None. Raise ValueError unless it is None or in (0, 1)."""
    if rtol is None:
        return 0.0
    if isinstance(rtol, bool) or not isinstance(rtol, int | float) or not 0 < rtol < 1:
        raise ValueError(f"expected rtol as a number in (0, 1) or None, found {rtol!r}")
    return float(rtol)


def preferences(pref: Tensor | None, gram: Tensor) -> Tensor | None:
    """``pref`` as float64 ``[K]`` or ``[..., K]``, checked against the Gram matrix; None as it is."""
    if pref is None:
        return None
    check_gram(gram)
    return per_task(pref, gram, "pref", torch.float64)
