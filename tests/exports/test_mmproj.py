"""The vision part as a GGUF file, read by the package gguf: values, widths that no block has, refusals."""

import copy

import numpy as np
import pytest
import torch
from gguf_models import byte_level, packed_text, read_file
from torch.nn.functional import pad

import vlmq
from vlmq.eval import picture_models
from vlmq.exports import export_model, mmproj_families
from vlmq.linear import QuantLinear


def packed(family, scheme):
    model, processor = picture_models.build(family)
    batch = picture_models.prompt(family, processor, 0).batch
    vlmq.quantize(model, [batch], scheme, solver="rtn")
    return model, processor


@pytest.fixture(scope="module")
def siglip():
    return packed("llava-siglip", "int4-sym-g32")


def test_the_file_holds_the_tower_and_the_projector(siglip, tmp_path):
    model, processor = siglip
    export = export_model(model, "gguf", tmp_path / "out", processor)
    tensors, types, fields = read_file(tmp_path / "out" / "mmproj-model.gguf")
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    assert fields["general.architecture"] == "clip"
    assert fields["clip.projector_type"] == "mlp"
    assert fields["clip.vision.block_count"] == 2  # of three: the projector reads what the second says
    assert fields["clip.vision.feature_layer"] == [2]
    assert fields["clip.vision.image_mean"] == pytest.approx(processor.image_processor.image_mean)
    assert (types["v.blk.1.attn_q.weight"], types["mm.2.weight"]) == ("Q4_0", "F32")
    for name, module in {
        "v.blk.1.attn_q": tower.encoder.layers[1].self_attn.q_proj,
        "v.blk.0.attn_out": tower.encoder.layers[0].self_attn.out_proj,
        "v.blk.0.ln2": tower.encoder.layers[0].layer_norm2,
        "v.patch_embd": tower.embeddings.patch_embedding,
        "mm.0": projector.linear_1,
        "mm.2": projector.linear_2,
    }.items():
        assert np.array_equal(tensors[f"{name}.weight"], module.weight.detach().numpy())
        assert np.array_equal(tensors[f"{name}.bias"], module.bias.detach().numpy())
    position = tower.embeddings.position_embedding.weight.detach().numpy()
    assert np.array_equal(tensors["v.position_embd.weight"], position)
    packed_layers = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    unused = [name for name in packed_layers if "vision_tower.encoder.layers.2" in name]
    assert sum(export.layers.values()) == len(packed_layers) - len(unused) == 26
    assert not any("not in it" in note for note in export.notes)


def test_a_width_that_no_block_has_is_filled_up_with_nothing(siglip, tmp_path):
    model, processor = siglip
    export_model(model, "gguf", tmp_path / "out", processor)
    tensors, types, _ = read_file(tmp_path / "out" / "mmproj-model.gguf")
    mlp = model.model.vision_tower.encoder.layers[0].mlp
    up, down, bias = (
        tensors[f"v.blk.0.{name}"] for name in ("ffn_up.weight", "ffn_down.weight", "ffn_up.bias")
    )
    assert types["v.blk.0.ffn_down.weight"] == "Q4_0"
    assert (up.shape, down.shape, bias.shape) == ((96, 64), (64, 96), (96,))
    assert np.array_equal(up[:80], mlp.fc1.weight.numpy())
    assert np.array_equal(down[:, :80], mlp.fc2.weight.numpy())
    assert not up[80:].any()
    assert not bias[80:].any()


def test_layers_that_no_block_says_become_the_smallest_exact_float(tmp_path):
    """Planes have no block; those of one scale and whole numbers of few bits fit float16."""
    model, processor = packed("llava-siglip", "int8-sym-g32")
    planes, _ = packed("llava-siglip", "ternary2-g32")
    layer = planes.model.vision_tower.encoder.layers[0].self_attn.q_proj
    model.model.vision_tower.encoder.layers[0].self_attn.q_proj = layer
    export = export_model(model, "gguf", tmp_path / "out", processor)
    tensors, types, _ = read_file(tmp_path / "out" / "mmproj-model.gguf")
    assert types["v.blk.0.attn_q.weight"] in ("F16", "F32")
    assert np.array_equal(tensors["v.blk.0.attn_q.weight"], layer.weight.numpy())
    assert any("as no block says them" in how for how in export.layers)


def test_the_text_part_alone_is_asked_for(siglip, tmp_path):
    model, _ = siglip
    with pytest.raises(ValueError, match="expected a processor with an image_processor.*--text-only"):
        export_model(model, "gguf", tmp_path / "out", siglip[1].tokenizer)
    export = export_model(model, "gguf", tmp_path / "out", siglip[1].tokenizer, text_only=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]
    assert sum(export.layers.values()) == 14
    assert any("vision tower and the projector are not in it" in note for note in export.notes)


def test_an_old_vision_part_goes_with_the_model_that_is_replaced(siglip, tmp_path):
    export_model(*siglip[:1], "gguf", tmp_path / "out", siglip[1])
    assert (tmp_path / "out" / "mmproj-model.gguf").is_file()
    export_model(packed_text("llama"), "gguf", tmp_path / "out", byte_level())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]


def test_other_targets_hold_the_whole_model(siglip, tmp_path):
    with pytest.raises(ValueError, match="holds the whole model; gguf, gguf-small can be written"):
        export_model(siglip[0], "gptq", tmp_path / "out", text_only=True)


def test_a_class_token_is_noted_and_its_position_written_last(tmp_path):
    model, processor = packed("llava-clip", "int8-sym-g32")
    export = export_model(model, "gguf", tmp_path / "out", processor)
    tensors, _, _ = read_file(tmp_path / "out" / "mmproj-model.gguf")
    embeddings = model.model.vision_tower.embeddings
    position = embeddings.position_embedding.weight.detach().numpy()
    assert np.array_equal(tensors["v.position_embd.weight"], np.concatenate([position[1:], position[:1]]))
    assert np.array_equal(tensors["v.class_embd"], embeddings.class_embedding.detach().numpy())
    assert any("issue 25814" in note for note in export.notes)


def alternate(weight, n_heads):
    """Rows of each head from (first half, second half) to one of each in turn."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


CASES = {
    "idefics3": {
        "v.blk.2.attn_out.weight": lambda m: m.vision_model.encoder.layers[2].self_attn.out_proj.weight,
        "v.post_ln.bias": lambda m: m.vision_model.post_layernorm.bias,
        "mm.model.fc.weight": lambda m: m.connector.modality_projection.proj.weight,
    },
    "qwen2_vl": {
        "v.patch_embd.weight": lambda m: m.visual.patch_embed.proj.weight[:, :, 0],
        "v.patch_embd.weight.1": lambda m: m.visual.patch_embed.proj.weight[:, :, 1],
        "v.blk.1.attn_k.weight": lambda m: m.visual.blocks[1].attn.qkv.weight[64:128],
        "v.blk.1.attn_v.bias": lambda m: m.visual.blocks[1].attn.qkv.bias[128:],
        "mm.2.weight": lambda m: m.visual.merger.mlp[2].weight,
    },
    "qwen2_5_vl": {
        "v.blk.2.ffn_gate.weight": lambda m: pad(m.visual.blocks[2].mlp.gate_proj.weight, (0, 0, 0, 16)),
        "v.post_ln.weight": lambda m: m.visual.merger.ln_q.weight,
    },
    "qwen3_vl": {
        "v.blk.0.attn_qkv.weight": lambda m: m.visual.blocks[0].attn.qkv.weight,
        "v.deepstack.0.fc1.weight": lambda m: m.visual.deepstack_merger_list[0].linear_fc1.weight,
        "v.position_embd.weight": lambda m: m.visual.pos_embed.weight,
    },
    "internvl": {
        "v.class_embd": lambda m: m.vision_tower.embeddings.cls_token.flatten(),
        "v.position_embd.weight": lambda m: m.vision_tower.embeddings.position_embeddings[0].roll(-1, 0),
        "v.blk.1.ls2.weight": lambda m: m.vision_tower.encoder.layer[1].lambda_2,
        "mm.model.mlp.3.bias": lambda m: m.multi_modal_projector.linear_2.bias,
    },
    "mistral3": {
        "v.blk.0.attn_q.weight": lambda m: alternate(
            m.vision_tower.transformer.layers[0].attention.q_proj.weight, 4
        ),
        "v.token_embd.img_break": lambda m: m.language_model.embed_tokens.weight[513],
        "mm.patch_merger.weight": lambda m: m.multi_modal_projector.patch_merger.merging_layer.weight,
    },
}
FIELDS = {
    "idefics3": ("idefics3", {"projector.scale_factor": 2, "preproc_image_size": 56}),
    "qwen2_vl": ("qwen2vl_merger", {"embedding_length": 64, "feed_forward_length": 128}),
    "qwen2_5_vl": ("qwen2.5vl_merger", {"n_wa_pattern": 2, "block_count": 3}),
    "qwen3_vl": ("qwen3vl_merger", {"image_size": 128, "is_deepstack_layers": [True, False, False]}),
    "internvl": ("internvl", {"projector.scale_factor": 2, "preproc_max_tiles": 12}),
    "mistral3": ("pixtral", {"spatial_merge_size": 2, "projection_dim": 64}),
}


@pytest.mark.parametrize("family", CASES)
def test_every_family_is_written_in_its_own_layout(family, tmp_path):
    model, processor = packed(family, "int4-sym-g32")
    export_model(model, "gguf", tmp_path / "out", processor)
    tensors, types, fields = read_file(tmp_path / "out" / "mmproj-model.gguf")
    projector, expected = FIELDS[family]
    assert fields["clip.projector_type"] == projector
    assert {name: fields[f"clip.vision.{name}"] for name in expected} == expected
    assert {kind for name, kind in types.items() if ".ffn_" in name and "weight" in name} == {"Q4_0"}
    for name, value in CASES[family].items():
        assert np.array_equal(tensors[name], value(model.model).detach().numpy()), name


def test_a_family_that_llama_cpp_does_not_know_is_refused_by_name(siglip, monkeypatch, tmp_path):
    monkeypatch.delitem(mmproj_families.FAMILIES, "llava")
    with pytest.raises(ValueError, match="part of smolvlm, .*; this model is 'llava': --text-only"):
        export_model(siglip[0], "gguf", tmp_path / "out", siglip[1])


@pytest.mark.parametrize(
    ("family", "field", "value", "message"),
    [
        ("qwen2_5_vl", "window_size", 56, "windows of 112 pixels"),
        ("qwen2_5_vl", "fullatt_block_indexes", [0, 2], r"blocks \[0, 2\] of 3"),
        ("internvl", "norm_type", "rms_norm", "those with layer_norm"),
        ("mistral3", "rope_parameters", {"rope_theta": 1e5}, "base of 10000"),
    ],
)
def test_towers_of_another_kind_are_refused(family, field, value, message):
    model, _ = picture_models.build(family)
    setattr(model.config.vision_config, field, value)
    with pytest.raises(ValueError, match=message):
        mmproj_families.vision_part(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, p: setattr(m.config, "vision_feature_layer", [-2, -1]), "joins several layers"),
        (
            lambda m, p: setattr(m.config, "vision_feature_select_strategy", "default"),
            "select_strategy 'default'",
        ),
        (lambda m, p: setattr(m.config, "projector_hidden_act", "relu"), "has gelu and biases"),
        (
            lambda m, p: setattr(m.config.vision_config, "hidden_act", "relu"),
            "computes towers with quick_gelu",
        ),
        (lambda m, p: setattr(p.image_processor, "rescale_factor", 1 / 127.5), "divides pixels by 255"),
        (
            lambda m, p: m.model.register_parameter("extra", torch.nn.Parameter(torch.ones(2))),
            "no place for 1 ",
        ),
    ],
)
def test_what_llama_cpp_does_not_know_is_refused(siglip, change, message, tmp_path):
    model, processor = copy.deepcopy(siglip)
    change(model, processor)
    with pytest.raises(ValueError, match=message):
        export_model(model, "gguf", tmp_path / "out", processor)
    assert list(tmp_path.iterdir()) == []
