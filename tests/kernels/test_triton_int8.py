"""Decoding with 8-bit activations, in Triton's interpreter and as machine code."""

import pytest
import torch
from installed import older
from triton_process import interpreter  # noqa: F401

FORMATS = ["ternary", "ternary-offset", "int2", "int2-sym", "binary", "binary-sym", "int4", "int4-sym"]
# y is rounded to the dtype; the interpreter truncates to bfloat16.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 6e-3}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("group_size", [128, None])
def test_product_is_that_of_the_rounded_activations(interpreter, name, group_size):  # noqa: F811
    dtype = list(TOLERANCE)[(FORMATS.index(name) + (group_size is None)) % 3]
    assert interpreter("int8_error", name, group_size, dtype, 2, (21, 640)) < TOLERANCE[dtype]


@pytest.mark.parametrize("codes", ["smallest", "largest"])
@pytest.mark.parametrize("name", ["ternary", "binary", "int4"])
def test_codes_at_the_extremes(interpreter, name, codes):  # noqa: F811
    assert interpreter("int8_error", name, 128, torch.float32, 1, (8, 256), codes) < 1e-5


def test_more_columns_than_one_iteration(interpreter):  # noqa: F811
    assert interpreter("int8_error", "int2", None, torch.float32, 3, (5, 8192 + 128)) < 1e-5


def test_token_of_zeros_gives_the_bias(interpreter):  # noqa: F811
    assert interpreter("int8_of_zeros", "ternary")


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("name", "group_size"), [("int2", 128), ("ternary", None)])
def test_layers_in_one_launch_are_those_of_one_each(interpreter, name, group_size, has_bias):  # noqa: F811
    options = {"has_bias": has_bias, "rounds": True}
    assert interpreter("joint_differences", name, group_size, 2, (17, 8, 3), 1024, **options) == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_token_that_is_not_finite_does_not_come_out_as_numbers(interpreter, value):  # noqa: F811
    y = interpreter("int8_of_unusual", value)
    assert not y[0].isfinite().any()
    assert y[1].isfinite().all()


@pytest.mark.parametrize(
    ("name", "in_features", "group_size", "words"),
    [
        ("int8", 128, 0, "one plane of 1, 2 or 4 bits, not int8"),
        ("binary2", 128, 0, "one plane"),
        ("ternary", 130, 0, "multiples of 128, not 130"),
        ("ternary", 128, 64, "not groups of 64"),
    ],
)
def test_what_it_does_not_take_is_refused(name, in_features, group_size, words):
    pytest.importorskip("triton")
    from vlmq.kernels import triton_int8

    with pytest.raises(ValueError, match=words):
        triton_int8.quant_linear(
            torch.zeros(1, in_features),
            torch.zeros(1, 1),
            torch.zeros(1),
            None,
            None,
            name,
            in_features,
            group_size,
        )


@pytest.mark.parametrize(
    ("name", "group_size", "arch", "budget"),
    [
        *(("ternary", group_size, arch, 1.06) for group_size in (0, 128) for arch in (80, 90, 100, 120)),
        ("int2", 128, 90, 1.15),
        ("int2", 0, 90, 1.0),
        ("binary", 0, 90, 0.8),
        ("binary", 128, 90, 0.9),
    ],
)
@pytest.mark.parametrize("layers", [1, 3])
def test_machine_code_keeps_to_its_budget(name, group_size, arch, budget, layers):
    pytest.importorskip("triton")
    from triton_static import compile_kernel, kernel_format, skip_without_tools

    from vlmq.formats import get_format
    from vlmq.kernels import triton_int8

    skip_without_tools()
    pointers = {"p_words": "*i32", "p_x_scales": "*fp32", "p_weight": "*i32", "p_scales": "*fp16"}
    pointers |= {"p_zeros": "*u8" if get_format(name).has_zero else None, "p_bias": None, "p_y": "*fp32"}
    constants = {"FORMAT": kernel_format(name), "GROUP": group_size, "BLOCK_WORDS": 128, "ASM": True}
    constants["BLOCK_N"] = triton_int8.BLOCK_N
    code = compile_kernel(triton_int8.int8_matmul_kernel, arch, pointers, constants, layers=layers, warps=1)
    assert code.stack_bytes == 0
    assert code.loop["IDP"] > 0
    # Triton 3.6 brings the scales of a group into their places through shared memory; the block is one warp.
    assert code.loop["BAR"] <= (2 if older("triton", "3.7") else 0)
    n_weights = triton_int8.BLOCK_N * 128 * 32 // get_format(name).bits
    assert code.loop.total() / (n_weights / 32) <= budget
