"""Triton's interpreter, which runs the Triton kernels on a machine without a GPU."""

import os
from typing import Any

import pytest

SLOW = (
    "test_rows_are_not_copied",
    "test_no_conflict_is_the_plain_sum[triton-128]",
    "test_backends_agree_on_the_same_state[triton-40]",
    "test_backends_agree_on_the_same_state[triton-128]",
    "test_backends_agree[triton-40]",
    "test_backends_agree[triton-128]",
    "test_batched_is_one_problem_at_a_time",
    "test_more_iterations_never_raise_the_value",
)
"""Tests that take it minutes; tests/kernels/test_triton_*.py has each of them in small."""


def enable() -> None:
    """Turns it on for this process; triton must not have been imported yet."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    patched = set()
    binary_op = interpreter.InterpreterBuilder.binary_op

    def typed(self, lhs, rhs, op):  # type: ignore[no-untyped-def]
        # A comparison keeps the dtype of what it compares, of which triton 3.9 then makes masks that it refuses.
        found = binary_op(self, lhs, rhs, op)
        return interpreter.TensorHandle(found.data, tl.int1) if found.data.dtype == bool else found

    def call(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        # It swaps the whole language out for every call of a function from a kernel, most of its time: do so once.
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    interpreter.InterpreterBuilder.binary_op = typed


def require_triton() -> Any:
    """The module, where it is there and new enough for the backend; else the test is skipped."""
    from mtl_kernels.backends.triton import _OLDEST_TRITON

    return pytest.importorskip("triton", minversion=".".join(map(str, _OLDEST_TRITON)))


def is_slow(test: str) -> bool:
    """Whether a test of the Triton backend is too slow for the interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1" and test.startswith(SLOW)
