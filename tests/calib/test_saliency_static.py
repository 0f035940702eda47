"""Saliencies without gradients against their formulas, written out token by token."""

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from vlmq.calib import saliency_attention, saliency_static
from vlmq.calib.block import Block, BlockCall
from vlmq.calib.saliency import SALIENCIES, PostProcess, SaliencyContext
from vlmq.calib.saliency_attention import attn_received
from vlmq.calib.saliency_static import act_norm, redundancy
from vlmq.calib.saliency_tokens import count_tokens
from vlmq.calib.tokens import IMAGE, PADDING, TEXT, CalibBatch
from vlmq.calib.walk import walk_blocks
from vlmq.families import BlockSpec, describe

PLAIN = SaliencyContext(post=PostProcess(clip=1.0, floor=0.0))


def linear_block(
    *inputs: Tensor, kinds: Tensor, module: nn.Module | None = None, part: str = "language"
) -> Block:
    """A block of one linear layer that gets `inputs` as they are."""
    module = module or nn.Sequential(nn.Linear(inputs[0].shape[-1], 3))
    calls = [BlockCall((x,), {}) for x in inputs]
    n = len(calls)
    spec = BlockSpec("block", part)
    return Block(spec, module, module, calls, calls, [], [kinds] * n, list(range(n)), torch.device("cpu"))


def test_act_norm_is_a_power_of_the_norm():
    x = torch.randn(2, 4, 5) * torch.tensor([1, 2, 100, 5]).reshape(1, 4, 1)
    x[1, 3] = torch.nan
    kinds = torch.tensor([[TEXT, TEXT, IMAGE, TEXT], [TEXT, TEXT, IMAGE, PADDING]], dtype=torch.int8)
    block = linear_block(x, kinds=kinds)
    for exponent in (-2.0, 1.0):
        weight = act_norm(block, PLAIN, exponent=exponent)["0"][0].reshape(2, 4)
        for row, n in ((0, 4), (1, 3)):
            expected = x[row, :n].norm(dim=-1) ** exponent
            torch.testing.assert_close(weight[row, :n], expected / expected.mean())


def test_act_norm_survives_a_token_of_zeros():
    x = torch.randn(1, 6, 5)
    x[0, 2] = 0
    weight = SALIENCIES["act_norm"](
        linear_block(x, kinds=torch.ones(1, 6, dtype=torch.int8)), SaliencyContext()
    )
    assert torch.isfinite(weight["0"][0]).all()


def test_act_norm_names_infinite_inputs():
    x = torch.randn(1, 6, 5)
    x[0, 2, 1] = torch.inf
    block = linear_block(torch.randn(1, 6, 5), x, kinds=torch.ones(1, 6, dtype=torch.int8))
    with pytest.raises(RuntimeError, match=r"layer block\.0, batch 1: .* row 0, token 2"):
        act_norm(block, PLAIN)


def test_redundancy_counts_copies_of_an_image_token_as_one():
    distinct = torch.eye(5)[:3]
    x = torch.stack(
        [distinct[0], distinct[0], distinct[0], distinct[1], distinct[1], distinct[2], distinct[2]]
    )
    kinds = torch.tensor([[IMAGE] * 5 + [TEXT, TEXT]], dtype=torch.int8)
    weight = redundancy(linear_block(x[None], kinds=kinds), PLAIN, tau=0.01)["0"][0]
    expected = torch.tensor([1 / 3] * 3 + [1 / 2] * 2 + [1, 1])
    torch.testing.assert_close(weight, expected / expected.mean())


def test_redundancy_is_its_formula(monkeypatch):
    x, tau = torch.randn(2, 9, 4), 0.3
    kinds = torch.randint(1, 3, (2, 9), dtype=torch.int8)
    expected = torch.ones(2, 9)
    for row in range(2):
        for n in range(9):
            if kinds[row, n] == IMAGE:
                cosines = torch.stack(
                    [torch.cosine_similarity(x[row, n], x[row, m], dim=0) for m in range(9)]
                )
                expected[row, n] = 1 / ((cosines[kinds[row] == IMAGE] - 1) / tau).exp().sum()
    expected = (expected / expected.mean(dim=1, keepdim=True)).flatten()
    block = linear_block(x, kinds=kinds)
    torch.testing.assert_close(redundancy(block, PLAIN, tau=tau)["0"][0], expected)
    monkeypatch.setattr(saliency_static, "N_REFERENCES", 9)
    torch.testing.assert_close(redundancy(block, PLAIN, tau=tau)["0"][0], expected)


def test_redundancy_of_many_tokens_is_estimated_from_some(monkeypatch):
    block = linear_block(torch.randn(1, 400, 4), kinds=torch.full((1, 400), IMAGE, dtype=torch.int8))
    exact = redundancy(block, PLAIN, tau=1.0)["0"][0]
    monkeypatch.setattr(saliency_static, "N_REFERENCES", 150)
    estimate = redundancy(block, PLAIN, tau=1.0)["0"][0]
    assert torch.corrcoef(torch.stack([exact, estimate]))[0, 1] > 0.9


class Merger(nn.Module):
    """Joins pairs of tokens before its linear layer, as patch mergers do."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.pair = nn.Linear(4, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(self.each(x).reshape(x.shape[0], -1, 8))


class Skips(nn.Module):
    """The second layer sees only tokens whose first feature is positive, as experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.expert = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[x[..., 0] > 0]
        return self.each(x).sum() + (self.expert(chosen).sum() if len(chosen) else 0)


@pytest.mark.parametrize("name", ["uniform", "block_grad", "act_norm", "redundancy", "attn_received"])
def test_layers_that_see_other_tokens_have_as_many_weights(name):
    kinds = torch.full((2, 6), IMAGE, dtype=torch.int8)
    first, second = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    first[..., 0] = first[..., 0].abs()
    second[..., 0] = -second[..., 0].abs()
    second[1, 2, 0] = 1.0
    none = second.clone()
    none[1, 2, 0] = -1.0
    block = linear_block(first, second, none, kinds=kinds, module=Skips())
    assert [w.shape[0] for w in SALIENCIES[name](block, SaliencyContext())["expert"]] == count_tokens(block)[
        "expert"
    ]
    merger = linear_block(first, kinds=kinds, module=Merger(), part="projector")
    weights = SALIENCIES[name](merger, SaliencyContext())
    assert weights["pair"][0].shape == (6,)
    torch.testing.assert_close(weights["pair"][0].reshape(2, 3).mean(dim=1), torch.ones(2))


def padded_batch(family: str) -> CalibBatch:
    (batch,) = tiny_models.inputs(family, 1, rows=2)
    kinds = torch.full(batch["input_ids"].shape, TEXT, dtype=torch.int8)
    batch["attention_mask"][1, -3:] = 0
    kinds[1, -3:] = PADDING
    return CalibBatch(batch, kinds)


@pytest.mark.parametrize("family", ["llama", "clip", "gemma3"])
@pytest.mark.parametrize("query_chunk", [256, 5])
def test_attn_received_is_its_formula_for_sdpa_and_eager(family, query_chunk, monkeypatch):
    monkeypatch.setattr(saliency_attention, "QUERY_CHUNK", query_chunk)
    batch, prefix = (
        padded_batch(family),
        {"clip": "text_model", "gemma3": "language_model", "llama": ""}[family],
    )
    found = {}
    for implementation in ("sdpa", "eager"):
        model = tiny_models.build(family)
        model.set_attn_implementation(implementation)
        if implementation == "eager":
            outputs = model(**batch.inputs, output_attentions=True)
            weights = outputs.text_model_output.attentions if family == "clip" else outputs.attentions
        blocks = [b for b in walk_blocks(model, describe(model), [batch]) if prefix in b.spec.name]
        found[implementation] = [attn_received(block, PLAIN) for block in blocks]
    for layer, (sdpa, eager) in enumerate(zip(found["sdpa"], found["eager"], strict=True)):
        expected = torch.zeros(2, 12)
        for row, n_tokens in ((0, 12), (1, 9)):
            a = weights[layer][row].mean(dim=0)[:n_tokens, :n_tokens]
            for n in range(n_tokens):
                queries = [t for t in range(n_tokens) if a[t, n] > 0]
                fair = sum(1 / int((a[t] > 0).sum()) for t in queries)
                expected[row, n] = sum(a[t, n] for t in queries) / fair
        expected = expected * (expected > 0).sum(dim=1, keepdim=True) / expected.sum(dim=1, keepdim=True)
        for made in (sdpa, eager):
            assert len(made) > 3
            for calls in made.values():
                torch.testing.assert_close(calls[0], expected.detach().flatten(), rtol=1e-4, atol=1e-5)


def test_attn_received_of_even_attention_is_uniform():
    model = tiny_models.build("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    for block in walk_blocks(model, describe(model), [padded_batch("llama")]):
        for calls in attn_received(block, PLAIN).values():
            torch.testing.assert_close(calls[0], (block.batches[0] != PADDING).float().flatten())


def test_attn_received_refuses_attention_that_hides_its_weights():
    class HiddenAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x)

    module = nn.Sequential(HiddenAttention(), nn.Linear(4, 4))
    block = linear_block(torch.randn(1, 6, 4), kinds=torch.ones(1, 6, dtype=torch.int8), module=module)
    with pytest.raises(
        RuntimeError, match="attn_received', block 'block': expected .* got none; load the model with"
    ):
        attn_received(block, SaliencyContext())


def test_attn_received_of_linear_attention_is_uniform_and_says_so(caplog):
    model = tiny_models.build("qwen3_5")
    (batch,) = tiny_models.inputs("qwen3_5", 1)
    kinds = torch.full(batch["input_ids"].shape, TEXT, dtype=torch.int8)
    blocks = walk_blocks(model, describe(model), [CalibBatch(batch, kinds)], parts=["language"])
    spread = [max(float(calls[0].std()) for calls in attn_received(b, PLAIN).values()) for b in blocks]
    assert spread[0] == 0
    assert spread[1] > 0.01
    assert "Qwen3_5GatedDeltaNet has no attention weights" in caplog.text
