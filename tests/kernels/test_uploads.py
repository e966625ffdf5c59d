"""Tables on their way to a device, and which of them are kept."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtl_kernels import uploads


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_packed_words_arrive_as_they_are(words: list[int]) -> None:
    table = uploads.packed(words)
    assert len(table) == 8 * len(words)
    found = uploads.on_host(table)
    assert found.dtype is torch.int64 and [word % 2**64 for word in found.tolist()] == words


def test_a_value_is_made_once() -> None:
    cache, made = uploads.Cache(), []
    for key in ("a", "b", "a", "b"):
        assert cache.find(key, lambda key=key: made.append(key) or key.upper()) == key.upper()
    assert made == ["a", "b"] and len(cache) == 2


def test_the_last_values_are_kept() -> None:
    cache = uploads.Cache()
    for key in range(100):
        cache.find(key, object)
        cache.find(0, object)
    assert len(cache) == uploads.KEPT
    kept = cache.find(0, object)
    assert cache.find(0, object) is kept


def test_no_more_bytes_are_kept_than_asked_for() -> None:
    cache, size = uploads.Cache(), uploads.KEPT_BYTES // 10
    for key in range(100):
        cache.find(key, object, size)
    assert len(cache) == 10


def test_a_value_may_tell_its_size() -> None:
    cache = uploads.Cache()
    for key in range(100):
        cache.find(key, lambda: uploads.KEPT_BYTES // 5, lambda value: value)
    assert len(cache) == 5


def test_the_tables_of_a_step_are_kept_however_large() -> None:
    cache, made = uploads.Cache(), []
    for _ in range(3):
        for key in ("rows", "outputs"):
            cache.find(key, lambda key=key: made.append(key), 10 * uploads.KEPT_BYTES)
    assert made == ["rows", "outputs"]


def test_what_cannot_be_made_is_not_kept() -> None:
    cache = uploads.Cache()

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        cache.find("a", fail, uploads.KEPT_BYTES)
    assert len(cache) == 0 and cache.find("a", lambda: 1) == 1


def test_a_capture_is_that_of_the_device_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *error: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == 1)
    assert uploads.capturing(torch.device("cuda", 1)) and not uploads.capturing(torch.device("cuda", 0))
    assert not uploads.capturing(torch.device("cpu")) and current == [0]
    current[0] = 1
    assert uploads.capturing(torch.device("cuda")) and not uploads.capturing(torch.device("cuda", 0))
