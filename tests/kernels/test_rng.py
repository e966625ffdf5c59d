import pytest
import torch
from placement import rng_state

import mtl_kernels as mk
from benchmarks.oracles import projections as oracles
from mtl_kernels.rng import order_keys, philox

# Known answers published with the Random123 library: counter, key, result.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert oracles.philox4x32_10(counter, key) == expected
    words = philox(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert words.tolist() == expected


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("step", [0, 2**32 + 5])
def test_order_keys_give_the_pinned_order(seed, step):
    num_tasks, batch = 7, 3
    for problem in range(batch):
        keys = order_keys(rng_state(seed, step), problem, num_tasks)
        for task in range(num_tasks):
            order = [j for j in keys[task].argsort().tolist() if j != task]
            assert order == oracles.pcgrad_order(seed, step, problem, task, num_tasks)


def test_order_keys_are_distinct_and_uniform():
    keys = torch.stack([order_keys(rng_state(3), problem, 128) for problem in range(200)])
    assert keys.sort(dim=-1).values.diff(dim=-1).min() > 0
    first = keys.argmin(dim=-1).flatten()
    counts = first.bincount(minlength=128).double()
    chi_squared = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_squared < 127 + 5 * (2 * 127) ** 0.5


def test_rng_state():
    state = mk.rng_state(5, 7)
    assert state.dtype is torch.int64 and state.tolist() == [5, 7]
    assert mk.rng_state(2**64 - 1).tolist() == [-1, 0]
    with pytest.raises(ValueError, match="64 bits"):
        mk.rng_state(2**64)
    with pytest.raises(TypeError, match="step as an integer"):
        mk.rng_state(0, 1.5)
