"""The one rounding of combine, from float64 to 16 bits, at every place where two of them could go wrong."""

import math

import pytest
import torch
from exact import DTYPES

import mtl_kernels as mk

HALVES = [torch.bfloat16, torch.float16]


def halfway(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Every float64 halfway between two neighbours from 0 to infinity, and the bits of the lower one."""
    bits = torch.arange(int(torch.tensor(math.inf, dtype=dtype).view(torch.int16)), dtype=torch.int16)
    values = bits.view(dtype).double()
    beyond = 2 * values[-1] - values[-2]  # what follows the largest, were there one more exponent
    return (values + torch.cat([values[1:], beyond[None]])) / 2, bits


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_halfway_case(implementation: str, dtype: torch.dtype, sign: int) -> None:
    check_halfway(implementation, *halfway(dtype), dtype, sign)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halfway_cases_of_triton(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton":
        check_halfway(backend, *(values[::17] for values in halfway(dtype)), dtype, 1)


def check_halfway(backend: str, middle: torch.Tensor, lower: torch.Tensor, dtype: torch.dtype, sign: int) -> None:
    above, below = (torch.nextafter(middle, torch.full_like(middle, x)) for x in (math.inf, 0))
    for values, expected in ((middle, lower + lower % 2), (above, lower + 1), (below, lower)):
        found = combined(sign * values, dtype, backend)
        assert torch.equal(found, sign * expected.view(dtype))


def combined(values: torch.Tensor, dtype: torch.dtype, backend: str) -> torch.Tensor:
    """The values, rounded."""
    out = torch.empty(values.shape, dtype=dtype)
    mk.combine(values[None], torch.ones(1), out=out, backend=backend)
    return out


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows_dtype", DTYPES, ids=str)
def test_what_is_not_finite_or_hardly_there(implementation: str, rows_dtype: torch.dtype, dtype: torch.dtype) -> None:
    values = torch.tensor([math.inf, -math.inf, math.nan, -math.nan, 0.0, -0.0] * 3, dtype=rows_dtype)
    found = combined(values, dtype, implementation)
    assert torch.equal(found.nan_to_num(nan=7.0), values.to(dtype).nan_to_num(nan=7.0))
    tiny = torch.tensor([5e-324, -5e-324, 1e-60, 1e-46, -1e-46] * 3, dtype=torch.float64)
    assert not combined(tiny, dtype, implementation).any()
