"""The Triton kernels of the packed linear layer in Triton's interpreter: every format, group size, shape and dtype.

Tolerances: float16 rounds y, and W in the last, shorter block of a row; the interpreter truncates to bfloat16.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_process import interpreter  # noqa: F401

from vlmq.formats import FORMATS, GROUP_SIZES

TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 7e-3}
HALVES = (torch.float16, torch.bfloat16)

# (block_n, block_m, blocks, splits, warps, stages)
SMALL = (16, 8, 1, 1, 4, 2)
SPLIT = (16, 16, 1, 3, 4, 2)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_fused_kernel_multiplies_by_the_weight(interpreter, name, group_size):  # noqa: F811
    dtype = HALVES[(list(FORMATS).index(name) + GROUP_SIZES.index(group_size)) % 2]
    error = interpreter("linear_error", name, group_size, dtype, 3, (21, 333), fused=SPLIT)
    assert error < TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 8, 16, 17, 64, 257])
@pytest.mark.parametrize("shape", [(21, 333), (16, 256), (5, 127)])
def test_layer_multiplies_by_the_weight_at_every_size(interpreter, name, group_size, dtype, n_tokens, shape):  # noqa: F811
    error = interpreter("linear_error", name, group_size, dtype, n_tokens, shape)
    # In bfloat16 both y and W of a shorter last block are truncated, by 2^-7 at most, which few outputs do not average.
    assert error < (TOLERANCE[dtype] if dtype == torch.float16 else 2**-6)


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 8, 16, 17, 64, 257])
@pytest.mark.parametrize(("name", "group_size"), [("int4", 64), ("ternary", None), ("binary2", 128)])
def test_layer_takes_any_number_of_tokens(interpreter, name, group_size, n_tokens):  # noqa: F811
    error = interpreter("linear_error", name, group_size, torch.float16, n_tokens, (21, 301))
    assert error < TOLERANCE[torch.float16]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("codes", ["smallest", "largest"])
def test_codes_and_zero_points_at_the_extremes(interpreter, name, codes):  # noqa: F811
    for dtype in HALVES:
        error = interpreter(
            "linear_error", name, 64, dtype, 2, (16, 256), codes=codes, fused=SMALL, has_bias=False
        )
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("in_features", [1, 15, 16, 127, 128, 129, 256, 257])
@pytest.mark.parametrize(("name", "group_size"), [("int3", 16), ("binary", None), ("int8", 32)])
def test_rows_of_any_length(interpreter, name, group_size, in_features):  # noqa: F811
    fused = (16, 16, 1 if group_size else 2, 2, 4, 2)
    error = interpreter(
        "linear_error", name, group_size, torch.float16, 2, (17, in_features), fused=fused, has_bias=False
    )
    assert error < TOLERANCE[torch.float16]


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("name", ["int4", "int3", "ternary", "binary-sym", "ternary2", "binary2"])
def test_iterations_of_several_blocks(interpreter, name, blocks):  # noqa: F811
    fused = (32, 16, blocks, 2, 4, 2)
    error = interpreter("linear_error", name, None, torch.bfloat16, 2, (33, 5 * 128 + 40), fused=fused)
    assert error < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("fused", [SMALL, SPLIT])
@pytest.mark.parametrize(("name", "group_size"), [("int4", 32), ("ternary", None), ("binary2", 128)])
def test_layers_in_one_launch_are_those_of_one_each(interpreter, name, group_size, fused, has_bias):  # noqa: F811
    options = {"fused": fused, "has_bias": has_bias}
    assert interpreter("joint_differences", name, group_size, 3, (37, 5, 16), 2 * 128 + 40, **options) == 0


@pytest.mark.parametrize(("n_tokens", "widths"), [(1, (16, 1)), (17, (3, 20, 33, 2)), (257, (5, 9))])
def test_any_number_of_layers_and_tokens_in_one_launch(interpreter, n_tokens, widths):  # noqa: F811
    assert interpreter("joint_differences", "int3", 64, n_tokens, widths, 256) == 0


def test_more_splits_than_blocks(interpreter):  # noqa: F811
    fused = (16, 16, 1, 8, 4, 2)
    assert interpreter("linear_error", "int4", 128, torch.float16, 2, (17, 300), fused=fused) < 6e-4


def test_split_sums_are_the_same_each_time(interpreter):  # noqa: F811
    assert interpreter("same_bits", "int4", 64, 3, (40, 1024), (16, 16, 1, 4, 4, 2))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    group_size=st.sampled_from(GROUP_SIZES),
    dtype=st.sampled_from((torch.float32, *HALVES)),
    n_tokens=st.integers(1, 40),
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 520),
)
def test_layer_multiplies_by_the_weight_of_any_shape(
    interpreter,  # noqa: F811
    name,
    group_size,
    dtype,
    n_tokens,
    out_features,
    in_features,
):
    shape = (out_features, in_features)
    error = interpreter("linear_error", name, group_size, dtype, n_tokens, shape, has_bias=False)
    assert error < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_dequantized_weight_is_the_reference(interpreter, name, group_size):  # noqa: F811
    for dtype in (torch.float32, torch.float16):
        assert interpreter("dequantize_differences", name, group_size, dtype, (19, 333)) == (0, 0.0)


@pytest.mark.parametrize("name", ["int4", "ternary2"])
def test_dequantized_weight_in_bfloat16_is_one_step_off_at_most(interpreter, name):  # noqa: F811
    _, largest = interpreter("dequantize_differences", name, 64, torch.bfloat16, (19, 333))
    assert largest <= 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "group_size"), [("int4", 64), ("binary2", None)])
def test_gradient_multiplies_by_the_transpose(interpreter, name, group_size, dtype):  # noqa: F811
    assert interpreter("gradient_error", name, group_size, dtype, (9, 200)) < TOLERANCE[dtype]
