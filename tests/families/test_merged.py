"""Layers that transformers saves as one tensor are found in its conversions, and need one scheme."""

import json
import re
from dataclasses import replace

import more_families
import pytest
import tiny_models
import torch
from packed_models import read_tensors, round_to_nearest
from safetensors.torch import save_file

import vlmq
import vlmq.planning
from vlmq.exports import TARGETS, export_model
from vlmq.exports.compressed_tensors import config_block, write_layer
from vlmq.exports.grid import integer_grid
from vlmq.families import describe
from vlmq.families.merged import merged_layers
from vlmq.scheme import parse_scheme

# Family -> the path of q, k and v in the vision tower. The last one merges the weights, and nothing of packed layers.
MERGING = {
    "kimi_k25": "model.vision_tower.layers.{}.attn",
    "nemotron_h_omni": "vision_model.encoder.layer.{}.attention",
    "step3p7": "model.vision_model.layers.{}.self_attn",
}
QKV = "*vision*.[qkv]_proj"
Q = "*vision*.q_proj"


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch)["logits"]


def merged(model, leaf: str) -> set[tuple[str, ...]]:
    names = [name for name, info in describe(model).linears.items() if info.experts is None]
    return {tuple(sorted(group)) for group in merged_layers(model, names, leaf)}


@pytest.mark.parametrize("family", MERGING)
def test_the_groups_are_those_of_the_conversions(family):
    model, path = more_families.build(family), MERGING[family]
    groups = {tuple(f"{path.format(i)}.{p}_proj" for p in "kqv") for i in range(2)}
    assert merged(model, "weight") == groups
    assert merged(model, "qweight") == (set() if family == "step3p7" else groups)


def test_most_families_have_no_such_layers():
    assert merged(tiny_models.build("qwen2_5_vl"), "weight") == set()
    assert merged(tiny_models.build("qwen3_vl_moe"), "weight") == set()


def test_a_family_may_merge_layers_of_the_language_model():
    model, path = more_families.build("molmo2"), "model.language_model.layers.{}."
    attention = {tuple(f"{path.format(i)}self_attn.{p}_proj" for p in "kqv") for i in range(2)}
    ffn = {tuple(f"{path.format(i)}mlp.{p}_proj" for p in ("gate", "up")) for i in range(2)}
    assert merged(model, "qweight") == attention
    assert merged(model, "weight") == attention | ffn


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("kimi_k25", "int8-g16"),
        ("kimi_k25", "int4-sym-g16"),
        ("nemotron_h_omni", "int4-g32"),
        ("nemotron_h_omni", None),
        ("step3p7", None),
    ],
)
def test_a_mixture_is_refused_before_the_data_are_read(family, given):
    model = more_families.build(family)
    first = MERGING[family].format(0)
    words = (
        rf"(?=.*'{first}.q_proj' {given or 'full precision'}).*'{first}.v_proj' int4-g16.*groups like this: 2"
    )
    with pytest.raises(ValueError, match=words):
        vlmq.quantize(model, "no data", "int4-g16", overrides={Q: given})


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("kimi_k25", {QKV: "int8-g16"}),
        ("nemotron_h_omni", {QKV: None}),
        ("step3p7", {Q: "int4-sym-g16"}),
        ("molmo2", {"*.up_proj": "ternary-g16"}),
    ],
)
def test_what_the_plan_lets_pass_can_be_saved_and_loaded(family, overrides, tmp_path):
    model, batch = more_families.build(family), more_families.inputs(family)
    vlmq.quantize(model, [batch], "int4-g16", solver="rtn", overrides=overrides)
    vlmq.save(model, tmp_path / "packed")
    assert torch.equal(logits(vlmq.load(tmp_path / "packed"), batch), logits(model, batch))


def test_layers_that_are_packed_already_count(monkeypatch):
    model, batch = more_families.build("kimi_k25"), more_families.inputs("kimi_k25")
    with monkeypatch.context() as patch:
        patch.setattr(vlmq.planning, "check_merged", lambda *_: None)
        vlmq.quantize(model, [batch], "int4-g16", solver="rtn", overrides={"*": None, Q: "int4-g16"})
    vlmq.plan(model, "int4-g16")
    with pytest.raises(ValueError, match=r"q_proj' int4-g16, .*k_proj' int8-g16"):
        vlmq.plan(model, "int8-g16")


@pytest.mark.parametrize("family", MERGING)
def test_an_export_is_refused_before_it_writes_names_that_nobody_reads(family, tmp_path):
    model, batch = more_families.build(family), more_families.inputs(family)
    vlmq.quantize(model, [batch], "int4-sym-g16", solver="rtn", overrides={"*": None, QKV: "int4-sym-g16"})
    alike = re.escape(f"override of None to '{MERGING[family].format('*')}.")
    with pytest.raises(ValueError, match=f"as one tensor.*2 groups like this.*{alike}"):
        export_model(model, "compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def foreign(family, folder, overrides, monkeypatch):
    """A folder of compressed-tensors of a model whose layers are merged, which vlmq itself refuses to write."""
    model, batch = more_families.build(family), more_families.inputs(family)
    with monkeypatch.context() as patch:
        patch.setattr(vlmq.planning, "check_merged", lambda *_: None)
        patch.setitem(
            TARGETS, "compressed-tensors", replace(TARGETS["compressed-tensors"], check=lambda *_: None)
        )
        vlmq.quantize(model, [batch], "int4-sym-g16", solver="rtn", overrides={"*": None, **overrides})
        export_model(model, "compressed-tensors", folder)
    return model, batch


def test_foreign_layers_that_are_merged_on_disk_are_refused_at_the_load(tmp_path, monkeypatch):
    foreign("nemotron_h_omni", tmp_path / "out", {QKV: "int4-sym-g16"}, monkeypatch)
    with pytest.raises(
        ValueError, match=r"packed layer '.*attn.qkv' is not read: .* splits, merges or reorders"
    ):
        vlmq.load(tmp_path / "out")


def test_foreign_layers_that_a_save_would_merge_are_refused_at_the_load(tmp_path):
    """q, k and v packed one by one, q wider than the others: read, but there is one place for them on disk."""
    model = more_families.build("kimi_k25")
    model.save_pretrained(tmp_path)
    tensors, grids = read_tensors(tmp_path), {}
    for i, key in enumerate(sorted(key for key in tensors if key.endswith("wqkv.weight"))):
        rows = tensors.pop(key).chunk(3)
        for leaf, bits, weight in zip("qkv", (8, 4, 4), rows, strict=True):
            name = f"{MERGING['kimi_k25'].format(i)}.{leaf}_proj"
            grids[name] = integer_grid(round_to_nearest(weight, parse_scheme(f"int{bits}-sym-g16")))
            tensors |= {f"{name}.{part}": t for part, t in write_layer(grids[name]).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = config_block(grids, [], [], {name: name for name in grids})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="saves these layers as one tensor.* int8-sym-g16.*; vlmq cannot save it"
    ):
        vlmq.load(tmp_path)


def test_foreign_layers_keep_a_bias_that_lies_merged_on_disk(tmp_path, monkeypatch):
    model, batch = foreign("step3p7", tmp_path / "out", {QKV: "int4-sym-g16", Q: "int8-sym-g16"}, monkeypatch)
    loaded = vlmq.load(tmp_path / "out", dtype=model.dtype)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    vlmq.save(loaded, tmp_path / "packed")
    assert torch.equal(logits(vlmq.load(tmp_path / "packed"), batch), logits(model, batch))
