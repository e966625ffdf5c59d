"""The counter-based generator behind random task orders and thresholds: Philox4x32-10, the same words as in philox.h.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A state is two integers, seed and
step, on the device where they are used: nothing is drawn in sequence, so every rank and backend finds the
same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def rng_state(seed: int, step: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """The state (seed, step) as int64 ``[2]``.

    Operations read a state and never advance it; the caller does ``state[1] += 1`` between steps.

    Raises:
        TypeError: seed or step is not an integer.
        ValueError: seed or step does not fit in 64 bits.
    """
    words = []
    for name, value in (("seed", seed), ("step", step)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"expected {name} as an integer, found {type(value).__name__}")
        if not -(1 << 63) <= value < 1 << 64:
            raise ValueError(f"expected {name} to fit in 64 bits, found {value}")
        words.append(value - (1 << 64) if value >= 1 << 63 else value)
    return torch.tensor(words, dtype=torch.int64, device=device)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Philox4x32-10 of a counter and a key: words ``[..., 4]``, like these int64 in 0..2^32-1."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _multiply(0xD2511F53, c0)
        hi1, lo1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)  # type: ignore[no-untyped-call]


def order_keys(rng: Tensor, problem: int, num_tasks: int) -> Tensor:
    """Sort keys of PCGrad's random order in one problem, int64 ``[K, K]``: task i meets j by ascending key [i, j].

    Key = (word & ~127) | j, with word j % 4 of counter (step, problem, i*32 + j/4): distinct within a row.
    """
    task = torch.arange(num_tasks, device=rng.device).view(-1, 1)
    block = torch.arange((num_tasks + 3) // 4, device=rng.device).view(1, -1)
    words = _words_at(rng, torch.full_like(task, problem & _WORD), task * 32 + block).flatten(-2)[..., :num_tasks]
    return (words & (_WORD - 127)) | torch.arange(num_tasks, device=rng.device)


def uniform(rng: Tensor, first: int, count: int) -> Tensor:
    """Numbers from 0 to 1 of the elements ``first`` to ``first + count``, float64, at neither end.

    (word + 1/2) 2^-32, with word e % 4 of counter (step, e / 4) for element e: 64 bits each.
    """
    block = torch.arange(first // 4, -(-(first + count) // 4), device=rng.device)
    words = _words_at(rng, (block >> 32) & _WORD, block & _WORD).flatten()[first % 4 : first % 4 + count]
    return (words.double() + 0.5) * 2.0**-32


def _words_at(rng: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Four words of the stream (seed, step) at each position, ``[..., 4]``: `philox_at` in philox.h."""
    seed, step = rng[0], rng[1]
    counter = (step & _WORD, (step >> 32) & _WORD, high, low)
    return philox(counter, (seed & _WORD, (seed >> 32) & _WORD))


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a product of 32-bit words, by halves: the whole product overflows int64."""
    low = factor * (word & 0xFFFF)
    high = factor * (word >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
