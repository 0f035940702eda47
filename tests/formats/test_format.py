"""The table of formats: every entry is a grid that the packed layout can hold."""

import pytest
import torch

from vlmq.formats import FORMATS, GROUP_SIZES, get_format
from vlmq.kernels.packing import BITS

EXPECTED_LEVELS = {
    "int8": range(256),
    "int8-sym": range(-128, 128),
    "int4": range(16),
    "int4-sym": range(-8, 8),
    "int3": range(8),
    "int3-sym": range(-4, 4),
    "int2": range(4),
    "int2-sym": range(-2, 2),
    "ternary": (-1, 0, 1),
    "ternary-offset": (0, 1, 2),
    "binary": (0, 1),
    "binary-sym": (-1, 1),
}


@pytest.mark.parametrize("name", FORMATS)
def test_format_fits_the_packed_layout(name):
    fmt = get_format(name)
    assert fmt.name == name
    assert fmt.bits in BITS
    assert 2 <= fmt.n_levels <= 2**fmt.bits
    assert {len(level) for level in fmt.levels} == {fmt.n_terms}
    assert len(set(fmt.levels)) == fmt.n_levels


@pytest.mark.parametrize("name", FORMATS)
def test_format_of_one_plane_has_evenly_spaced_rising_levels(name):
    fmt = get_format(name)
    if fmt.n_terms == 1:
        levels = torch.tensor(fmt.levels)[:, 0]
        assert float(levels[1] - levels[0]) > 0
        assert torch.equal(levels.diff(), (levels[1] - levels[0]).expand(fmt.n_levels - 1))


@pytest.mark.parametrize(("name", "levels"), EXPECTED_LEVELS.items())
def test_levels_are_these(name, levels):
    assert [level for (level,) in get_format(name).levels] == list(levels)


@pytest.mark.parametrize(("name", "plane"), [("ternary2", (-1, 0, 1)), ("binary2", (-1, 1))])
def test_code_of_two_planes_is_the_pair_of_their_codes(name, plane):
    fmt = get_format(name)
    for code, level in enumerate(fmt.levels):
        high, low = divmod(code, len(plane))
        assert level == (plane[low], plane[high])


@pytest.mark.parametrize("name", FORMATS)
def test_zero_point_reaches_over_the_levels_in_steps_of_a_256th(name):
    fmt = get_format(name)
    assert fmt.zero_step * 256 == 2**fmt.bits
    if fmt.has_zero:
        assert fmt.levels[0][0] == 0
        assert 255 * fmt.zero_step >= fmt.levels[-1][0]


def test_formats_with_a_zero_point_are_these():
    assert {f.name for f in FORMATS.values() if f.has_zero} == {
        "int8",
        "int4",
        "int3",
        "int2",
        "ternary-offset",
        "binary",
    }


def test_unknown_format_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"format 'int5' is unknown; known: int8 int8-sym int4 .*binary2"):
        get_format("int5")


def test_group_sizes_are_these():
    assert GROUP_SIZES == (16, 32, 64, 128, None)
