from collections.abc import Iterator

import pytest

from ranks.world import World


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    """Two ranks, for all tests of a file."""
    world = World(2)
    yield world
    world.close()
