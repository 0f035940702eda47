"""The reader of vLLM without vLLM: names, weights and the stand-in for its kernel of experts."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from vlmq.eval import vllm_engine, vllm_experts, vllm_reader
from vlmq.eval.export_families import CONFIGS, build
from vlmq.eval.export_models import Packed, open_packed
from vlmq.eval.picture_models import Prompt
from vlmq.eval.vllm_engine import Answer, Found
from vlmq.exports.compressed_tensors import write_layer
from vlmq.exports.grid import wide_grid
from vlmq.exports.writing import packed_layers


@pytest.fixture(scope="module")
def mixtral() -> Packed:
    return open_packed("mixtral-128", "ternary-g32")


def as_in_vllm(packed: Packed) -> dict[str, torch.Tensor]:
    """The weights by vLLM's names, q, k and v in one."""
    weights = {n: layer.dequantize(torch.float16).float() for n, layer in packed_layers(packed.model).items()}
    for i in range(2):
        parts = [weights.pop(f"model.layers.{i}.self_attn.{kind}_proj") for kind in "qkv"]
        weights[f"model.layers.{i}.self_attn.qkv_proj"] = torch.cat(parts)
    names = {n: n.replace("mlp.experts.", "block_sparse_moe.experts.routed_experts.") for n in weights}
    return {names[n]: weight for n, weight in weights.items()}


def test_weights_are_found_by_the_names_of_vllm(mixtral):
    found = as_in_vllm(mixtral)
    assert vllm_reader.compare_weights(mixtral, found) == {"weights": 0.0, "n_layers": 24}
    found["model.layers.1.self_attn.qkv_proj"][0] += 1
    assert vllm_reader.compare_weights(mixtral, found)["weights"] > 0.9


def test_a_layer_that_vllm_holds_in_full_precision_is_an_error(mixtral):
    found = as_in_vllm(mixtral)
    del found["model.layers.1.self_attn.qkv_proj"]
    with pytest.raises(RuntimeError, match="21 packed layers, not 24"):
        vllm_reader.compare_weights(mixtral, found)


def test_experts_are_computed_as_transformers_does(mixtral):
    path = "model.layers.0.mlp.experts"
    experts = mixtral.model.get_submodule(path)
    tensors = {}
    for part, ours in (("w13", experts.up), ("w2", "down_proj")):
        written = [
            write_layer(wide_grid(experts.get_submodule(f"{e}.{ours}").quantized_weight())) for e in range(4)
        ]
        tensors[f"{part}_weight_packed"] = torch.stack([w["weight_packed"] for w in written])
        tensors[f"{part}_weight_scale"] = torch.stack([w["weight_scale"].float() for w in written])
    layer = SimpleNamespace(**tensors)
    vllm_experts.unpack_all(SimpleNamespace(num_bits=4), layer)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    chosen, weights = torch.tensor([[0, 2], [1, 2], [3, 0], [2, 1], [0, 1]]), torch.full((5, 2), 0.5)
    plain = experts.forward(x, chosen, weights)
    found = vllm_experts.apply(None, layer, x, weights, chosen)
    assert (
        found - plain
    ).abs().max() < 0.05 * plain.abs().max()  # vlmq rounds inputs to 8 bits for few tokens
    assert (
        vllm_experts.apply(None, layer, x, weights, chosen.flip(0)) - plain
    ).abs().max() > 0.1 * plain.abs().max()


def test_what_vllm_says_is_compared_token_by_token(mixtral, monkeypatch):
    plain = copy.deepcopy(mixtral.model).dequantize()
    row, moved = torch.arange(3, 12), 0.0

    def ask(folder, requests, n_new):
        (request,) = requests
        full = torch.tensor([*request.tokens, 7, 9])
        with torch.no_grad():
            said = plain(input_ids=full[None, :-1]).logits[0].log_softmax(-1)
        said[4, 0] += moved
        return Found([Answer(full, len(request.tokens), said)], as_in_vllm(mixtral))

    monkeypatch.setattr(vllm_reader, "ask", ask)
    found = vllm_reader.compare(mixtral, [row], [5], 4, Path("out"))
    assert (found["outputs"], found["n_steps"], found["weights"]) == (0.0, 4, 0.0)
    moved = 0.5
    assert vllm_reader.compare(mixtral, [row], [5], 4, Path("out"))["outputs"] == pytest.approx(0.5)


def test_other_tokens_for_a_picture_are_an_error():
    ids = torch.tensor([[1, 5, 6]])
    pixels = torch.ones(1, 3, 4, 4)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    prompt = Prompt("", Image.new("RGB", (4, 4)), "", batch)
    seen = vllm_reader._picture(prompt, Answer(torch.tensor([1, 5, 6, 8]), 3, torch.zeros(3, 9)))
    assert seen == {"pixel_values": pixels}
    with pytest.raises(RuntimeError, match=r"\[1, 5, 5, 6\], not \[1, 5, 6\]"):
        vllm_reader._picture(prompt, Answer(torch.tensor([1, 5, 5, 6, 8]), 4, torch.zeros(4, 9)))


def test_what_vllm_printed_is_in_the_error(monkeypatch, tmp_path):
    asked = []

    def fail(command, **_):
        asked.append(command)
        return SimpleNamespace(returncode=1, stdout="Failed to find a kernel")

    monkeypatch.setattr(vllm_engine.subprocess, "run", fail)
    with pytest.raises(RuntimeError, match="exit code 1\nFailed to find a kernel"):
        vllm_engine.ask(tmp_path, [vllm_engine.Request(tokens=[1])], 1)
    assert "VLLM_NO_USAGE_STATS=1" in asked[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_models_are_the_same_every_time(name):
    (model, tokenizer), (again, _) = build(name), build(name)
    assert tokenizer("round")["input_ids"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
