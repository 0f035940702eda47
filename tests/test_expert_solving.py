"""Fused experts end to end: solved on the tokens routed to them, packed, saved, loaded; and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import Tensor, nn

import vlmq
from vlmq import expert_solving
from vlmq.calib.block import Block
from vlmq.calib.statistics import sum_rows
from vlmq.exports.export import export_model
from vlmq.families.experts import UnfusedExperts, is_fused
from vlmq.linalg import proxy_loss
from vlmq.linear import QuantLinear

FAMILY = "qwen3_vl_moe"
ONLY_EXPERTS = {"*": None, "*.experts.*": "int4-g16"}
PATH = "model.language_model.layers.{}.mlp.experts"


def experts_of(model, layer: int = 0) -> nn.Module:
    return model.get_submodule(PATH.format(layer))


def logits(model, batch) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def routed(model, batches, layer: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """What enters the experts of one layer: tokens, chosen experts, weights, over all batches."""
    seen: list[tuple[Tensor, ...]] = []
    handle = experts_of(model, layer).register_forward_pre_hook(lambda _, args: seen.append(args))
    for batch in batches:
        logits(model, batch)
    handle.remove()
    tokens, chosen, weights = (torch.cat(parts) for parts in zip(*seen, strict=True))
    return tokens, chosen, weights


def test_second_moments_are_those_of_the_tokens_routed_to_the_expert():
    """The proxy loss of the report, computed again from the tokens and their routing weights."""
    model, batches = tiny_models.build(FAMILY), tiny_models.inputs(FAMILY, 3, rows=2)
    tokens, chosen, weights = routed(model, batches)
    original: list[Tensor] = [w.detach().clone() for w in experts_of(model).gate_up_proj]  # type: ignore[union-attr]
    overrides = {"*": None, PATH.format(0) + ".*": "int3-g16"}
    vlmq.quantize(model, batches, overrides=overrides, solver="rtn", alpha=0)
    for number, weight in enumerate(original):
        token, place = (chosen == number).nonzero(as_tuple=True)
        layer = model.get_submodule(f"{PATH.format(0)}.{number}.gate_up_proj")
        assert isinstance(layer, QuantLinear)
        assert layer.report is not None
        assert layer.report.n_tokens == len(token) > 0
        p = weights[token, place].detach().square()
        hessian = (tokens[token].T * p) @ tokens[token] / p.sum()
        hessian += layer.report.damp * hessian.diagonal().mean() * torch.eye(64)
        expected = (
            proxy_loss(layer.dequantize(), weight, hessian).sum()
            / proxy_loss(0 * weight, weight, hessian).sum()
        )
        assert layer.report.proxy_loss == pytest.approx(float(expected), rel=1e-3)
        assert layer.report.n_effective == pytest.approx(float(p.sum() ** 2 / p.square().sum()), rel=1e-4)


def test_an_expert_that_no_token_reaches_is_solved_by_its_weights_alone():
    model, batches = tiny_models.build(FAMILY), tiny_models.inputs(FAMILY, 2)
    gate = model.get_submodule("model.language_model.layers.0.mlp.gate")
    gate.weight.data[2] = -1e3 * routed(model, batches)[0].mean(0).sign()  # type: ignore[index,operator,union-attr]
    chosen = routed(model, batches)[1]
    unseen = sorted(set(range(4)) - set(chosen.flatten().tolist()))
    assert unseen == [2]
    weight = experts_of(model).down_proj[2].clone()  # type: ignore[index]
    vlmq.quantize(model, batches, "int2-g16", overrides=ONLY_EXPERTS | {"*.experts.*": "int2-g16"})
    for number in range(4):
        layer = model.get_submodule(f"{PATH.format(0)}.{number}.down_proj")
        assert isinstance(layer, QuantLinear)
        assert layer.report is not None
        is_noted = any("no calibration token" in note for note in layer.report.notes)
        assert is_noted == (number in unseen)
        assert (layer.report.n_tokens == 0) == (number in unseen)
    packed = model.get_submodule(f"{PATH.format(0)}.2.down_proj")
    assert isinstance(packed, QuantLinear)
    assert (packed.dequantize() - weight).norm() < 0.5 * weight.norm()


def test_targets_are_shifted_towards_what_the_original_expert_makes_of_the_same_tokens(monkeypatch):
    """Experts at eight bits behind layers at two: shifted, their outputs for the drifted tokens are nearer."""
    batches, errors = tiny_models.inputs(FAMILY, 12, rows=4), []
    before = tiny_models.build(FAMILY)
    original = UnfusedExperts(experts_of(before, 1))
    wanted = routed(before, batches, 1)[0]
    overrides = {"*.experts.*": None, PATH.format(1) + ".*": "int8-g16"}
    for _ in range(2):
        model = tiny_models.build(FAMILY)
        vlmq.quantize(model, batches, "int2-g16", overrides=overrides, alpha=1.0, options={"damp": 1e-4})
        experts, (tokens, chosen, weights) = experts_of(model, 1), routed(model, batches, 1)
        assert isinstance(experts, UnfusedExperts)
        with torch.no_grad():
            made, due = experts(tokens, chosen, weights), original(wanted, chosen, weights)
        errors.append(float((made - due).norm() / due.norm()))
        monkeypatch.setattr(
            expert_solving, "sum_rows", lambda rows, *a: sum_rows(((u, s, None) for u, s, _ in rows), *a)
        )
    assert errors[0] < 0.9 * errors[1]


def test_padding_does_not_count(monkeypatch):
    model, batch = tiny_models.build(FAMILY), tiny_models.inputs(FAMILY, 1, rows=2)[0]
    batch["attention_mask"][1, -3:] = 0
    tokens, chosen, _ = routed(model, [batch])
    valid = batch["attention_mask"].flatten().bool()
    vlmq.quantize(model, [batch], overrides=ONLY_EXPERTS, solver="rtn")
    for number in range(4):
        report = model.get_submodule(f"{PATH.format(0)}.{number}.gate_up_proj").report
        assert report is not None
        assert report.n_tokens == int((chosen[valid] == number).any(1).sum())  # type: ignore[union-attr]
    assert len(tokens) == 24


@pytest.mark.parametrize(
    "saliency", ["uniform", "block_grad", "loss_grad", "act_norm", "attn_received", "redundancy"]
)
def test_every_saliency_and_solver_works(saliency):
    model, batches = tiny_models.build(FAMILY), tiny_models.inputs(FAMILY, 2, rows=2)
    for batch in batches:
        batch["labels"] = batch["input_ids"]
    vlmq.quantize(model, batches, "int4-g16", saliency=saliency)
    assert isinstance(experts_of(model), UnfusedExperts)


def test_learning_reaches_the_experts():
    batches = tiny_models.inputs(FAMILY, 4, rows=2)
    scales = []
    for solver in ("rtn", "rtn+learned"):
        model = tiny_models.build(FAMILY)
        vlmq.quantize(model, batches, "int2-g16", solver=solver)
        scales.append([m.scales.clone() for m in experts_of(model).modules() if isinstance(m, QuantLinear)])
    assert any(not torch.equal(a, b) for a, b in zip(*scales, strict=True))


@pytest.mark.parametrize("family", [FAMILY])
def test_logits_before_saving_and_after_loading_are_the_same_bits(family, tmp_path):
    model, batches = tiny_models.build(family, torch.bfloat16), tiny_models.inputs(family, 2)
    plan = vlmq.plan(model, "ternary-g32")
    vlmq.quantize(model, batches, "ternary-g32")
    vlmq.save(model, tmp_path / "a")
    reloaded = vlmq.load(tmp_path / "a")
    assert torch.equal(logits(reloaded, batches[0]), logits(model, batches[0]))
    assert set(plan.schemes) == {n for n, m in reloaded.named_modules() if isinstance(m, QuantLinear)}
    vlmq.save(reloaded, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    report = model.get_submodule(f"{PATH.format(1)}.3.down_proj").report
    assert reloaded.get_submodule(f"{PATH.format(1)}.3.down_proj").report == report


def test_a_failure_puts_the_fused_experts_back(monkeypatch):
    model, batches = tiny_models.build(FAMILY), tiny_models.inputs(FAMILY, 1)
    fused, before = experts_of(model), logits(model, batches[0])

    def fail(*args, **kwargs):
        raise RuntimeError("stop here")

    monkeypatch.setattr(Block, "settle", fail)
    with pytest.raises(RuntimeError, match="stop here"):
        vlmq.quantize(model, batches, "int4-g16")
    assert experts_of(model) is fused
    assert torch.equal(logits(model, batches[0]), before)


def test_experts_are_packed_together_or_not_at_all():
    model, batches = tiny_models.build(FAMILY), tiny_models.inputs(FAMILY, 1)
    with pytest.raises(
        ValueError, match=r"4 of 8 layers would stay in full precision.*None to .*experts\.\*'"
    ):
        vlmq.plan(model, "int4-g16", overrides={"*.down_proj": None})
    mixed = vlmq.plan(model, "int4-g16", overrides={"*.experts.*.down_proj": "int3-g16"})
    assert {s.name for n, s in mixed.schemes.items() if "experts" in n} == {"int4-g16", "int3-g16"}
    vlmq.quantize(model, batches, "int4-g16", overrides={"*.experts.*": None}, solver="rtn")
    assert is_fused(experts_of(model))


def test_dequantized_the_model_has_its_fused_experts_again():
    model = tiny_models.build(FAMILY)
    vlmq.quantize(model, tiny_models.inputs(FAMILY, 1), "int8-g16", solver="rtn")
    expected = [model.get_submodule(f"{PATH.format(1)}.{e}.down_proj").dequantize() for e in range(4)]  # type: ignore[operator]
    plain = model.dequantize()
    assert is_fused(experts_of(plain))
    assert torch.equal(experts_of(plain, 1).down_proj, torch.stack(expected))  # type: ignore[arg-type]
    assert not any(isinstance(m, QuantLinear) for m in plain.modules())
    assert bool(logits(plain, tiny_models.inputs(FAMILY, 1)[0]).isfinite().all())


def test_a_load_without_vlmq_stops_also_where_only_experts_are_packed(tmp_path):
    model = tiny_models.build(FAMILY)
    vlmq.quantize(model, tiny_models.inputs(FAMILY, 1), overrides=ONLY_EXPERTS, solver="rtn")
    vlmq.save(model, tmp_path / "packed")
    code = f"from transformers import AutoModelForImageTextToText as A; A.from_pretrained({str(tmp_path / 'packed')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "import_vlmq_before_loading_this_checkpoint" in done.stderr
    assert torch.equal(
        logits(vlmq.load(tmp_path / "packed"), tiny_models.inputs(FAMILY, 1)[0]),
        logits(model, tiny_models.inputs(FAMILY, 1)[0]),
    )


def test_exports_refuse_experts_before_anything_is_written(tmp_path):
    model = tiny_models.build(FAMILY)
    vlmq.quantize(model, tiny_models.inputs(FAMILY, 1), "int4-sym-g32", solver="rtn")
    with pytest.raises(ValueError, match="packed experts, for which it has no layout"):
        export_model(model, "gptq", tmp_path / "out")
    assert not Path(tmp_path / "out").exists()
