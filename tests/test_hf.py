"""The transformers plug-in: models of every family come back packed and bit-identical."""

import copy
import json

import pytest
import torch
import transformers
from packed_models import auto_class, block_linears, files, logits, pack_layers, packed, read_tensors
from tiny_models import FAMILIES, build, inputs
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from vlmq.attach import attach
from vlmq.hf import VlmqConfig, VlmqQuantizer, register
from vlmq.linear import QuantLinear


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A packed language model, its folder in several shards, and its logits."""
    model = packed("llama")
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder, max_shard_size="40KB")
    return model, folder, logits(model, "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_reload_is_packed_and_identical(family, tmp_path):
    model = packed(family)
    before = logits(model, family)
    model.save_pretrained(tmp_path / "a", max_shard_size="60KB")
    loaded, info = auto_class(family).from_pretrained(tmp_path / "a", output_loading_info=True)
    loaded.save_pretrained(tmp_path / "b", max_shard_size="60KB")

    assert len(list((tmp_path / "a").glob("*.safetensors"))) >= 2
    assert torch.equal(logits(loaded, family), before)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    layers = {name: m for name, m in loaded.named_modules() if isinstance(m, QuantLinear)}
    assert layers.keys() == model.config.quantization_config.schemes().keys()
    assert not {f"{name}.weight" for name in layers} & loaded.state_dict().keys()
    assert {layer.qweight.dtype for layer in layers.values()} == {torch.uint8}
    assert loaded.get_memory_footprint() == model.get_memory_footprint()
    for target, source in model.all_tied_weights_keys.items():
        assert loaded.get_parameter(target) is loaded.get_parameter(source)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_experts_stay_in_full_precision_under_their_names(tmp_path):
    model = packed("qwen3_vl_moe")
    experts = {name: p for name, p in model.named_parameters() if ".experts." in name}
    model.save_pretrained(tmp_path)
    loaded = auto_class("qwen3_vl_moe").from_pretrained(tmp_path)
    assert experts
    assert all(torch.equal(loaded.get_parameter(name), p) for name, p in experts.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_leaves_packed_tensors_as_they_are(dtype, llama):
    model, folder, _ = llama
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    state = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[2] in ("qweight", "scales", "zeros"):
            assert torch.equal(state[name], tensor)
            assert not loaded.get_parameter(name).requires_grad
        else:
            assert state[name].dtype == dtype
    assert torch.isfinite(logits(loaded, "llama")).all()


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_device_map_gives_the_same_model(device_map, llama):
    _, folder, before = llama
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert torch.equal(logits(loaded, "llama").cpu(), before)


@pytest.mark.gpu
def test_gpu_load_checks_and_answers(llama):
    _, folder, before = llama
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map={"": 0})
    batch = {key: value.cuda() for key, value in inputs("llama", 1)[0].items()}
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).logits.cpu().float(), before.float(), atol=0.05)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_model_is_the_same_and_saves_again(place, llama, tmp_path):
    _, folder, before = llama
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {"model.norm": "cpu", "lm_head": "cpu", "model.layers.1": place}
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert loaded.get_parameter("model.layers.1.mlp.up_proj.qweight").is_meta == (place == "disk")
    assert torch.equal(logits(loaded, "llama"), before)
    loaded.save_pretrained(tmp_path / "again")
    tensors, saved = read_tensors(tmp_path / "again"), read_tensors(folder)
    assert tensors.keys() == saved.keys()
    assert all(torch.equal(tensors[name], saved[name]) for name in saved)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, "llama"), before)


def test_offloaded_siglip_survives_its_own_initialization(tmp_path):
    model = packed("siglip")
    model.save_pretrained(tmp_path / "a")
    parts = (
        "text_model",
        "vision_model.embeddings",
        "vision_model.encoder.layers.0",
        "logit_scale",
        "logit_bias",
    )
    device_map = dict.fromkeys((*parts, "vision_model.post_layernorm", "vision_model.head"), "cpu")
    device_map |= {"vision_model.encoder.layers.1": "disk"}
    loaded = AutoModel.from_pretrained(tmp_path / "a", device_map=device_map, offload_folder=tmp_path / "b")
    assert torch.equal(logits(loaded, "siglip"), logits(model, "siglip"))


def test_deepcopy_and_generate_work_on_the_loaded_model(llama):
    model, folder, before = llama
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    twin = copy.deepcopy(loaded)
    ids = inputs("llama", 1)[0]["input_ids"]
    texts = [m.generate(ids, max_new_tokens=4, do_sample=False) for m in (model, loaded, twin)]
    assert all(torch.equal(text, texts[0]) for text in texts)
    assert twin.config.quantization_config is twin.hf_quantizer.quantization_config


def test_cast_keeps_scales(llama):
    _, folder, _ = llama
    loaded = AutoModelForCausalLM.from_pretrained(folder).to(torch.float32)
    assert {m.scales.dtype for m in loaded.modules() if isinstance(m, QuantLinear)} == {torch.float16}
    with pytest.raises(ValueError, match="half"):
        loaded.half()


def test_parts_kept_in_float32_do_not_cast_scales(llama, monkeypatch):
    _, folder, _ = llama
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["o_proj"])
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.get_submodule("model.layers.0.self_attn.o_proj").scales.dtype == torch.float16


def test_attach_leaves_the_config_that_built_the_model(tmp_path):
    config = FAMILIES["llava"]()
    model = auto_class("llava").from_config(config, dtype=torch.bfloat16)
    chosen = dict.fromkeys(block_linears(model), "int4-g32")
    pack_layers(model, chosen)
    attach(model, chosen)
    assert not hasattr(config, "quantization_config")
    assert model.config.text_config is model.model.language_model.config
    auto_class("llava").from_config(config).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_attach_again_adds_layers(tmp_path):
    model = build("llama", torch.bfloat16)
    names = block_linears(model)
    for part, scheme in ((names[:7], "int4-g32"), (names[7:], "ternary-g16")):
        pack_layers(model, dict.fromkeys(part, scheme))
        attach(model, dict.fromkeys(part, scheme))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.quantization_config.modules == {"int4-g32": names[:7], "ternary-g16": names[7:]}
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))


def test_attach_refuses_lists_that_differ_from_the_model():
    model = build("llama")
    name = block_linears(model)[0]
    with pytest.raises(ValueError, match="differ: model.layers.0.self_attn.q_proj"):
        attach(model, {name: "int4-g32"})
    pack_layers(model, {name: "int4-g32"})
    with pytest.raises(ValueError, match="packed as int4-g32, listed as int4-g64"):
        attach(model, {name: "int4-g64"})
    with pytest.raises(TypeError, match="JSON"):
        attach(model, {name: "int4-g32"}, {"seed": torch.tensor(1)})


def test_attach_refuses_a_packed_first_parameter():
    model = build("llama", torch.bfloat16)
    pack_layers(model, {"lm_head": "int4-g32"})
    model._modules = {"lm_head": model.lm_head, "model": model.model}
    with pytest.raises(ValueError, match="'lm_head' holds the model's first parameter"):
        attach(model, {"lm_head": "int4-g32"})


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_packed_output_head_is_untied_and_reloads(family, tmp_path):
    model = build(family, torch.bfloat16)
    pack_layers(model, {"lm_head": "int4-g32"})
    attach(model, {"lm_head": "int4-g32"})
    before = logits(model, family)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(auto_class(family).from_pretrained(tmp_path), family), before)


def test_save_refuses_a_model_whose_packed_layers_changed(tmp_path):
    model = packed("llama")
    model.lm_head = QuantLinear.from_quantized(model.model.layers[0].mlp.up_proj.quantized_weight(), None)
    with pytest.raises(ValueError, match="differ: lm_head"):
        model.save_pretrained(tmp_path)


def test_another_class_than_the_saved_one_is_refused(llama):
    _, folder, _ = llama
    with pytest.raises(ValueError, match=r"no linear layer model.layers.0.*saved \(LlamaForCausalLM\)"):
        AutoModel.from_pretrained(folder)


def test_quantizing_on_the_fly_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path)
    config = VlmqConfig({"int4-g32": ["model.layers.0.mlp.up_proj"]})
    with pytest.raises(ValueError, match="vlmq does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_dequantize_gives_a_plain_model(llama, tmp_path):
    model, folder, before = llama
    plain = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    assert not any(isinstance(m, QuantLinear) for m in plain.modules())
    assert torch.allclose(logits(plain, "llama").float(), before.float(), atol=0.05)
    plain.save_pretrained(tmp_path)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path), "llama"), logits(plain, "llama")
    )


def test_dequantize_after_a_save(tmp_path):
    """A save by transformers leaves the dtype as a word in the config of the model in memory."""
    model = packed("llama")
    model.save_pretrained(tmp_path)
    assert model.dequantize().get_input_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 4}, r"format_version 4, this vlmq \(.*\) reads 1, 2, 3; upgrade"),
        ({"format_version": "1"}, "format_version '1'"),
        ({"modules": {}}, "must map scheme names"),
        ({"modules": {"int4-g64": 3}}, "must map scheme names"),
        ({"modules": {"int5-g64": ["a"]}}, "'int5' of 'int5-g64' is unknown; known: int8"),
        ({"modules": {"int4-g65": ["a"]}}, "group size 65"),
        ({"modules": {"int4-g64": ["a"], "int2-g64": ["a"]}}, "layer 'a' is listed twice"),
        ({"rotation": "hadamard"}, "keys that no format version has: rotation"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        VlmqConfig(**({"modules": {"int4-g64": ["a"]}} | change))


def test_config_survives_any_number_of_round_trips():
    config = VlmqConfig({"int4-g64": ["a"]}, {"seed": 3})
    first = config.to_dict()
    assert VlmqConfig.from_dict(json.loads(json.dumps(first))).to_dict() == first
    assert first["quant_method"] == "vlmq"


def test_register_twice_is_harmless():
    register()
    register()
    assert AUTO_QUANTIZER_MAPPING["vlmq"] is VlmqQuantizer
