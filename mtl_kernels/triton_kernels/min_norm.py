"""The point of least norm in the hull of the rows, one program per problem.

csrc/include/mtl_kernels/solvers/min_norm.h has the derivation: Frank-Wolfe, and the exact active set on unit rows with
M = C + aa'. Where that one keeps a Cholesky factor of M over the support, here a ``tableau`` [K, K] holds M swept on
the support S (Gauss-Jordan in place): M_SS^-1 on S, M_SS^-1 M_SR beside it, and the Schur complement elsewhere, whose
diagonal is the pivot of every row that might enter. A row enters by one sweep; when one leaves, all are swept anew.
The tableau lies in memory and is worked on ROWS rows at a time: in registers it would not fit.
"""

import struct

import triton
import triton.language as tl
from torch import Tensor

from ..call import SolverCall
from .common import bound
from .problem import active_argument, configuration, count_bad, is_active

EPSILON = tl.constexpr(2.0**-52)
INFINITY = tl.constexpr(float("inf"))


def solve(weights: Tensor, certificate: Tensor, gram: Tensor, call: SolverCall) -> None:
    """Solves ``gram`` float64 ``[..., K, K]``; options: (frank_wolfe, max_iters or 0 for 10 K + 40, tol)."""
    frank_wolfe, cap, tolerance = call.options
    num_tasks = gram.shape[-1]
    batch = gram.numel() // num_tasks**2
    shape = configuration(num_tasks)
    scratch = gram if frank_wolfe else gram.new_empty(batch * num_tasks * (num_tasks + 2))
    mask, stride, has_active = active_argument(call.active, gram)
    _min_norm_kernel[(batch,)](
        weights,
        certificate,
        scratch,
        gram,
        mask,
        stride,
        min(int(cap), 1_000_000_000) if cap > 0 else 10 * num_tasks + 40,
        struct.unpack("q", struct.pack("d", tolerance))[0],  # the argument of a kernel may not be a double
        num_tasks,
        TASKS=shape.tasks,
        ROWS=shape.rows,
        HAS_ACTIVE=has_active,
        FRANK_WOLFE=bool(frank_wolfe),
        num_warps=shape.warps,
    )


@triton.jit(
    do_not_specialize=[
        "weights",
        "certificates",
        "scratch",
        "grams",
        "active",
        "active_stride",
        "max_iters",
        "tolerance",
        "num_tasks",
    ]
)
def _min_norm_kernel(
    weights,  # float64 [B, K]
    certificates,  # float64 [B, 2]: gap, iterations
    scratch,  # float64 [B, K + 2, K]: tableau, 1 / norm, a; unused by Frank-Wolfe
    grams,  # float64 [B, K, K]
    active,  # uint8 [K] or [B, K]
    active_stride,
    max_iters,
    tolerance: tl.int64,  # the bits of a float64
    num_tasks,
    TASKS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    FRANK_WOLFE: tl.constexpr,
):
    problem = tl.program_id(0)
    gram = grams + problem.to(tl.int64) * num_tasks * num_tasks
    task = tl.arange(0, TASKS)
    inside = is_active(active, problem, active_stride, task, num_tasks, HAS_ACTIVE)
    num_active = tl.sum(inside.to(tl.int32), axis=0)
    bad = count_bad(gram, active, problem, active_stride, num_tasks, TASKS, ROWS, HAS_ACTIVE)
    inside = is_active(active, problem, active_stride, task, tl.where(bad > 0, 0, num_tasks), HAS_ACTIVE)
    tol = tolerance.to(tl.int64).to(tl.float64, bitcast=True)
    squares = tl.load(gram + task * num_tasks + task, mask=inside, other=0.0)
    scale = _power_of_two_scale(tl.maximum(tl.max(squares, axis=0), 0.0))
    iterations = num_active - num_active
    share = inside.to(tl.float64) / tl.maximum(num_active, 1).to(tl.float64)
    found = share
    if FRANK_WOLFE:
        if tl.sum(inside.to(tl.int32), axis=0) > 0:
            found, iterations = _frank_wolfe(gram, squares, share, inside, scale, max_iters, tol, num_tasks, ROWS)
    else:
        least = tl.min(tl.where(inside, squares, INFINITY), axis=0)
        start = tl.min(tl.where(inside & (squares == least), task, TASKS), axis=0)
        found = tl.where(task == start, 1.0, 0.0).to(tl.float64)
        if (least > 0) & (least < INFINITY):
            own = scratch + problem.to(tl.int64) * num_tasks * (num_tasks + 2)
            found, iterations = _active_set(
                gram, own, squares, least, start, inside, num_active, max_iters, tol, num_tasks, ROWS
            )
    product = _times(gram, found * scale, inside, num_tasks, ROWS)
    gap = tl.sum(found * product, axis=0) - tl.min(tl.where(inside, product, INFINITY), axis=0)
    gap = tl.where(gap > 0, gap, 0.0) / scale
    every = is_active(active, problem, active_stride, task, num_tasks, HAS_ACTIVE)
    uniform = every.to(tl.float64) / tl.maximum(num_active, 1).to(tl.float64)
    found = tl.where(bad > 0, uniform, found)
    gap = tl.where(bad > 0, float("nan"), tl.where(num_active > 0, gap, 0.0))
    tl.store(weights + problem.to(tl.int64) * num_tasks + task, found, mask=task < num_tasks)
    tl.store(certificates + 2 * problem, gap)
    tl.store(certificates + 2 * problem + 1, iterations.to(tl.float64))


@triton.jit
def _power_of_two_scale(x):
    """The power of two that brings x >= 0 into [1/2, 1), exact to multiply by; 1 for 0."""
    exponent = (x.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    normal = (2045 - tl.minimum(exponent, 2044)) << 52
    one = exponent - exponent + 1
    subnormal = tl.where(exponent == 2045, one << 51, one << 50)
    bits = tl.where(exponent < 2045, normal, subnormal)
    return tl.where(x > 0, bits.to(tl.float64, bitcast=True), 1.0)


@triton.jit
def _entries(vector, first, ROWS: tl.constexpr):
    """ROWS entries of a vector [TASKS] from ``first`` on, 0 beyond its end."""
    if ROWS == vector.shape[0]:
        entries = vector
    else:
        row = first + tl.arange(0, ROWS)
        task = tl.arange(0, vector.shape[0])
        entries = tl.sum(tl.where(row[:, None] == task[None, :], vector[None, :], 0.0), axis=1)
    return entries


@triton.jit
def _times(matrix, vector, among, num_tasks, ROWS: tl.constexpr):
    """Product of a symmetric matrix in memory with a vector, over rows and columns ``among``."""
    task = tl.arange(0, vector.shape[0])
    total = tl.zeros([vector.shape[0]], tl.float64)
    vector = tl.where(among, vector, 0.0)
    for first in range(0, bound(num_tasks), ROWS):
        row = first + tl.arange(0, ROWS)
        there = (_entries(among.to(tl.float64), first, ROWS) > 0)[:, None] & among[None, :]
        tile = tl.load(matrix + row[:, None] * num_tasks + task[None, :], mask=there, other=0.0)
        total += tl.sum(tile * _entries(vector, first, ROWS)[:, None], axis=0)
    return total


@triton.jit
def _frank_wolfe(gram, squares, share, inside, scale, max_iters, tol, num_tasks, ROWS: tl.constexpr):
    """Sener & Koltun 2018, Algorithm 2."""
    TASKS: tl.constexpr = inside.shape[0]
    task = tl.arange(0, TASKS)
    found = share
    product = _times(gram, found * scale, inside, num_tasks, ROWS)
    allowed = tol * (tl.max(squares, axis=0) * scale)
    iterations = max_iters - max_iters
    value = tl.sum(found * product, axis=0)
    least = tl.min(tl.where(inside, product, INFINITY), axis=0)
    while (iterations < max_iters) & (value - least > allowed):
        vertex = tl.min(tl.where(inside & (product == least), task, TASKS), axis=0)
        row = tl.load(gram + vertex * num_tasks + task, mask=inside, other=0.0) * scale
        corner = tl.load(gram + vertex * num_tasks + vertex) * scale
        step = tl.where(least >= corner, 1.0, (value - least) / (value - 2 * least + corner))
        found = (1 - step) * found + tl.where(task == vertex, step, 0.0)
        product = (1 - step) * product + step * row
        iterations += 1
        value = tl.sum(found * product, axis=0)
        least = tl.min(tl.where(inside, product, INFINITY), axis=0)
    return found / tl.sum(found, axis=0), iterations


@triton.jit
def _sweep(tableau, k, floor, num_tasks, TASKS: tl.constexpr, ROWS: tl.constexpr):
    """Gauss-Jordan on row and column k, with a pivot of at least ``floor``."""
    task = tl.arange(0, TASKS)
    is_column = (task == k)[None, :]
    row_k = tl.load(tableau + k * num_tasks + task, mask=task < num_tasks, other=0.0)
    column_k = tl.load(tableau + task * num_tasks + k, mask=task < num_tasks, other=0.0)
    inverse = 1.0 / tl.maximum(tl.sum(tl.where(task == k, row_k, 0.0), axis=0), floor)
    row_k *= inverse
    tl.debug_barrier()
    for first in range(0, bound(num_tasks), ROWS):
        row = first + tl.arange(0, ROWS)
        is_row = (row == k)[:, None]
        place = tableau + row[:, None] * num_tasks + task[None, :]
        inside = (row < num_tasks)[:, None] & (task < num_tasks)[None, :]
        column = _entries(column_k, first, ROWS)[:, None]
        swept = tl.load(place, mask=inside, other=0.0) - column * row_k[None, :]
        swept = tl.where(is_column, -column * inverse, swept)
        swept = tl.where(is_row, tl.where(is_column, inverse, row_k[None, :]), swept)
        tl.store(place, swept, mask=inside)
    tl.debug_barrier()


@triton.jit
def _fill(gram, scratch, num_tasks, TASKS: tl.constexpr, ROWS: tl.constexpr):
    """Puts M into the tableau."""
    task = tl.arange(0, TASKS)
    inverse_norms = scratch + num_tasks * num_tasks
    inside = task < num_tasks
    inverse_norm = tl.load(inverse_norms + task, mask=inside, other=0.0)
    a = tl.load(inverse_norms + num_tasks + task, mask=inside, other=0.0)
    for first in range(0, bound(num_tasks), ROWS):
        row = first + tl.arange(0, ROWS)
        row_norm = tl.load(inverse_norms + row, mask=row < num_tasks, other=0.0)
        row_a = tl.load(inverse_norms + num_tasks + row, mask=row < num_tasks, other=0.0)
        there = (row_norm > 0)[:, None] & (inverse_norm > 0)[None, :]
        place = row[:, None] * num_tasks + task[None, :]
        entries = tl.load(gram + place, mask=there, other=0.0) * row_norm[:, None] * inverse_norm[None, :]
        entries += row_a[:, None] * a[None, :]
        tl.store(scratch + place, entries, mask=(row < num_tasks)[:, None] & inside[None, :])
    tl.debug_barrier()


@triton.jit
def _active_set(
    gram, scratch, squares, least, start, inside, num_active, max_iters, tol, num_tasks, ROWS: tl.constexpr
):
    """Wolfe 1976 on unit rows: weights and the number of rows that entered. ``least`` > 0 is the least square.

    A pass of the loop brings the tableau up to date, then either judges the point that a major cycle ended in (``due``)
    or takes a minor step: one loop, so that each part is there once, for compilers inline all of it.
    """
    TASKS: tl.constexpr = inside.shape[0]
    task = tl.arange(0, TASKS)
    inverse_norm = tl.where(inside, 1.0 / tl.sqrt(tl.where(inside, squares, 1.0)), 0.0)
    a = inverse_norm * tl.sqrt(least)
    least_a = tl.min(tl.where(inside, a, 1.0), axis=0)
    tl.store(scratch + num_tasks * num_tasks + task, inverse_norm, mask=task < num_tasks)
    tl.store(scratch + (num_tasks + 1) * num_tasks + task, a, mask=task < num_tasks)
    tl.debug_barrier()
    rounding = 2 * EPSILON * num_active.to(tl.float64)
    floor = 4 * EPSILON * num_active.to(tl.float64)
    zero = max_iters - max_iters
    iterations = zero
    running = zero + 1
    due = zero + 1
    refill = zero + 1
    waiting = zero  # 1 while the entering row is in the support but not swept
    entering = start
    support = task == start
    entered = task < 0
    unswept = task < 0
    y = tl.where(support, 1.0 / tl.where(inside, a, 1.0), 0.0)
    best = y
    best_value = tl.sum(y, axis=0) * 0.0 + INFINITY
    best_length = best_value
    while running > 0:
        if refill > 0:
            _fill(gram, scratch, num_tasks, TASKS, ROWS)
            unswept = support & (task != tl.where(waiting > 0, entering, TASKS))
            refill = zero
        for _ in range(0, bound(tl.sum(unswept.to(tl.int32), axis=0))):
            pivots = tl.load(scratch + task * (num_tasks + 1), mask=unswept, other=-INFINITY)
            k = tl.min(tl.where(unswept & (pivots == tl.max(pivots, axis=0)), task, TASKS), axis=0)
            _sweep(scratch, k, floor, num_tasks, TASKS, ROWS)
            unswept = unswept & (task != k)
        if due > 0:
            product = _times(gram, inverse_norm * y, inside, num_tasks, ROWS) * inverse_norm
            value = tl.sum(tl.where(y > 0, y * product, 0.0), axis=0)
            length = tl.sum(y, axis=0)
            # What changes nothing is kept, but a row may enter once only until w'Gw falls by more than its rounding.
            shorter = tl.minimum(length, best_length)
            noise = rounding * shorter * shorter
            if value < best_value - noise:
                entered = task < 0
            # The first point is kept whatever its value, so that there always is one to go back to.
            if (value <= best_value + noise) | (best_value == INFINITY):
                best = y
                best_value = tl.minimum(value, best_value)
                best_length = length
                candidates = inside & ((support | entered) == 0)
                entering = _find_violation(product, a, candidates, best_value, best_length, rounding, least_a, tol)
                if (entering < TASKS) & (iterations < max_iters):
                    iterations += 1
                    entered = entered | (task == entering)
                    support = support | (task == entering)
                    waiting = zero + 1
                    due = zero
                else:
                    running = zero
            else:
                y = best
                support = best > 0
                refill = zero + 1
        else:
            pivot = tl.load(scratch + entering * (num_tasks + 1))
            if (waiting > 0) & (pivot > floor):
                unswept = task == entering
                waiting = zero
            else:
                y, support, leaving = _move(
                    gram, scratch, y, a, inverse_norm, support, entering, waiting, num_tasks, ROWS
                )
                if leaving < TASKS:
                    refill = zero + 1
                else:
                    due = zero + 1
                    unswept = task == tl.where(waiting > 0, entering, TASKS)
                    waiting = zero
    found = best * a
    return found / tl.sum(found, axis=0), iterations


@triton.jit
def _find_violation(product, a, candidates, value, length, rounding, least_a, tol):
    """The task whose (Gw)_j lies furthest below w'Gw relative to its norm, TASKS when none does beyond rounding."""
    TASKS: tl.constexpr = product.shape[0]
    residual = product - a * value
    violated = candidates & (residual < -rounding * length * (1 + a * length))
    gap = tl.max(tl.where(violated, -residual / tl.where(violated, a, 1.0), 0.0), axis=0)
    worst = tl.min(tl.where(violated, residual, INFINITY), axis=0)
    first = tl.min(tl.where(violated & (residual == worst), tl.arange(0, TASKS), TASKS), axis=0)
    return tl.where(gap * least_a * least_a <= tol, TASKS, first)


@triton.jit
def _move(gram, scratch, y, a, inverse_norm, support, entering, waiting, num_tasks, ROWS: tl.constexpr):
    """A minor step: towards the least norm of the affine hull until the first row leaves, TASKS when none does.

    A numerically dependent row, which is still ``waiting``, has no such point: the norm falls along the kernel of M.
    """
    TASKS: tl.constexpr = y.shape[0]
    task = tl.arange(0, TASKS)
    if waiting > 0:
        column = tl.load(scratch + task * num_tasks + entering, mask=support, other=0.0)
        target = tl.where(task == entering, 1.0, tl.where(support, -column, 0.0))
        delta = target
        leaves = support & (target < 0)
    else:
        target = _minimizer(gram, scratch, a, inverse_norm, support, num_tasks, ROWS)
        delta = target - y
        leaves = support & (target <= 0)
    steps = tl.where(leaves, tl.where(y > 0, y / tl.where(leaves, -delta, 1.0), 0.0), INFINITY)
    step = tl.min(steps, axis=0)
    leaving = tl.min(tl.where(leaves & (steps == step), task, TASKS), axis=0)
    if leaving < TASKS:
        target = y + step * delta
    support = support & (task != leaving)
    y = tl.where(support & (target > 0), target, 0.0)
    if waiting > 0:
        y = y / tl.sum(a * y, axis=0)
    return y, support, leaving


@triton.jit
def _minimizer(gram, tableau, a, inverse_norm, support, num_tasks, ROWS: tl.constexpr):
    """z = M^-1 a on the support, refined once, over a'z."""
    z = _times(tableau, a, support, num_tasks, ROWS)
    product = _times(gram, inverse_norm * z, support, num_tasks, ROWS) * inverse_norm + a * tl.sum(a * z, axis=0)
    z += _times(tableau, a - product, support, num_tasks, ROWS)
    return z / tl.sum(a * z, axis=0)
