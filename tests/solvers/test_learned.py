"""The grid as parameters: what is learned is what is stored, for every format and ragged groups."""

import pytest
import torch

from vlmq.formats import FORMATS, get_format
from vlmq.solvers import run_recipe
from vlmq.solvers.learned import LearnableGrid, LearnedOptions, parameter_groups


def quantized(format: str, group_size: int | None, out_features: int = 5, in_features: int = 37):
    W = torch.randn(out_features, in_features)
    return run_recipe(
        "rtn",
        W,
        W,
        torch.eye(in_features),
        get_format(format),
        group_size,
        generator=torch.Generator(),
        options={},
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group_size", [16, None])
def test_start_is_the_quantized_weight(format, group_size):
    start = quantized(format, group_size)
    grid = LearnableGrid(start)
    assert torch.equal(grid(), start.dequantize())
    stored = grid.stored()
    assert torch.equal(stored.codes, start.codes)
    assert torch.equal(stored.scales, start.scales)
    assert stored.zeros is None or torch.equal(stored.zeros, start.zeros)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [0.1, 1e6])
def test_forward_is_what_is_stored_wherever_the_parameters_go(format, size):
    grid = LearnableGrid(quantized(format, 16))
    with torch.no_grad():
        for parameter in grid.parameters():
            parameter.add_(size * torch.randn(parameter.shape))
    grid.project()
    weight, stored = grid(), grid.stored()
    assert torch.isfinite(weight).all()
    assert torch.equal(weight, stored.dequantize())


@pytest.mark.parametrize("format", ["int3", "int2-sym", "ternary2", "binary"])
def test_gradient_is_that_of_the_formula(format):
    grid = LearnableGrid(quantized(format, 16))
    out = torch.randn(grid().shape)
    (grid() * out).sum().backward()
    levels = torch.tensor(grid.start.format.levels)[grid.start.codes.long()]  # (out, in, n_terms)
    zero = 0.0
    if grid.start.zeros is not None:
        stored = grid.start.zeros.float() * grid.start.format.zero_step
        zero = stored.repeat_interleave(16, 1)[:, :37, None]
    products = (levels - zero) * out[..., None]
    expected = torch.stack([p.sum(1) for p in products.split(16, 1)], 1) * grid.start.scales.float()
    assert grid.multipliers.grad is not None
    torch.testing.assert_close(grid.multipliers.grad[:, :, 0], expected)
    if grid.zeros is not None:
        sums = torch.stack([p.sum(1) for p in out.split(16, 1)], 1)
        assert grid.zeros.grad is not None
        torch.testing.assert_close(grid.zeros.grad[:, :, 0, 0], -sums * grid.start.scales[..., 0].float())


@pytest.mark.parametrize(("format", "reach"), [("int4", 7.5), ("ternary", 1), ("ternary2", 1), ("binary", 1)])
def test_a_step_of_a_scale_moves_the_outermost_level_by_the_rate(format, reach):
    groups = parameter_groups([LearnableGrid(quantized(format, 16))], 0.3)
    assert groups[0]["lr"] == pytest.approx(0.3 / reach)
    assert [g["lr"] for g in groups[1:]] == ([0.3] if get_format(format).has_zero else [])


@pytest.mark.parametrize("wrong", [{"n_epochs": 0}, {"lr": 0.0}, {"validation_share": 1.0}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="expected n_epochs >= 1, lr > 0 and validation_share"):
        LearnedOptions(**wrong)
