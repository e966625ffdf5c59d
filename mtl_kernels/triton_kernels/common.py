"""What the kernels share: row dtypes, rounding, and what keeps one source running compiled and interpreted."""

import triton
import triton.language as tl

INTERPRETED: bool = not isinstance(tl.sum, triton.JITFunction)
"""Whether this process runs kernels in Triton's interpreter (TRITON_INTERPRET=1 when triton was imported)."""

FLOAT32 = tl.constexpr(0)
FLOAT64 = tl.constexpr(1)
BFLOAT16 = tl.constexpr(2)
FLOAT16 = tl.constexpr(3)
"""Row dtypes, numbered as in `mtl_kernels.rows.DTYPE_CODES`."""

if INTERPRETED:

    def bound(value):
        """A bound of `range` as a Python integer: numpy 2.4 takes no array of one element there (triton#9171)."""
        return int(value.handle.data.item()) if isinstance(value, tl.tensor) else value

else:

    @triton.jit
    def bound(value):
        """A bound of `range`, as it is."""
        return value


@triton.jit
def row_pointers(addresses, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    """Addresses, int64, as pointers to row elements; bfloat16 is read and written by its bits.

    ALIGNED: they are multiples of 16, so that loads and stores may be of 16 bytes.
    """
    # The hint has to stand where the pointer is made: it does not survive the inlining of a function.
    if CODE == FLOAT32:
        pointers = addresses.to(tl.pointer_type(tl.float32))
    elif CODE == FLOAT64:
        pointers = addresses.to(tl.pointer_type(tl.float64))
    elif CODE == BFLOAT16:
        pointers = addresses.to(tl.pointer_type(tl.int16))
    else:
        pointers = addresses.to(tl.pointer_type(tl.float16))
    if ALIGNED:
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
def float_of_bfloat16(bits):
    """float32 of bfloat16 bits, int16."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def widen(elements, CODE: tl.constexpr):
    """Row elements as float64."""
    if CODE == BFLOAT16:
        wide = float_of_bfloat16(elements).to(tl.float64)
    else:
        wide = elements.to(tl.float64)
    return wide


@triton.jit
def narrow(values, CODE: tl.constexpr):
    """float64 rounded once to the dtype of the rows, to nearest even.

    To 16 bits by way of a float32 rounded to odd, which carries enough of what was cut off for the second rounding
    to be that of the first number (Boldo & Melquiond 2008).
    """
    if CODE == FLOAT64:
        rounded = values
    elif CODE == FLOAT32:
        rounded = values.to(tl.float32)
    else:
        nearest = values.to(tl.float32)
        back = nearest.to(tl.float64)
        bits = nearest.to(tl.int32, bitcast=True)
        towards_zero = tl.abs(back) > tl.abs(values)
        inexact = (back < values) | (back > values)
        bits = tl.where(inexact & ((bits & 1) == 0), tl.where(towards_zero, bits - 1, bits + 1), bits)
        if CODE == FLOAT16:
            rounded = bits.to(tl.float32, bitcast=True).to(tl.float16)
        else:
            upper = (bits >> 16) & 0xFFFF
            up = ((bits & 0x7FFF) != 0) | ((upper & 1) != 0)
            nearest_even = upper + tl.where(((bits & 0x8000) != 0) & up, 1, 0)
            rounded = tl.where(values == values, nearest_even, 0x7FC0).to(tl.int16)
    return rounded
