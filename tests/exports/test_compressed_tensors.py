"""compressed-tensors folders, loaded by transformers with the package itself; and their names and schemes."""

import copy
import json
import re

import pytest
import torch
from installed import needs_transformers
from packed_models import auto_class, logits, packed
from safetensors import safe_open
from test_grid import on_whole_zeros
from transformers import AutoModelForCausalLM, PreTrainedModel

import vlmq
from vlmq.attach import attach
from vlmq.exports import export_model
from vlmq.exports.naming import fused_groups, ignore_list
from vlmq.exports.writing import kept_linears, packed_layers
from vlmq.linear import QuantLinear
from vlmq.scheme import parse_scheme

SCHEMES = (
    "int4-sym-g16",
    "ternary-channel",
    "int3-sym-g32",
    "binary-sym-g16",
    "int8-sym-channel",
    "int2-sym-g64",
)
FLOAT32 = needs_transformers("5.22", "loads float16 weights into a vision tower of float32")


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model).dequantize()


def block_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("family", "schemes"),
    [
        ("llama", SCHEMES),
        pytest.param("llava", ("int4-sym-g16",), marks=FLOAT32),
        pytest.param("llava", SCHEMES, marks=FLOAT32),
        ("qwen3_vl", ("ternary-g32",)),
    ],
)
def test_transformers_loads_the_same_values(family, schemes, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = packed(family, schemes, torch.float32)
    export_model(model, "compressed-tensors", tmp_path / "out")
    loaded = auto_class(family).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert loaded.hf_quantizer is not None
    assert torch.equal(logits(loaded, family), logits(dequantized(model), family))


def asymmetric() -> PreTrainedModel:
    """A Llama whose zero points stand on levels."""
    model = packed("llama", ("int4-g16",), torch.float32)
    for name, layer in packed_layers(model).items():
        layer.zeros.data.bitwise_and_(0xF0)
        assert isinstance(model.get_submodule(name), QuantLinear)
    return model


@needs_transformers("5.23", "drops zero points")
def test_transformers_loads_zero_points_where_it_dequantizes(tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    model = asymmetric()
    export = export_model(model, "compressed-tensors", tmp_path / "out")
    assert any("dequantize=True" in note for note in export.notes)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    ).eval()
    for name, layer in packed_layers(model).items():
        # The reader multiplies in the dtype of the scales.
        weight = loaded.get_submodule(name).weight
        assert torch.equal(weight, layer.dequantize(torch.float16).float())


def test_the_model_is_left_as_it_was(tmp_path):
    model = packed("llama", ("int4-sym-g16",))
    before = logits(model, "llama")
    export_model(model, "compressed-tensors", tmp_path / "out")
    assert model.config.quantization_config.quant_method == "vlmq"
    vlmq.save(model, tmp_path / "own")
    assert torch.equal(logits(vlmq.load(tmp_path / "own"), "llama"), before)


def test_packed_embeddings_are_written_in_full_precision(tmp_path):
    pytest.importorskip("compressed_tensors")
    model = packed("llama", ("int4-sym-g16",), torch.float32)
    vlmq.quantization.pack_embeddings(model, "int8-g64")
    export_model(model, "compressed-tensors", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded, "llama"), logits(dequantized(model), "llama"))


@pytest.mark.parametrize("scheme", ["ternary2-g32", "int4-g32", "binary-g32"])
def test_what_cannot_be_said_is_refused_and_leaves_nothing(scheme, tmp_path):
    model = packed("llama", (scheme,))
    with pytest.raises(ValueError, match=r"cannot say layer 'model.layers.0.self_attn.q_proj'.*convert"):
        export_model(model, "compressed-tensors", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_conversion_measures_what_it_changes(tmp_path):
    pytest.importorskip("compressed_tensors")
    model = packed("llama", ("int4-g32", "int4-sym-g32"), torch.float32)
    export = export_model(model, "compressed-tensors", tmp_path / "out", convert="int8-sym-g32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    layers = packed_layers(model)
    logits(loaded, "llama")  # transformers unpacks on the first forward
    changed = total = 0.0
    for name, layer in layers.items():
        before = layer.dequantize()
        after = loaded.get_submodule(name).weight
        if layer.zeros is None:
            assert torch.equal(after, before)
        else:
            changed += float((after - before).square().sum())
            total += float(before.square().sum())
    assert export.n_converted == 7
    assert export.error == pytest.approx((changed / total) ** 0.5, rel=1e-4)
    assert 0 < export.error < 0.01


def test_bad_arguments_are_refused(tmp_path):
    model = packed("llama", ("int4-sym-g16",))
    with pytest.raises(ValueError, match="'onnx' is unknown; known: compressed-tensors"):
        export_model(model, "onnx", tmp_path / "out")
    with pytest.raises(ValueError, match="convert: format 'int5'"):
        export_model(model, "compressed-tensors", tmp_path / "out", convert="int5")
    with pytest.raises(ValueError, match="cannot say ternary2-g32 of convert either"):
        export_model(
            packed("llama", ("binary-g16",)), "compressed-tensors", tmp_path / "out", convert="ternary2-g32"
        )
    with pytest.raises(ValueError, match="no layer quantized by vlmq"):
        export_model(dequantized(model).__class__(model.config), "compressed-tensors", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files but no model"):
        export_model(model, "compressed-tensors", tmp_path / "full")


def test_layers_that_are_fused_elsewhere_share_a_scheme(tmp_path):
    model = packed("llama", ("int4-sym-g16", "ternary-channel", "int2-sym-g32"))
    export_model(model, "compressed-tensors", tmp_path / "out")
    found = {}
    for group in block_of(tmp_path / "out")["config_groups"].values():
        for target in group["targets"]:
            found[target] = json.dumps(group["weights"], sort_keys=True)
    assert set(found) == set(packed_layers(model))
    for i in range(2):
        layer = f"model.layers.{i}"
        assert len({found[f"{layer}.self_attn.{c}_proj"] for c in "qkv"}) == 1
        assert found[f"{layer}.mlp.gate_proj"] == found[f"{layer}.mlp.up_proj"]


def test_a_torn_group_is_noted(tmp_path):
    model = packed("llama", ("int4-sym-g16",))
    layer = model.get_submodule("model.layers.1.self_attn.k_proj")
    linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=model.dtype)
    model.set_submodule("model.layers.1.self_attn.k_proj", linear)
    names = dict.fromkeys(packed_layers(model), "int4-sym-g16")
    model.hf_quantizer = None
    attach(model, names)
    export = export_model(model, "compressed-tensors", tmp_path / "out")
    assert any("model.layers.1.self_attn.q_proj" in note for note in export.notes)
    assert "model.layers.1.self_attn.k_proj" in block_of(tmp_path / "out")["ignore"]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "clip"])
def test_ignored_names_match_every_kept_layer_and_no_packed_one(family, tmp_path):
    model = packed(family, ("int4-sym-g16",))
    export_model(model, "compressed-tensors", tmp_path / "out")
    patterns = block_of(tmp_path / "out")["ignore"]

    def is_ignored(name):
        return any(
            re.match(p.removeprefix("re:"), name) if p.startswith("re:") else p == name for p in patterns
        )

    assert all(is_ignored(name) for name in kept_linears(model))
    assert not any(is_ignored(name) for name in packed_layers(model))


def test_a_kept_tower_is_one_pattern():
    packed_names = {"model.language_model.layers.0.mlp.fc1": "language_model.model.layers.0.mlp.fc1"}
    kept = ["model.vision_tower.layers.0.mlp.fc1", "model.language_model.layers.1.mlp.fc1"]
    disk = {name: name.removeprefix("model.") for name in kept}
    assert ignore_list(kept, packed_names, disk) == [
        "re:.*vision_tower.*",
        r"re:(?:.*\.)?(?:layers\.1\.mlp\.fc1)$",
    ]


def test_fused_groups_follow_the_names():
    groups, torn = fused_groups(["a.q_proj", "a.k_proj", "b.gate_proj", "b.o_proj"], ["a.v_proj", "b.c_proj"])
    assert groups == [["a.q_proj", "a.k_proj"]]
    assert torn == ["a.q_proj", "a.k_proj"]


def test_the_oracle_of_zero_points_is_not_symmetric():
    assert on_whole_zeros("int4-g16").zeros.unique().numel() > 1
    assert parse_scheme("int4-g16").format.has_zero


@pytest.mark.parametrize(
    ("family", "kind"), [("llava", "clip_vision_model"), ("gemma3", "siglip_vision_model")]
)
def test_a_tower_is_written_by_the_names_of_published_checkpoints(family, kind, tmp_path):
    model = packed(family, ("int4-sym-g16",), torch.float32)
    assert model.config.vision_config.model_type == kind
    export_model(model, "compressed-tensors", tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        tower = [name for name in file.keys() if "vision_tower" in name]  # noqa: SIM118
    assert any(name.endswith("q_proj.weight_packed") for name in tower)
    assert any(name.endswith("layer_norm1.weight") for name in tower)
    assert all("vision_tower.vision_model." in name for name in tower)
