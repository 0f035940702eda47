import copy

import pytest
import torch
from tiny_models import build, inputs

from vlmq.calib.tokens import ANSWER, IMAGE, PADDING, TEXT, CalibBatch
from vlmq.eval.agreement import agreement, kl_divergence


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return other


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_5_vl", "clip", "siglip"])
def test_agreement_with_itself_is_perfect(family):
    model = build(family)
    result = agreement(model, model, inputs(family, rows=2))
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert result.top1 == 1


@pytest.mark.parametrize("family", ["llava", "clip"])
def test_agreement_with_another_model_is_not_perfect(family):
    model = build(family)
    assert agreement(perturbed(model), model, inputs(family, rows=2)).kl > 1e-4


def test_agreement_equals_the_definition():
    model, ids = build("llama"), torch.randint(3, 190, (2, 6))
    other = perturbed(model)
    p, q = (m(input_ids=ids).logits[:, :-1].softmax(-1).double() for m in (model, other))
    result = agreement(other, model, [{"input_ids": ids}])
    assert result.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean().detach()), rel=1e-4)
    assert result.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert result.n_positions == 10


def test_agreement_counts_only_the_asked_kinds():
    kinds = torch.tensor([[TEXT, IMAGE, IMAGE, TEXT, ANSWER, PADDING]], dtype=torch.int8)
    batch = CalibBatch({"input_ids": torch.randint(3, 190, (1, 6))}, kinds)
    model = build("llama")
    assert agreement(model, model, [batch]).n_positions == 2
    assert agreement(model, model, [batch], kinds=(ANSWER,)).n_positions == 1


def test_agreement_does_not_see_padding():
    model, ids = build("llama"), torch.randint(3, 190, (1, 5))
    other = perturbed(model)
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], 1),
        "attention_mask": torch.tensor([[1] * 5 + [0] * 3]),
    }
    plain, masked = (agreement(other, model, [batch]) for batch in ({"input_ids": ids}, padded))
    assert masked.kl == pytest.approx(plain.kl, rel=1e-4)
    assert masked.n_positions == plain.n_positions


def test_agreement_without_a_position_is_an_error():
    batch = CalibBatch({"input_ids": torch.full((1, 3), 7)}, torch.full((1, 3), IMAGE, dtype=torch.int8))
    with pytest.raises(ValueError, match="no batch has a token of the kinds"):
        agreement(build("llama"), build("llama"), [batch])


def test_agreement_refuses_models_of_different_kind():
    other = build("llama")
    other.resize_token_embeddings(210)
    with pytest.raises(ValueError, match="not of one kind"):
        agreement(other, build("llama"), inputs("llama"))


def test_kl_divergence_is_finite_for_far_apart_logits():
    far = kl_divergence(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]))
    assert float(far) == pytest.approx(1e4)
