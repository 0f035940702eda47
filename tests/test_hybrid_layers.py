"""Layers beside attention: their linear layers are calibrated on what reaches them, all else in them is kept."""

import more_families
import pytest
import torch
from more_families.hybrids import HYBRIDS
from walk_oracle import perturb, plain_inputs

import vlmq
from vlmq.calib.batches import as_batches
from vlmq.calib.walk import layer_inputs, walk_blocks
from vlmq.families import describe
from vlmq.linear import QuantLinear

# What each kind of mixer holds: layers that are packed, and the tensors that stay as they are.
DELTA_RULE = {"in_proj_qkvz", "in_proj_ba", "out_proj"}, {"conv1d.weight", "A_log", "dt_bias", "norm.weight"}
SPLIT_DELTA_RULE = {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"}, DELTA_RULE[1]
MAMBA_2 = {"in_proj", "out_proj"}, {"conv1d.weight", "conv1d.bias", "A_log", "D", "dt_bias"}
MAMBA_1 = {"in_proj", "x_proj", "out_proj"}, {"conv1d.weight", "A_log", "D", "dt_proj.weight", "dt_proj.bias"}
CONVOLUTION = {"in_proj", "out_proj"}, {"conv.weight"}
MIXERS = {
    "qwen3_next": ("model.layers.0.linear_attn", *DELTA_RULE),
    "qwen3_5_moe": ("model.language_model.layers.0.linear_attn", *SPLIT_DELTA_RULE),
    "granitemoehybrid": ("model.layers.0.mamba", *MAMBA_2),
    "falcon_h1": ("model.layers.1.mamba", *MAMBA_2),
    "nemotron_h": ("model.layers.0.mixer", *MAMBA_2),
    "nemotron_h_omni": ("language_model.model.layers.0.mixer", *MAMBA_2),
    "jamba": ("model.layers.0.mamba", *MAMBA_1),
    "lfm2": ("model.layers.0.conv", *CONVOLUTION),
    "lfm2_moe": ("model.layers.0.conv", *CONVOLUTION),
    "lfm2_vl": ("model.language_model.layers.0.conv", *CONVOLUTION),
}


def test_every_hybrid_family_has_its_mixer_here():
    assert MIXERS.keys() == HYBRIDS.keys()


@pytest.mark.parametrize("family", MIXERS)
def test_the_linear_layers_of_a_mixer_are_packed_and_all_else_is_kept(family):
    path, layers, tensors = MIXERS[family]
    model = more_families.build(family)
    state = {name: tensor.clone() for name, tensor in model.get_submodule(path).state_dict().items()}
    vlmq.quantize(model, [more_families.inputs(family)], "int4-g16", solver="rtn")
    mixer = model.get_submodule(path)
    assert {name for name, m in mixer.named_modules() if isinstance(m, QuantLinear)} == layers
    kept = {name: tensor for name, tensor in mixer.state_dict().items() if name in state}
    assert tensors <= kept.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in kept.items())
    assert {name.partition(".")[0] for name in state.keys() - kept.keys()} <= layers


@pytest.mark.parametrize("family", MIXERS)
def test_each_layer_sees_the_inputs_of_a_plain_forward_on_both_paths(family):
    model = more_families.build(family)
    batches = as_batches([more_families.inputs(family)], model)
    names = [n for n, i in describe(model).linears.items() if i.experts is None and i.kept is None]
    seen: dict[str, dict[str, torch.Tensor]] = {"original": {}, "quantized": {}}

    def collect(block, path):
        inside = [name for name in block.linears() if f"{block.spec.name}.{name}" in names]
        for found in layer_inputs(block, inside, path=path):
            seen[path] |= {f"{block.spec.name}.{name}": x.clone() for name, x in found.items()}

    plain = {"original": plain_inputs(model, names, batches)}
    for block in walk_blocks(model, describe(model), batches):
        collect(block, "original")
        perturb(block.module)
        collect(block, "quantized")
    plain["quantized"] = plain_inputs(model, names, batches)
    for path, found in seen.items():
        assert found.keys() == set(names)
        for name, x in found.items():
            ((args, kwargs),) = plain[path][name]
            assert torch.equal(x, (*args, *kwargs.values())[0].reshape(x.shape)), f"{path} {name}"
    changed = [name for name in names if not torch.equal(seen["original"][name], seen["quantized"][name])]
    assert any(name.startswith(MIXERS[family][0]) for name in changed)
