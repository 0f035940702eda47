"""Gradient saliencies against finite differences, closed forms and the library's own loss; the residual point."""

from types import SimpleNamespace

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from vlmq.calib.block import Block, BlockCall
from vlmq.calib.loss import batch_loss, data_labels, reference_kind
from vlmq.calib.loss_gradient import image_ratios, loss_weights
from vlmq.calib.saliency import SALIENCIES, PostProcess, SaliencyContext, prepare
from vlmq.calib.saliency_residual import (
    ResidualPoint,
    attention_modules,
    find_residual_point,
    residual_stream,
)
from vlmq.calib.tokens import ANSWER, IMAGE, PADDING, TEXT, CalibBatch
from vlmq.calib.walk import walk_blocks
from vlmq.families import BlockSpec, Layout, describe

PLAIN = PostProcess(clip=1.0, floor=0.0)
GENERATOR = torch.Generator()


def text_batches(family: str, n_batches: int = 1, rows: int = 1, dtype: torch.dtype = torch.float32):
    made = tiny_models.inputs(family, n_batches, rows=rows, dtype=dtype)
    kinds = [torch.where(b["input_ids"] == tiny_models.IMAGE_TOKEN, IMAGE, TEXT).to(torch.int8) for b in made]
    return [CalibBatch(b, k) for b, k in zip(made, kinds, strict=True)]


def second_block(family: str, dtype: torch.dtype = torch.float64, prefix: str = "") -> Block:
    """The second block of a stack, after the first one was disturbed."""
    model, batches = tiny_models.build(family, dtype), text_batches(family, dtype=dtype)
    is_next = False
    for block in walk_blocks(model, describe(model), batches):
        if not block.spec.name.startswith(prefix):
            continue
        if is_next:
            return block
        is_next = True
        for layer in block.linears().values():
            weight = layer.weight.detach()
            layer.weight = torch.nn.Parameter(weight + 0.03 * torch.randn_like(weight))
    raise AssertionError(f"no second block under {prefix!r}")


@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj"])
def test_block_grad_matches_finite_differences(layer):
    block = second_block("llama")
    tokens, step = (2, 7), 1e-5

    def loss(token: int, channel: int, shift: float) -> float:
        def push(module, args, output):
            output = output.clone()
            output[0, token, channel] += shift
            return output

        error = attend(block, block.original_inputs[0])
        handle = block.original.get_submodule(layer).register_forward_hook(push)
        error = error - attend(block, block.inputs[0])
        handle.remove()
        return float(error.square().sum())

    n_channels = block.linears()[layer].out_features
    g = [
        sum(abs(loss(t, c, step) - loss(t, c, -step)) / (2 * step) for c in range(n_channels)) / n_channels
        for t in tokens
    ]
    weight = SALIENCIES["block_grad"](block, SaliencyContext(post=PLAIN))[layer][0]
    assert weight[tokens[0]] / weight[tokens[1]] == pytest.approx((g[0] / g[1]) ** 2, rel=1e-4)


def attend(block: Block, call: BlockCall) -> Tensor:
    """Attn(X) of a Llama block, written out."""
    x = call.args[0] if call.args else call.kwargs["hidden_states"]
    rest = {k: v for k, v in call.kwargs.items() if k != "hidden_states"}
    original = block.original
    with torch.no_grad():
        return x + original.self_attn(hidden_states=original.input_layernorm(x), **rest)[0]


def test_block_grad_is_uniform_outside_the_attention_and_where_paths_are_equal():
    block = second_block("llama")
    weights = SALIENCIES["block_grad"](block, SaliencyContext())
    for name, calls in weights.items():
        is_uniform = torch.equal(calls[0], torch.ones_like(calls[0]))
        assert is_uniform == (not name.startswith("self_attn")), name
    block.inputs = block.original_inputs
    for calls in SALIENCIES["block_grad"](block, SaliencyContext()).values():
        assert torch.equal(calls[0], torch.ones_like(calls[0]))
    # Other objects with the same numbers: the loss is zero, not absent.
    block.inputs = [BlockCall(call.args, call.kwargs) for call in block.original_inputs]
    for calls in SALIENCIES["block_grad"](block, SaliencyContext()).values():
        assert torch.equal(calls[0], torch.ones_like(calls[0]))


def test_block_grad_leaves_the_block_as_it_was():
    block = second_block("llama")
    before = [p.requires_grad for p in block.original.parameters()]
    SALIENCIES["block_grad"](block, SaliencyContext())
    assert [p.requires_grad for p in block.original.parameters()] == before
    assert all(p.grad is None for p in block.original.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in block.original.modules())


@pytest.mark.parametrize(
    ("family", "prefix", "entered"),
    [
        ("llama", "", "post_attention_layernorm"),
        ("gemma3", "model.language_model", "pre_feedforward_layernorm"),
        ("qwen3_5", "model.language_model", "post_attention_layernorm"),
        ("qwen3_vl_moe", "model.language_model", "post_attention_layernorm"),
        ("qwen2_5_vl", "model.visual.blocks", "norm2"),
        ("internvl", "model.vision_tower", "layernorm_after"),
        ("mistral3", "model.vision_tower", "ffn_norm"),
        ("clip", "text_model", "layer_norm2"),
        ("siglip", "vision_model", "layer_norm2"),
    ],
)
def test_residual_point_is_found_in_every_kind_of_block(family, prefix, entered):
    block = second_block(family, torch.float32, prefix)
    (attention,) = attention_modules(block.original)
    assert find_residual_point(block, attention, block.inputs[0]) == ResidualPoint(entered)


class Mixer(nn.Module):
    """Stands for an attention module; its class has no telling name."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.proj(x).cumsum(dim=1), None


class Parallel(nn.Module):
    """x + attention(norm(x)) + mlp(norm2(x)), the second norm entered by x after the attention has run (GPT-NeoX)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2, self.attn, self.mlp = (
            nn.LayerNorm(6),
            nn.LayerNorm(6),
            Mixer(),
            nn.Linear(6, 6),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))[0] + self.mlp(self.norm2(x)).tanh()


class Scaled(Parallel):
    """A dropout between the attention and the sum: what enters it is not the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attn(self.norm(x))[0] * 0.3)
        return x + self.mlp(self.norm2(x)).tanh()


class NoResidual(Parallel):
    """The attention replaces the stream."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(self.attn(self.norm(x))[0]))


def made_block(module: nn.Module) -> Block:
    f = torch.randn(2, 5, 6)
    calls = [BlockCall((x,), {}) for x in (f, f + 0.1 * torch.randn(2, 5, 6))]
    module.eval()
    kinds = torch.full((2, 5), TEXT, dtype=torch.int8)
    spec = BlockSpec("block", "language")
    cpu = torch.device("cpu")
    return Block(spec, module, module, [calls[1]], [calls[0]], [], [kinds], [0], cpu)


@pytest.mark.parametrize(
    ("kind", "point"),
    [
        (Parallel, ResidualPoint(None, is_sum=True)),
        (Scaled, ResidualPoint("norm2")),
        (NoResidual, ResidualPoint(None, is_sum=False)),
    ],
)
def test_residual_point_of_unusual_blocks(kind, point):
    block = made_block(kind())
    assert find_residual_point(block, "attn", block.inputs[0]) == point
    x = block.inputs[0].args[0]
    with torch.no_grad():
        stream, _ = residual_stream(block, "attn", point, block.inputs[0], [])
        attended = block.original.attn(block.original.norm(x))[0]
        expected = {Parallel: x + attended, Scaled: x + 0.3 * attended, NoResidual: block.original(x)}[kind]
    torch.testing.assert_close(stream, expected)
    weights = SALIENCIES["block_grad"](block, SaliencyContext())
    assert weights["attn.proj"][0].std() > 0.01


class ToyModel(nn.Module):
    """Embedding, one block, and the block's output taken as logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.block = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 7))
        self.unused = nn.Sequential(nn.Linear(5, 5))

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embed(input_ids)
        self.unused(x)
        return SimpleNamespace(logits=self.block(x))


def toy() -> tuple[ToyModel, Layout, CalibBatch]:
    model = ToyModel()
    specs = (BlockSpec("block", "language"), BlockSpec("unused", "language"))
    kinds = torch.tensor(
        [[TEXT, TEXT, ANSWER, ANSWER, TEXT], [TEXT, TEXT, TEXT, TEXT, PADDING]], dtype=torch.int8
    )
    batch = CalibBatch({"input_ids": torch.tensor([[1, 2, 3, 4, 5], [6, 5, 4, 3, 0]])}, kinds)
    return model, Layout(specs, {}, (), (), {}, 0), batch


def test_loss_grad_is_the_closed_form_of_a_toy():
    model, layout, batch = toy()
    weights = loss_weights(model, layout, [batch])
    ids = batch.inputs["input_ids"]
    logits = model(ids).logits
    slope = torch.zeros(2, 5, 7)
    # Row 0 has answers at 2 and 3, predicted from 1 and 2; row 1 has none, so its text counts.
    for row, token in [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]:
        slope[row, token] = logits[row, token].softmax(-1)
        slope[row, token, ids[row, token + 1]] -= 1
    for name, gradient in (("block.1", slope), ("block.0", slope @ model.block[1].weight)):
        expected = gradient.square().mean(-1).flatten()
        (made,) = weights[name]
        torch.testing.assert_close(made / made.sum(), expected / expected.sum())
    assert torch.equal(weights["unused.0"][0], torch.zeros(10))
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_loss_grad_matches_the_gradients_of_the_model_itself():
    model, (batch,) = tiny_models.build("llama"), text_batches("llama")
    layout = describe(model)
    weights = loss_weights(model, layout, [batch])
    outputs = {}
    for name in weights:
        model.get_submodule(name).register_forward_hook(lambda m, a, out, n=name: outputs.__setitem__(n, out))
    loss = model(**batch.inputs, labels=batch.inputs["input_ids"]).loss
    for name, gradient in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
        expected = gradient.square().mean(-1).flatten()
        made = weights[name][0]
        torch.testing.assert_close(made / made.sum(), expected / expected.sum(), rtol=1e-3, atol=1e-6)


def test_labels_of_the_model_are_sampled_by_seed():
    model, batches = tiny_models.build("llama"), text_batches("llama")
    layout = describe(model)
    data = loss_weights(model, layout, batches)
    sampled = [loss_weights(model, layout, batches, labels="model", seed=seed) for seed in (1, 1, 2)]
    name = "model.layers.0.mlp.down_proj"
    assert torch.equal(sampled[0][name][0], sampled[1][name][0])
    assert not torch.equal(sampled[0][name][0], sampled[2][name][0])
    assert not torch.equal(sampled[0][name][0], data[name][0])


def test_sampled_labels_follow_the_distribution():
    from vlmq.calib.loss import model_labels

    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    logs = probabilities.log().expand(20000, 4)
    drawn = model_labels(torch.Generator().manual_seed(0))(logs, torch.zeros(20000, dtype=torch.long))
    torch.testing.assert_close(drawn.bincount(minlength=4) / 20000, probabilities, rtol=0, atol=0.02)


def test_dual_encoder_loss_matches_images_to_texts():
    model = tiny_models.build("clip")
    (pair,) = text_batches("clip", rows=3)
    outputs = model(**pair.inputs, return_loss=True)
    loss = batch_loss(SimpleNamespace(**{**outputs, "loss": None}), pair, TEXT, data_labels, GENERATOR)
    torch.testing.assert_close(loss, 3 * 2 * outputs.loss)


def test_dual_encoder_with_one_pair_still_tells_tokens_apart():
    model, batches = tiny_models.build("clip"), text_batches("clip", rows=1)
    weights = loss_weights(model, describe(model), batches)
    assert all(float(calls[0].max()) > 0 for name, calls in weights.items() if name.endswith("fc2"))
    again = loss_weights(model, describe(model), batches)
    assert all(torch.equal(a, b) for name in weights for a, b in zip(weights[name], again[name], strict=True))


def test_a_loss_that_is_not_finite_names_the_batch():
    model, batches = tiny_models.build("llama"), text_batches("llama", 1)
    model.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(
        RuntimeError, match="expected a finite loss that depends on the linear layers in batch 0"
    ):
        loss_weights(model, describe(model), batches)


def test_answers_are_the_reference_if_any_batch_has_them():
    batches = text_batches("llama", 2)
    assert reference_kind(batches) == TEXT
    batches[1].kinds[0, -1] = ANSWER
    assert reference_kind(batches) == ANSWER


def test_image_ratios_are_mbq_s_with_the_median_as_floor():
    model, batches = tiny_models.build("llava"), text_batches("llava", 2)
    for batch in batches:
        batch.kinds[0, -4:] = ANSWER
    layout = describe(model)
    ratios = image_ratios(model, layout, batches)
    halves = {"self_attn.o_proj": {}, "mlp.down_proj": {}}
    for i in (0, 1):
        for half in halves:
            image = text = 0.0
            for batch in batches:
                seen = []
                layer = model.get_submodule(f"model.language_model.layers.{i}.{half}")
                handle = layer.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
                ids = batch.inputs["input_ids"]
                labels = torch.where(batch.kinds == ANSWER, ids, -100)
                loss = model(**batch.inputs, labels=labels).loss * 4
                handle.remove()
                size = torch.autograd.grad(loss, seen[0])[0].abs().mean(-1)
                image += float(size[batch.kinds == IMAGE].mean()) / 2
                text += float(size[batch.kinds == ANSWER].mean()) / 2
            halves[half][i] = image / text
    for i in (0, 1):
        for name, half in (("self_attn.q_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")):
            expected = max(halves[half][i], sum(halves[half].values()) / 2)
            assert ratios[f"model.language_model.layers.{i}.{name}"] == pytest.approx(expected, rel=1e-4)
    assert not any("vision" in name for name in ratios)


def test_modality_weighs_image_tokens_by_the_ratio_and_needs_both_kinds():
    model, batches = tiny_models.build("llava"), text_batches("llava", 1)
    layout = describe(model)
    context = prepare("modality", model, layout, batches, post=PLAIN)
    for block in walk_blocks(model, layout, batches, parts=["language"]):
        for name, (weight,) in SALIENCIES["modality"](block, context).items():
            kinds = block.batches[0].flatten()
            ratio = context.image_ratios[f"{block.spec.name}.{name}"]
            assert float(weight[kinds == IMAGE][0] / weight[kinds == TEXT][0]) == pytest.approx(
                ratio, rel=1e-5
            )
    only_text = text_batches("llama", 1)
    model = tiny_models.build("llama")
    assert prepare("modality", model, describe(model), only_text).image_ratios == {}
