import pytest
import torch

import mtl_kernels as mk

HERE = r"(cpu|cuda:\d+)"


def test_a_table_says_what_it_holds(device: torch.device) -> None:
    ones = torch.ones(3)
    rows = [[ones, None, torch.ones(2, 2)], [None, None, torch.ones(2, 2)]]
    table = mk.RowTable(rows)
    assert (table.num_tasks, table.num_params, table.device) == (2, 3, ones.device)
    assert table.device.type == device.type
    assert table.reached == [[True, False, True], [False, False, True]]
    assert table.entries[0][0] is rows[0][0] and table.entries[1][2] is rows[1][2]
    assert not table.dense


def test_a_dense_table_reads_the_tensor_in_place() -> None:
    matrix = torch.randn(3, 10)[:, 2:]
    table = mk.RowTable(matrix)
    assert table.dense and (table.num_tasks, table.num_params) == (3, 1)
    assert [row[0].data_ptr() for row in table.entries] == [row.data_ptr() for row in matrix]


def test_tensors_that_fill_their_memory_are_read_in_place() -> None:
    nchw = torch.randn(2, 3, 4, 4)
    for tensor in (
        nchw,
        nchw.to(memory_format=torch.channels_last),
        nchw.permute(3, 1, 0, 2),
        nchw[:1],
        nchw[0, 0, 0, 0],
    ):
        assert mk.RowTable([[tensor], [tensor]]).entries[1][0].data_ptr() == tensor.data_ptr()


def test_a_table_is_reusable_for_gram_and_combine(backend: str) -> None:
    rows = [[torch.randn(4), torch.randn(2, 3)], [None, torch.randn(2, 3)]]
    table = mk.RowTable(rows)
    weights = torch.tensor([0.5, 2.0])
    for _ in range(2):
        assert torch.equal(mk.gram(table, backend=backend), mk.gram(rows, backend=backend))
        for a, b in zip(
            mk.combine(table, weights, backend=backend),
            mk.combine(rows, weights, backend=backend),
            strict=True,
        ):
            assert torch.equal(a, b)
    rows[1][1].mul_(2)
    assert torch.equal(mk.gram(table, backend=backend), mk.gram(rows, backend=backend)), "it reads what is there now"


def test_the_list_given_is_left_as_it_is() -> None:
    leaf = torch.ones(3, requires_grad=True)
    rows = [[leaf, torch.ones(4, 4)[:, ::2]], [leaf, torch.ones(4, 2)]]
    before = [list(row) for row in rows]
    mk.RowTable(rows)
    assert all(a is b for r, s in zip(rows, before, strict=True) for a, b in zip(r, s, strict=True))


def bad_rows() -> dict[str, tuple[object, type[Exception], str]]:
    ones = torch.ones(3)
    return {
        "nothing": (None, TypeError, r"expected a tensor \[K, N\] or K sequences of tensors, found NoneType"),
        "generator": (([ones] for _ in range(2)), TypeError, "found generator"),
        "no rows": ([], ValueError, "expected 1 to 128 tasks, found 0"),
        "no dense rows": (torch.empty(0, 3), ValueError, "expected 1 to 128 tasks, found 0"),
        "too many rows": ([[ones]] * 129, ValueError, "expected 1 to 128 tasks, found 129; combine"),
        "too many dense rows": (torch.ones(129, 2), ValueError, "expected 1 to 128 tasks, found 129"),
        "one vector": (ones, ValueError, r"expected rows of shape \[K, N\], found \[3\]"),
        "three dimensions": (torch.ones(2, 3, 4), ValueError, r"found \[2, 3, 4\]: flatten"),
        "a list of vectors": ([ones, ones], TypeError, "row 0 is a Tensor; expected a sequence"),
        "rows of numbers": (
            [[1.0], [2.0]],
            TypeError,
            "row 0, parameter 0 is a float; expected a tensor or None",
        ),
        "strings": (["ab", "cd"], TypeError, "is a str; expected a tensor"),
        "ragged": ([[ones], [ones, None]], ValueError, "row 1 has 2 parameters where row 0 has 1; use None"),
        "shapes": ([[ones], [torch.ones(4)]], ValueError, r"parameter 0 has shape \[4\] in row 1 and \[3\]"),
        "same numel": (
            [[None, torch.ones(2, 3)], [None, torch.ones(3, 2)]],
            ValueError,
            r"parameter 1 has shape \[3, 2\]",
        ),
        "dtypes": (
            [[ones], [ones.double()]],
            TypeError,
            "parameter 0 has dtype torch.float64 in row 1 and torch.float32",
        ),
        "integers": (
            torch.ones(2, 3, dtype=torch.int64),
            TypeError,
            "torch.int64; expected one of float32, float64",
        ),
        "integer entries": (
            [[ones.int()]],
            TypeError,
            "row 0, parameter 0 has dtype torch.int32; expected one of",
        ),
        "bools": (torch.ones(2, 3, dtype=torch.bool), TypeError, "torch.bool; expected one of"),
        "complex": (torch.ones(2, 3, dtype=torch.complex64), TypeError, "torch.complex64; expected one of"),
        "float8": (torch.ones(2, 3).to(torch.float8_e5m2), TypeError, "float8_e5m2; expected one of"),
        "devices in a column": (
            [[ones], [ones.to("meta")]],
            ValueError,
            f"parameter 0 is on meta in row 1 and on {HERE}",
        ),
        "devices across": ([[ones, ones.to("meta")]], ValueError, f"parameter 1 is on meta, others on {HERE}; move"),
        "sparse matrix": (torch.eye(3).to_sparse(), TypeError, r"layout torch.sparse_coo: call .to_dense\(\)"),
        "sparse entry": (
            [[torch.eye(3)], [torch.eye(3).to_sparse()]],
            TypeError,
            r"row 1, parameter 0 has layout .*to_dense",
        ),
        "nested": (
            [[torch.nested.nested_tensor([ones, ones])]],
            TypeError,
            "row 0, parameter 0 is a nested tensor; expected a dense one",
        ),
        "nested matrix": (torch.nested.nested_tensor([ones, ones]), TypeError, "the row matrix is a nested tensor"),
        "mkldnn": ([[torch.eye(3, device="cpu").to_mkldnn()]], TypeError, "layout torch._mkldnn"),
    }


@pytest.mark.parametrize("case", bad_rows())
def test_bad_rows(case: str) -> None:
    rows, kind, message = bad_rows()[case]
    for call in (
        mk.RowTable,
        mk.gram,
        lambda r: mk.combine(r, torch.ones(2)),
        lambda r: mk.gram(r, backend="reference"),
    ):
        with pytest.raises(kind, match=message):
            call(rows)


def bad_weights() -> dict[str, tuple[object, type[Exception], str]]:
    return {
        "a list": ([1.0, 2.0], TypeError, "expected weights as a tensor, found list"),
        "a number": (1.0, TypeError, "expected weights as a tensor, found float"),
        "nothing": (None, TypeError, "expected weights as a tensor, found NoneType"),
        "integers": (
            torch.ones(2, dtype=torch.int64),
            TypeError,
            "expected weights of floating dtype, found torch.int64",
        ),
        "complex": (torch.ones(2, dtype=torch.complex64), TypeError, "floating dtype, found torch.complex64"),
        "too few": (torch.ones(1), ValueError, r"expected weights of shape \[2\], found \[1\]"),
        "too many": (torch.ones(3), ValueError, r"expected weights of shape \[2\], found \[3\]"),
        "scalar": (torch.ones(()), ValueError, r"expected weights of shape \[2\], found \[\]"),
        "a column": (torch.ones(2, 1), ValueError, r"expected weights of shape \[2\], found \[2, 1\]"),
        "elsewhere": (torch.ones(2, device="meta"), ValueError, f"found weights on meta, the rows on {HERE}; move"),
        "sparse": (torch.ones(2).to_sparse(), TypeError, "layout|sparse"),
    }


@pytest.mark.parametrize("case", bad_weights())
def test_bad_weights(backend: str, case: str) -> None:
    weights, kind, message = bad_weights()[case]
    out = [torch.full((3,), 5.0)]
    with pytest.raises(kind, match=message):
        mk.combine([[torch.ones(3)], [torch.ones(3)]], weights, out=out, backend=backend)
    assert out[0].tolist() == [5, 5, 5]


def test_weights_of_the_wrong_number_of_groups(backend: str) -> None:
    rows = [[torch.ones(3)] * 2] * 2
    for weights in (torch.ones(2), torch.ones(1, 2), torch.ones(3, 2), torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"expected weights of shape \[2, 2\], found"):
            mk.combine(rows, weights, groups=[0, 1], backend=backend)


BAD_GROUPS = {
    "too few": ([0], ValueError, "groups has 1 entries for 2 parameters"),
    "too many": ([0, 1, 2], ValueError, "groups has 3 entries for 2 parameters"),
    "negative": ([0, -1], ValueError, "groups has the entry -1"),
    "fractions": ([0.5, 1.0], TypeError, "groups"),
    "strings": (["a", "b"], TypeError, "groups"),
    "a number": (3, TypeError, "groups"),
    "absurd": ([0, 1 << 40], ValueError, "groups"),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_bad_groups(backend: str, case: str) -> None:
    groups, kind, message = BAD_GROUPS[case]
    rows = [[torch.ones(3)] * 2] * 2
    with pytest.raises(kind, match=message):
        mk.gram(rows, groups=groups, backend=backend)
    with pytest.raises(kind, match=message):
        mk.combine(rows, torch.ones(2, 2), groups=groups, backend=backend)


def bad_outs() -> dict[str, tuple[object, object, type[Exception], str]]:
    table, matrix = [[torch.ones(3), None], [torch.ones(3), None]], torch.ones(2, 3)
    good = torch.full((3,), 5.0)
    return {
        "a tensor for a list": (
            table,
            good,
            TypeError,
            "expected out as a sequence of 2 tensors, found Tensor",
        ),
        "a list for dense": (
            matrix,
            [good],
            TypeError,
            r"expected out as a tensor \[N\] for dense rows, found list",
        ),
        "a number": (matrix, 3, TypeError, "expected out as a tensor"),
        "numbers": (table, [3, None], TypeError, r"out\[0\] is a.* int"),
        "too short": (table, [good], ValueError, "out has 1 tensors for 2 parameters"),
        "missing": (table, [None, None], ValueError, r"out\[0\] is missing where a task reaches"),
        "superfluous": (table, [good, good.clone()], ValueError, r"out\[1\] is given where no task reaches"),
        "shape": (table, [torch.full((4,), 5.0), None], ValueError, r"out\[0\] is \[4\] .*; expected \[3\]"),
        "dense shape": (matrix, torch.full((1, 3), 5.0), ValueError, r"out\[0\] is \[1, 3\]"),
        "dtype": (
            table,
            [good.int(), None],
            ValueError,
            r"out\[0\] is \[3\] torch.int32 .*of dtype torch.float32, torch.float64",
        ),
        "device": (matrix, good.to("meta"), ValueError, rf"out\[0\] is .* on meta; expected .* on {HERE}"),
        "sparse": (matrix, good.to_sparse(), TypeError, "layout"),
    }


@pytest.mark.parametrize("case", bad_outs())
def test_bad_out_changes_nothing(backend: str, case: str) -> None:
    rows, out, kind, message = bad_outs()[case]
    with pytest.raises(kind, match=message):
        mk.combine(rows, torch.ones(2), out=out, backend=backend)
    for target in out if isinstance(out, list) else [out]:
        if isinstance(target, torch.Tensor) and target.device.type != "meta" and target.layout is torch.strided:
            assert (target == 5).all()


def test_out_whose_elements_share_memory_is_refused(backend: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match="memory"):
        mk.combine(torch.ones(2, 3), torch.ones(2), out=torch.zeros(1).expand(3), backend=backend)


def test_negated_views(backend: str) -> None:
    rows, weights, out = torch.randn(2, 3), torch.randn(2), torch.zeros(3)
    mk.combine(torch._neg_view(rows), torch._neg_view(weights), out=torch._neg_view(out), backend=backend)
    torch.testing.assert_close(-out, mk.combine(rows, weights, backend=backend))


def test_out_of_meta_tensors() -> None:
    rows = [[torch.ones(3, device="meta"), torch.empty(2, device="meta")]] * 2
    out = [torch.empty(3, device="meta"), torch.empty(2, device="meta")]
    assert mk.combine(rows, torch.ones(2, device="meta"), out=out) is not None


def bad_grams() -> dict[str, tuple[object, type[Exception], str]]:
    return {
        "a list": ([[1.0]], TypeError, "expected a Gram matrix as a tensor"),
        "a vector": (torch.ones(3), ValueError, r"expected a Gram matrix of shape \[..., K, K\], found \[3\]"),
        "not square": (torch.ones(2, 3), ValueError, r"found \[2, 3\]: pass gram\(rows\)"),
        "empty": (torch.ones(0, 0), ValueError, "expected 1 to 128 tasks, found 0"),
        "too large": (torch.ones(129, 129), ValueError, "expected 1 to 128 tasks, found 129"),
        "integers": (
            torch.ones(2, 2, dtype=torch.int64),
            TypeError,
            "expected a Gram matrix of floating dtype, found torch.int64",
        ),
        "sparse": (torch.eye(2).to_sparse(), TypeError, "the Gram matrix has layout torch.sparse_coo"),
    }


@pytest.mark.parametrize("case", bad_grams())
@pytest.mark.parametrize("function", [mk.norms, mk.cosines, mk.pcgrad_weights, mk.min_norm_weights])
def test_bad_gram(function, case: str) -> None:
    gram, kind, message = bad_grams()[case]
    with pytest.raises(kind, match=message):
        function(gram)
