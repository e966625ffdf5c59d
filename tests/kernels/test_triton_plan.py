"""How the Triton kernels' work is dealt out; needs neither triton nor a device."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_kernels.triton_kernels.plan import ALIGNMENT, MIN_COLUMNS, make_plan

parameters = st.lists(
    st.tuples(st.integers(0, 20_000) | st.integers(0, 40), st.integers(0, 3), st.integers(0, 3)), max_size=25
)


@given(parameters, st.sampled_from([1, 7, 264, 4224]))
def test_every_column_is_dealt_out_once(params: list[tuple[int, int, int]], max_chunks: int) -> None:
    numels, codes, groups = ([column[i] for column in params] for i in range(3))
    plan = make_plan(numels, codes, groups, max_chunks)
    covered: dict[int, int] = {}
    for launch in plan.launches:
        ends = [0]
        for first, last, slot in launch.chunks:
            assert first == ends[-1] < last
            ends.append(last)
            owners = {group for _, _, _, group in launch.segments[first:last]}
            assert len(owners) == 1 and plan.slots[min(owners)] <= slot < plan.slots[min(owners) + 1]
        assert ends[-1] == len(launch.segments)
        for p, begin, columns, group in launch.segments:
            assert (codes[p], groups[p]) == (launch.code, group)
            assert begin == covered.get(p, 0) and begin % ALIGNMENT == 0 and 0 < columns < 1 << 31
            covered[p] = begin + columns
    assert covered == {p: numel for p, numel in enumerate(numels) if numel > 0}
    slots = sorted(slot for launch in plan.launches for _, _, slot in launch.chunks)
    assert slots == list(range(plan.slots[-1])), "each program writes a sum of its own"


@given(parameters)
def test_the_work_of_a_group_is_its_own(params: list[tuple[int, int, int]]) -> None:
    numels, codes, groups = ([column[i] for column in params] for i in range(3))
    together = make_plan(numels, codes, groups, 100)
    for group in set(groups):
        members = [p for p, g in enumerate(groups) if g == group]
        alone = make_plan([numels[p] for p in members], [codes[p] for p in members], [0] * len(members), 100)
        for launch in alone.launches:
            whole = next(other for other in together.launches if other.code == launch.code)
            expected = [
                [(members[p], begin, columns) for p, begin, columns, _ in launch.segments[first:last]]
                for first, last, _ in launch.chunks
            ]
            found = [
                [segment[:3] for segment in whole.segments[first:last]]
                for first, last, _ in whole.chunks
                if whole.segments[first][3] == group
            ]
            assert found == expected


@pytest.mark.parametrize("numel", [MIN_COLUMNS * 10, 1 << 26, 1 << 36])
@pytest.mark.parametrize("max_chunks", [264, 4224])
def test_programs_are_about_as_many_as_asked_for_and_even(numel: int, max_chunks: int) -> None:
    launch = make_plan([numel], [0], [0], max_chunks).launches[0]
    assert len(launch.chunks) <= 1.2 * max_chunks
    sizes = [columns for _, _, columns, _ in launch.segments]
    assert max(sizes) < 1 << 31 and min(sizes[:-1]) == max(sizes[:-1]) >= sizes[-1]
    if numel >= MIN_COLUMNS * max_chunks:
        assert len(launch.chunks) >= 0.9 * max_chunks


def test_many_small_parameters_share_programs() -> None:
    plan = make_plan([100] * 1000, [0] * 1000, [0] * 1000, 4224)
    assert 100 <= len(plan.launches[0].chunks) <= 200
