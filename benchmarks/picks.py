"""Tests that between them run every kernel: words that a test's name and parameters hold."""

PICKED = (
    # gram_triangle for 2, 4, 6 and 8 rows, gram_tensor for 1, 2, 3, 4 and 8 bands of 16 rows, each in four dtypes
    "test_ragged_table_of_mixed_dtypes",
    "test_dense_rows and 3-129",
    "test_dense_rows and -6-129",
    "test_dense_rows and 9-129",
    "test_dense_rows and 17-31",
    "test_dense_rows and 33-200",
    "test_dense_rows and 64-140",
    "test_dense_rows and 128-50",
    # several slices and their ends, groups, tiles that are taken again, absent rows
    "test_parameters_that_end",
    "test_same_bits_from_run_to_run",
    "test_groups",
    "test_every_half_and_bfloat16_value",
    "test_non_finite_entries_where",
    "test_layouts",
    # combine from every dtype to every dtype, with its epilogues, in place and beside
    "test_cast_scale_and_accumulate",
    "test_in_place_over_the_tensors",
    "test_out_of_its_own",
    "test_found_inf",
    # gram with a solver behind it, and solve_batch for a warp and for a block
    "test_gram_solve",
    "test_statistics",
    "test_batched",
    "test_backends_agree and -5",
    "test_backends_agree and -40",
    "test_backends_agree and -128",
)
"""For the first tests after a build, and for memcheck."""

SHARED = (
    # What threads share memory for: the stages of gram_tensor, in float64 and in float16 multiplication,
    "test_dense_rows and 9-129-torch.float32",
    "test_dense_rows and 17-31-torch.bfloat16",
    "test_dense_rows and 33-200-torch.float32",
    "test_dense_rows and 64-140-torch.float32",
    "test_dense_rows and 64-140-torch.bfloat16",
    "test_dense_rows and 128-50-torch.float32",
    # the sums of a block of gram_triangle, the operands of combine, several slices and groups,
    "test_ragged_table_of_mixed_dtypes and -8",
    "test_parameters_that_end and -2049",
    "test_groups",
    # and the solvers of a warp and of a block.
    "test_gram_solve and -20-None",
    "test_backends_agree and -5",
    "test_backends_agree and -40",
    "test_backends_agree and -128",
)
"""For racecheck, under which a kernel takes ten to a hundred times as long."""


def expression(backends: str, picks: tuple[str, ...]) -> str:
    """For pytest's -k."""
    return f"({backends}) and (({') or ('.join(picks)}))"
