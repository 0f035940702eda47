import pytest
import torch
from torch import nn

from vlmq.formats import FORMATS, get_format
from vlmq.linear import QuantLinear
from vlmq.solvers.rtn import fit_groups
from vlmq.straight_through import CELL, TRAINABLE, TrainedLinear


def layer_of(name: str, group_size: int | None = 16) -> tuple[QuantLinear, torch.Tensor]:
    """A layer whose codes are not the nearest ones, as those of feedback solvers, and the weight that it stands for."""
    weight = torch.randn(6, 40)
    start = fit_groups(weight + 0.3 * torch.randn(6, 40), torch.ones(40), get_format(name), group_size, 4)
    return QuantLinear.from_quantized(start, torch.randn(6)), weight


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("trained", [{"scales"}, set(TRAINABLE)])
def test_starts_and_packs_as_the_packed_layer(name, trained):
    layer, weight = layer_of(name)
    made = TrainedLinear(layer, weight, trained)
    x = torch.randn(3, 40)
    torch.testing.assert_close(made(x), layer(x), rtol=0.03, atol=0.1)
    assert torch.equal(made.dense(), layer.dequantize())
    again = made.packed("note")
    assert torch.equal(again.qweight, layer.qweight)
    assert torch.equal(again.scales, layer.scales)
    assert again.zeros is None or torch.equal(again.zeros, layer.zeros)


def test_latents_lie_in_the_cells_of_the_codes_as_near_to_the_weight_as_that_allows():
    layer, weight = layer_of("int2")
    made = TrainedLinear(layer, weight, {"weights"})
    start = layer.quantized_weight()
    distance = made.latents - start.codes
    assert float(distance.abs().max().detach()) <= CELL + 1e-6
    is_inside = distance.abs() < CELL - 1e-4
    scale = start.scales.float().repeat_interleave(16, 1)[:, :40, 0]
    zero = (start.zeros.float() * start.format.zero_step).repeat_interleave(16, 1)[:, :40]
    back = ((made.latents - zero) * scale).detach()
    assert 0.2 < float(is_inside.float().mean()) < 1
    torch.testing.assert_close(back[is_inside], weight[is_inside])


@pytest.mark.parametrize("name", ["ternary", "binary", "int2", "int4"])
def test_the_gradient_of_a_latent_is_that_of_the_weight_times_the_step(name):
    layer, weight = layer_of(name)
    made = TrainedLinear(layer, weight, {"weights"})
    slope = torch.randn(6, 40)
    (made.dense() * slope).sum().backward()
    step = made.format.levels[1][0] - made.format.levels[0][0]
    expected = slope * step * layer.scales.float().repeat_interleave(16, 1)[:, :40, 0]
    n = made.format.n_levels
    is_inside = (made.latents > 0) & (made.latents < n - 1)
    torch.testing.assert_close(made.latents.grad[is_inside], expected[is_inside])
    assert made.latents.grad[(made.latents < 0) | (made.latents > n - 1)].abs().sum() == 0


def test_a_step_down_the_gradient_lowers_the_error_and_is_what_is_packed():
    layer, weight = layer_of("ternary-offset", None)
    made = TrainedLinear(layer, weight, set(TRAINABLE))
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    errors = []
    for _ in range(40):
        error = (made.dense() - weight).square().mean()
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
        made.keep_in_range()
        errors.append(float(error.detach()))
    assert min(errors) < 0.97 * errors[0]
    assert torch.equal(made.dense(), made.packed("").dequantize())
    assert made.packed("").bias.equal(made.bias)


def test_thresholds_move_codes_without_weights():
    layer, weight = layer_of("ternary")
    made = TrainedLinear(layer, weight, {"thresholds"})
    assert [n for n, p in made.named_parameters() if p.requires_grad] == ["shifts"]
    with torch.no_grad():
        made.shifts[..., 0] -= 0.4
        made.shifts[..., 1] += 0.4
    zeros_before = int((layer.dequantize() == 0).sum())
    assert int((made.packed("").dequantize() == 0).sum()) > zeros_before


def test_soft_codes_come_near_to_hard_ones_as_they_sharpen():
    layer, weight = layer_of("ternary")
    made = TrainedLinear(layer, weight, {"weights"})
    hard, far = made.dense(), []
    for sharpness in (4.0, 40.0, 400.0):
        made.sharpness = sharpness
        far.append(float((made.dense() - hard).square().mean().detach()))
    assert far[0] > 4 * far[1] > 4 * far[2]


def test_formats_of_many_levels_have_no_thresholds():
    layer, weight = layer_of("int8")
    made = TrainedLinear(layer, weight, {"thresholds", "scales"})
    assert made.shifts is None
    assert not made.is_code_trained
    assert isinstance(made.factors, nn.Parameter)
