"""QuantizedWeight: the one formula against a loop over single weights, and parts that do not fit."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import random_weight

from vlmq.formats import FORMATS, GROUP_SIZES, QuantizedWeight, expand_groups, get_format, n_groups


def weight_by_hand(weight: QuantizedWeight, row: int, column: int) -> float:
    """One weight by the formula, in Python's float64."""
    fmt = weight.format
    group = 0 if weight.group_size is None else column // weight.group_size
    zero = 0.0 if weight.zeros is None else int(weight.zeros[row, group]) * 2 ** (fmt.bits - 8)
    level = fmt.levels[int(weight.codes[row, column])]
    return sum(float(weight.scales[row, group, t]) * (level[t] - zero) for t in range(fmt.n_terms))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    group_size=st.sampled_from(GROUP_SIZES),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 150)),
    seed=st.integers(0, 2**16),
)
def test_dequantize_is_the_formula(name, group_size, shape, seed):
    torch.manual_seed(seed)
    weight = random_weight(name, *shape, group_size)
    by_hand = [[weight_by_hand(weight, o, i) for i in range(shape[1])] for o in range(shape[0])]
    torch.testing.assert_close(
        weight.dequantize().double(), torch.tensor(by_hand, dtype=torch.float64), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("bits", "zero", "expected"), [(8, 3, 3.0), (4, 8, 0.5), (2, 96, 1.5), (1, 64, 0.5)])
def test_zero_point_is_fixed_point(bits, zero, expected):
    fmt = get_format("binary" if bits == 1 else f"int{bits}")
    weight = QuantizedWeight(
        codes=torch.zeros(1, 4, dtype=torch.uint8),
        scales=torch.ones(1, 1, 1, dtype=torch.float16),
        zeros=torch.full((1, 1), zero, dtype=torch.uint8),
        format=fmt,
        group_size=None,
    )
    assert torch.equal(weight.dequantize(), torch.full((1, 4), -expected))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("in_features", [1, 15, 16, 127, 128, 129, 576, 3420, 4304])
def test_groups_cover_the_row_and_the_last_may_be_shorter(group_size, in_features):
    count = n_groups(in_features, group_size)
    index = expand_groups(torch.arange(count)[None], group_size, in_features)[0]
    expected = [0 if group_size is None else i // group_size for i in range(in_features)]
    assert index.tolist() == expected
    assert index[-1] == count - 1


def test_expand_groups_keeps_further_dimensions_and_dtype():
    values = torch.arange(12, dtype=torch.uint8).view(2, 2, 3)
    assert expand_groups(values, 16, 20).shape == (2, 20, 3)
    assert torch.equal(expand_groups(values, 16, 20)[:, 16], values[:, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_rounds_once_to_the_dtype(dtype):
    weight = random_weight("int4", 5, 40, 16)
    assert torch.equal(weight.dequantize(dtype), weight.dequantize().to(dtype))


def with_part(**parts) -> QuantizedWeight:
    return dataclasses.replace(random_weight("int4", 3, 40, 16), **parts)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"codes": torch.zeros(3, 40)},
            r"codes of a int4 weight must be \(3, 40\) torch.uint8, got .* torch.float32",
        ),
        (
            {"scales": torch.zeros(3, 3, 1)},
            r"scales .* must be \(3, 3, 1\) torch.float16, got .* torch.float32",
        ),
        ({"scales": torch.zeros(3, 2, 1).half()}, r"scales .* got \(3, 2, 1\) torch.float16"),
        ({"scales": torch.zeros(3, 3, 2).half()}, r"scales .* got \(3, 3, 2\)"),
        (
            {"zeros": torch.zeros(3, 3, dtype=torch.int8)},
            r"zeros .* must be \(3, 3\) torch.uint8, got .* torch.int8",
        ),
        ({"zeros": torch.zeros(2, 3, dtype=torch.uint8)}, r"zeros .* got \(2, 3\)"),
        ({"zeros": None}, "format int4 needs zeros"),
        ({"format": get_format("int4-sym")}, "format int4-sym has no zeros"),
        ({"group_size": 24}, r"group size 24 is not offered; offered: \(16, 32, 64, 128, None\)"),
        ({"group_size": 32}, r"scales .* must be \(3, 2, 1\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        with_part(**parts)
