"""What solving takes in memory, and that slices change no bit."""

import pytest
import torch
from held_memory import HeldBytes

from vlmq import linalg
from vlmq.formats import get_format, row_slices
from vlmq.formats import weight as weight_module
from vlmq.solvers import run_recipe


def problem(out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2 * in_features, in_features, generator=g)
    return torch.randn(out_features, in_features, generator=g), x.T @ x / len(x)


def run(recipe, target, hessian, format="int4", group_size=32):
    options = {"n_sweeps": 1} if "cd" in recipe else {}
    return run_recipe(
        *(recipe, target, target, hessian, get_format(format), group_size),
        generator=torch.Generator(),
        options=options,
    )


# Beside weight, target and hessian. The gradient of a group (32 of 768 columns here) and slices are in it.
@pytest.mark.parametrize(("recipe", "bytes_per_weight"), [("rtn", 8), ("gptq", 9), ("gptq+cd", 17)])
def test_few_bytes_are_held_for_each_weight(recipe, bytes_per_weight, monkeypatch):
    monkeypatch.setattr(weight_module, "SLICE_VALUES", 2**15)
    monkeypatch.setattr(linalg, "SLICE_COLUMNS", 128)
    target, hessian = problem(3072, 768)
    with HeldBytes() as memory:
        run(recipe, target, hessian)
    assert memory.peak < bytes_per_weight * target.numel() + 1.2 * hessian.nbytes


def test_wide_layers_hold_one_matrix_of_the_hessians_size():
    target, hessian = problem(16, 640)
    with HeldBytes() as memory:
        run("gptq+cd", target, hessian)
    assert 0.9 * hessian.nbytes < memory.peak < 1.4 * hessian.nbytes


@pytest.mark.parametrize("recipe", ["rtn", "gptq+cd", "kmeans+cd"])
@pytest.mark.parametrize("format", ["int4", "ternary2"])
def test_slices_change_no_bit(recipe, format, monkeypatch):
    target, hessian = problem(197, 200)
    made = []
    for n_values, n_columns in ((2**18, 512), (2**10, 32)):
        monkeypatch.setattr(weight_module, "SLICE_VALUES", n_values)
        monkeypatch.setattr(linalg, "SLICE_COLUMNS", n_columns)
        made.append(run(recipe, target, hessian, format))
    whole, sliced = made
    assert torch.equal(whole.codes, sliced.codes)
    assert torch.equal(whole.scales, sliced.scales)
    assert torch.equal(whole.dequantize(torch.bfloat16), sliced.dequantize(torch.bfloat16))


@pytest.mark.parametrize(("n_rows", "n_columns"), [(1, 5), (63, 4096), (64, 4096), (191, 4096), (1000, 3000)])
def test_slices_cover_all_rows_and_none_is_short(n_rows, n_columns):
    slices = list(row_slices(n_rows, n_columns))
    assert [row for rows in slices for row in range(n_rows)[rows]] == list(range(n_rows))
    lengths = [rows.stop - rows.start for rows in slices]
    assert lengths[-1] == max(lengths)
    assert all(length % weight_module.SLICE_ROWS == 0 for length in lengths[:-1])
