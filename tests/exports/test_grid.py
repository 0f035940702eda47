"""Whole numbers with one scale a group: the same values as the packed weight, or a reason."""

import pytest
import torch
from packed_models import round_to_nearest

from vlmq.exports.grid import integer_grid, regroup, share, whole_groups
from vlmq.formats import FORMATS, QuantizedWeight
from vlmq.scheme import parse_scheme

WHOLE = ("int8", "int8-sym", "int4-sym", "int3-sym", "int2-sym", "ternary", "binary-sym")


def weight_of(scheme, shape=(24, 80)):
    return round_to_nearest(torch.randn(shape) + 0.1, parse_scheme(scheme))


def on_whole_zeros(scheme):
    """A weight whose zero points stand on a level."""
    w = weight_of(scheme)
    step = round(1 / w.format.zero_step)
    return QuantizedWeight(w.codes, w.scales, w.zeros // step * step, w.format, w.group_size)


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_is_written_exactly_or_refused_with_a_reason(fmt):
    weight = weight_of(f"{fmt}-g32")
    if fmt in WHOLE:
        grid = integer_grid(weight)
        assert torch.equal(grid.dequantize(), weight.dequantize())
        low, high = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1)
        assert low <= grid.values.min()
        assert grid.values.max() < high
    else:
        with pytest.raises(ValueError, match=r"planes|stand between two whole numbers"):
            integer_grid(weight)


@pytest.mark.parametrize("fmt", ["int4", "int3", "int2", "binary", "ternary-offset"])
def test_zero_points_that_stand_on_a_level_are_kept(fmt):
    weight = on_whole_zeros(f"{fmt}-g16")
    grid = integer_grid(weight)
    assert grid.zeros is not None
    assert torch.equal(grid.dequantize(), weight.dequantize())


def test_zero_points_in_the_middle_are_none():
    weight = weight_of("int4-channel")
    middle = QuantizedWeight(
        weight.codes, weight.scales, torch.full_like(weight.zeros, 128), weight.format, None
    )
    assert integer_grid(middle).zeros is None
    assert torch.equal(integer_grid(middle).dequantize(), middle.dequantize())


@pytest.mark.parametrize(
    ("scheme", "size"), [("int4-sym-g32", 16), ("int4-sym-g64", 16), ("ternary-channel", None)]
)
def test_groups_become_whole_without_changing_a_value(scheme, size):
    weight = weight_of(scheme)
    grid = whole_groups(integer_grid(weight))
    assert grid.group_size == size
    assert torch.equal(grid.dequantize(), weight.dequantize())


def test_a_smaller_group_says_the_same():
    grid = integer_grid(on_whole_zeros("int4-g64"))
    assert torch.equal(regroup(grid, 16).dequantize(), grid.dequantize())


def test_fused_layers_share_bits_groups_and_zero_points():
    grids = [integer_grid(w) for w in (weight_of("ternary-channel"), on_whole_zeros("int4-g16"))]
    shared = share(grids)
    assert {(g.bits, g.group_size, g.zeros is None) for g in shared} == {(4, 16, False)}
    for before, after in zip(grids, shared, strict=True):
        assert torch.equal(before.dequantize(), after.dequantize())
