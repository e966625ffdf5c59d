"""Whether the arguments of an operation fit together; errors say what was expected, what was found, what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .call import SolverCall
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


def check_weights(table: RowTable, weights: Tensor, groups: Sequence[int] | None) -> tuple[Tensor, list[int]]:
    """Weights as contiguous float64 ``[S, K]``, and the group of every parameter."""
    group_list, num_groups = check_groups(groups, table.num_params)
    if not isinstance(weights, Tensor):
        raise TypeError(f"expected weights as a tensor, found {type(weights).__name__}")
    check_strided(weights, "weights")
    if not weights.is_floating_point():
        raise TypeError(f"expected weights of floating dtype, found {weights.dtype}")
    expected = (table.num_tasks,) if groups is None else (num_groups, table.num_tasks)
    if weights.shape != expected:
        shapes = f"{list(expected)}, found {list(weights.shape)}"
        raise ValueError(f"expected weights of shape {shapes}: one weight per row")
    if weights.device != table.device:
        raise ValueError(f"weights are on {weights.device}, the rows on {table.device}; move them to one device")
    if weights.dtype is not torch.float64 or weights.requires_grad or not weights.is_contiguous():
        weights = weights.detach().to(torch.float64).contiguous()
    return weights.unsqueeze(0) if groups is None else weights, group_list


def check_out(table: RowTable, out: Tensor | Sequence[Tensor | None]) -> list[Tensor | None]:
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
    row_end = target_end = 0
    for begin, size, is_target in sorted(spans):
        if begin < target_end or (is_target and begin < row_end):
            raise ValueError(
                "out overlaps other memory that is read or written here; expected memory of its own, or exactly the "
                "memory of one of the rows of the same parameter"
            )
        if is_target:
            target_end = max(target_end, begin + size)
        else:
            row_end = max(row_end, begin + size)


def check_call(call: SolverCall, gram: Tensor) -> SolverCall:
    """The call with tensors as the backends take them, checked against the Gram matrix."""
    active, inputs = call.active, call.inputs
    rng = None if call.rng is None else check_rng(call.rng, gram)
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


def check_rng(rng: Tensor, gram: Tensor) -> Tensor:
    """The state as contiguous int64 ``[2]`` on the device of the Gram matrix."""
    if not isinstance(rng, Tensor) or rng.dtype is not torch.int64:
        found = rng.dtype if isinstance(rng, Tensor) else type(rng).__name__
        raise TypeError(f"expected rng as an int64 tensor, found {found}; use rng_state(seed, step)")
    if rng.shape != (2,):
        raise ValueError(f"expected rng of shape [2], found {list(rng.shape)}; use rng_state(seed, step)")
    if rng.device != gram.device:
        raise ValueError(f"rng is on {rng.device}, the Gram matrix on {gram.device}; use rng_state(..., device=)")
    return rng.contiguous()


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
