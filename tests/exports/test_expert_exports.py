"""Packed experts written one by one: their names, schemes and values, read by transformers with compressed-tensors."""

import copy
import json
import re
from itertools import cycle
from typing import Any

import pytest
import torch
import transformers as hf
from packed_models import block_linears, pack_layers, read_tensors
from tiny_models import FAMILIES, TEXT, from_config
from transformers import PreTrainedModel

from vlmq.attach import attach
from vlmq.exports import export_model
from vlmq.families.experts import is_fused, unfuse

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS = {
    "mixtral": lambda: hf.MixtralConfig(**TEXT, num_local_experts=4),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**TEXT, **MOE),
    "qwen3_vl_moe": FAMILIES["qwen3_vl_moe"],
}
LEAVES = {"mixtral": ("w1", "w3", "w2"), "plain": ("gate_proj", "up_proj", "down_proj")}


def auto(family: str) -> Any:
    return hf.AutoModelForImageTextToText if "vl" in family else hf.AutoModelForCausalLM


def packed(
    family: str, schemes: tuple[str, ...] = ("int4-sym-g16",), kept: str = "visual"
) -> PreTrainedModel:
    """All layers of the blocks packed, but those whose path holds `kept`."""
    model = from_config(auto(family), CONFIGS[family]())
    fused = [name for name, module in model.named_modules() if is_fused(module) and kept not in name]
    unfuse(model, [f"{name}.0.down_proj" for name in fused])
    names = [name for name in block_linears(model) if kept not in name]
    chosen = dict(zip(names, cycle(schemes), strict=False))
    pack_layers(model, chosen)
    attach(model, chosen, {"seed": 0, "calibration": "none"})
    return model


def exported(model: PreTrainedModel, folder, to: str = "compressed-tensors") -> dict[str, Any]:
    export_model(model, to, folder)
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def is_matched(patterns: list[str], name: str) -> bool:
    return any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in patterns)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_transformers_reads_the_same_values(family, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = packed(family)
    exported(model, tmp_path / "out")
    config = hf.CompressedTensorsConfig(dequantize=True)
    loaded = auto(family).from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=config)
    expected = dict(copy.deepcopy(model).dequantize().named_parameters())
    for name, parameter in loaded.named_parameters():
        # The reader multiplies in the dtype of the scales.
        exact = torch.equal(parameter, expected[name])
        assert exact or torch.equal(parameter.float(), expected[name].half().float()), name


@pytest.mark.parametrize("family", CONFIGS)
def test_names_are_those_of_published_checkpoints(family, tmp_path):
    exported(packed(family), tmp_path / "out")
    found = {n for n in read_tensors(tmp_path / "out") if n.endswith("weight_packed") and ".experts." in n}
    block = "model.language_model.layers" if "vl" in family else "model.layers"
    path = "block_sparse_moe" if family == "mixtral" else "mlp"
    leaves = LEAVES.get(family, LEAVES["plain"])
    assert found == {
        f"{block}.{i}.{path}.experts.{e}.{leaf}.weight_packed"
        for i in range(2)
        for e in range(4)
        for leaf in leaves
    }


def test_where_checkpoints_keep_experts_fused_a_note_says_who_does_not_read_them(tmp_path):
    model = packed("qwen3_vl_moe")
    export = export_model(model, "vllm", tmp_path / "out")
    assert any("random numbers" in note for note in export.notes)
    assert not any(
        "random numbers" in note for note in export_model(packed("mixtral"), "vllm", tmp_path / "m").notes
    )
    tensors = read_tensors(tmp_path / "out")
    experts = model.get_submodule("model.language_model.layers.1.mlp.experts")
    expected = experts.get_submodule("3.gate_up_proj").dequantize(torch.float16)
    found = []
    for leaf in ("gate_proj", "up_proj"):
        name = f"model.language_model.layers.1.mlp.experts.3.{leaf}"
        words, scales = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
        values = ((words[..., None] >> torch.arange(0, 32, 4)) & 15).flatten(1) - 8
        found.append((values.unflatten(1, (scales.shape[1], -1)).half() * scales[..., None]).flatten(1))
    assert torch.equal(torch.cat(found), expected)


def test_mixed_schemes_are_one_for_all_experts_and_name_each_layer_once(tmp_path):
    model = packed("qwen3_vl_moe", ("int4-sym-g16", "ternary-channel", "int8-sym-g32"))
    block = exported(model, tmp_path / "out")
    groups = list(block["config_groups"].values())
    assert len(groups) > 1
    tails = [
        f"layers.{i}.mlp.experts.{e}.{leaf}" for i in range(2) for e in range(4) for leaf in LEAVES["plain"]
    ]
    for head in ("model.language_model.", "language_model.model."):
        for tail in tails:
            assert [is_matched(group["targets"], f"{head}{tail}") for group in groups].count(True) == 1
    schemes = [g["weights"] for g in groups if is_matched(g["targets"], f"model.language_model.{tails[0]}")]
    assert schemes[0]["num_bits"] == 8
    assert schemes[0]["group_size"] == 16


def test_what_chooses_experts_and_experts_that_stay_are_ignored(tmp_path):
    model = packed("qwen3_moe", kept=".experts")
    block = exported(model, tmp_path / "out")
    assert is_matched(block["ignore"], "model.layers.1.mlp.gate")
    for name in ("model.layers.0.mlp.experts.0.gate_proj", "model.layers.1.mlp.experts.3.down_proj"):
        assert is_matched(block["ignore"], name)
    assert not is_matched(block["ignore"], "model.layers.0.self_attn.q_proj")
    assert is_matched(exported(packed("qwen3_moe"), tmp_path / "all")["ignore"], "model.layers.0.mlp.gate")


def test_experts_that_stay_in_one_block_are_ignored_there(tmp_path):
    block = exported(packed("qwen3_vl_moe", kept=".layers.1."), tmp_path / "out")
    for head in ("model.language_model", "language_model.model"):
        assert is_matched(block["ignore"], f"{head}.layers.1.mlp.experts.0.gate_proj")
        assert not is_matched(block["ignore"], f"{head}.layers.0.mlp.experts.0.gate_proj")


@pytest.mark.parametrize(("to", "why"), [("gptq", "no layout"), ("gemma", "no layout")])
def test_targets_without_a_layout_refuse(to, why, tmp_path):
    with pytest.raises(
        ValueError, match=rf"'model.layers.0.mlp.experts' holds packed experts.*{why}.*override"
    ):
        export_model(packed("qwen3_moe"), to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
