"""Llama 4's experts, which get a stack of tokens each: solved on the rows that are not zero, at their true error."""

import more_families
import pytest
import torch
from torch import Tensor

import vlmq
from vlmq import expert_solving
from vlmq.calib.statistics import sum_rows
from vlmq.linalg import proxy_loss
from vlmq.linear import QuantLinear

PATH = "language_model.model.layers.1.feed_forward.experts"
OVERRIDES: dict[str, str | None] = {"*": None, f"{PATH}.*": "int3-g16"}


def stacks(model, batch) -> Tensor:
    """(n_experts, n_tokens, in_features), what enters the experts."""
    seen: list[Tensor] = []
    handle = model.get_submodule(PATH).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0].unflatten(0, (4, -1))


def test_second_moments_are_those_of_the_rows_routed_to_the_expert():
    model, batch = more_families.build("llama4"), more_families.inputs("llama4", rows=3)
    experts, found = model.get_submodule(PATH), stacks(model, batch)
    weights = [w.detach().clone().T for w in experts.gate_up_proj]  # type: ignore[union-attr]
    vlmq.quantize(model, [batch], overrides=OVERRIDES, solver="rtn", alpha=0)
    assert sum(int(rows.any(1).sum()) for rows in found) == found.shape[1]
    for number, (rows, weight) in enumerate(zip(found, weights, strict=True)):
        layer = model.get_submodule(f"{PATH}.{number}.gate_up_proj")
        assert isinstance(layer, QuantLinear)
        assert layer.report is not None
        assert layer.report.n_tokens == int(rows.any(1).sum()) > 0
        hessian = rows.T @ rows / layer.report.n_tokens
        hessian += layer.report.damp * hessian.diagonal().mean() * torch.eye(64)
        expected = proxy_loss(layer.dequantize(), weight, hessian).sum()
        expected /= proxy_loss(0 * weight, weight, hessian).sum()
        assert layer.report.proxy_loss == pytest.approx(float(expected), rel=1e-3)


def test_the_counterpart_of_a_row_is_the_original_one_or_itself_where_there_was_none(monkeypatch):
    model, batch = more_families.build("llama4"), more_families.inputs("llama4", rows=3)
    original, seen = stacks(model, batch), []

    def watch(rows, in_features, where):
        rows = list(rows)
        seen.append((where, rows))
        return sum_rows(iter(rows), in_features, where)

    monkeypatch.setattr(expert_solving, "sum_rows", watch)
    overrides = {"*.experts.*": None, f"{PATH}.*": "int8-g16"}
    vlmq.quantize(model, [batch], "binary-g16", overrides=overrides, alpha=1.0)
    before = original.any(dim=2)
    n_counterparts = n_alone = 0
    for number in range(4):
        for u, _, f in next(rows for where, rows in seen if f"{PATH[-7:]}.{number}.gate_up" in where):
            wanted = original[number][before[number]]
            is_original = torch.tensor([bool((wanted == row).all(1).any()) for row in f])
            assert torch.equal(f[~is_original], u[~is_original])
            n_counterparts += int(is_original.sum())
            n_alone += int((~is_original).sum())
    assert n_counterparts > 10
    assert n_alone > 0
