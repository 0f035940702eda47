"""Each change of a decoder layer that its addresses or its function depend on is seen."""

import gc
import weakref
from collections import OrderedDict

import pytest
import torch
from packed_models import packed
from torch import nn

from vlmq.kernels import cpu
from vlmq.watching import Watch, are_heard, modules_of

pytestmark = pytest.mark.skipif(cpu.missing_library() is not None, reason="needs the C kernels")


@pytest.fixture(scope="module")
def layers():
    return [*packed("llama", ("int4-g32",)).requires_grad_(False).model.layers]


@pytest.fixture
def layer(layers):
    """One of two that are watched; changes are taken back."""
    layer = layers[1]
    before = [
        (module, {**vars(module)}, {**module._parameters}, {**module._modules}) for module in layer.modules()
    ]
    data = {name: parameter.data for name, parameter in layer.named_parameters()}
    name = layer.self_attn.config._attn_implementation
    yield layer
    for module, own, parameters, modules in before:
        module.__dict__.clear()
        module.__dict__.update(own)
        for stored, kept in ((module._parameters, parameters), (module._modules, modules)):
            stored.clear()
            stored.update(kept)
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    for name_of, parameter in layer.named_parameters():
        parameter.data = data[name_of]
        parameter.requires_grad_(False)
    layer.self_attn.config._attn_implementation = name


def narrow(parameter):
    """Fewer numbers from the same place on."""
    parameter.data = parameter.data[:-1]


def replace_data(parameter):
    parameter.data = parameter.data.clone()


def replace_hooks(module):
    """As some clear hooks; a new dictionary, and then somebody listens."""
    module._forward_hooks = OrderedDict()
    module.register_forward_hook(lambda m, a, out: None)


OTHER_MODULES = [
    lambda layer: setattr(layer.mlp, "up_proj", nn.Linear(64, 96)),
    lambda layer: setattr(layer.mlp, "act_fn", nn.GELU()),
    lambda layer: layer.self_attn.add_module("q_norm", nn.Identity()),
    lambda layer: setattr(layer, "self_attn", nn.Identity()),
    lambda layer: setattr(layer, "post_attention_layernorm", nn.Identity()),
]
OTHER_TENSORS = [
    lambda layer: replace_data(layer.mlp.down_proj.qweight),
    lambda layer: replace_data(layer.input_layernorm.weight),
    lambda layer: narrow(layer.self_attn.v_proj.scales),
    lambda layer: setattr(
        layer.mlp.up_proj, "scales", nn.Parameter(layer.mlp.up_proj.scales.data * 2, False)
    ),
    lambda layer: layer.mlp.down_proj.register_parameter("bias", nn.Parameter(torch.zeros(64))),
    lambda layer: layer.post_attention_layernorm.register_parameter("bias", nn.Parameter(torch.zeros(64))),
]
OTHER_SETTINGS = [
    lambda layer: setattr(layer.self_attn, "layer_idx", 0),
    lambda layer: setattr(layer.self_attn, "config", type(layer.self_attn.config)()),
    lambda layer: setattr(layer.self_attn, "use_rope", 0),
]
LISTENERS = [
    lambda layer: layer.mlp.up_proj.register_forward_hook(lambda m, a, out: None),
    lambda layer: layer.self_attn.register_forward_pre_hook(lambda m, a: None),
    lambda layer: replace_hooks(layer.input_layernorm),
    lambda layer: setattr(layer.mlp, "forward", lambda x: x),
    lambda layer: setattr(layer.mlp.act_fn, "forward", lambda x: x),
    lambda layer: layer.self_attn.train(),
    lambda layer: layer.input_layernorm.weight.requires_grad_(True),
    lambda layer: setattr(layer.self_attn.config, "_attn_implementation", "sdpa"),
]


@pytest.mark.parametrize("change", OTHER_MODULES + OTHER_TENSORS + OTHER_SETTINGS)
def test_another_module_tensor_or_setting_is_seen(layers, layer, change):
    watch, alone, other = Watch(layers), Watch([layer]), Watch(layers[:1])
    assert watch.is_same()
    change(layer)
    assert not watch.is_same()
    assert not alone.is_same()
    assert other.is_same()


@pytest.mark.parametrize("change", LISTENERS)
def test_who_listens_or_wants_more_than_results_is_seen(layers, layer, change):
    watch = Watch(layers)
    assert watch.is_plain()
    change(layer)
    assert not watch.is_plain()
    assert watch.is_same()


def test_gradients_that_nobody_wants_change_nothing(layers, layer):
    layer.input_layernorm.weight.requires_grad_(True)
    with torch.no_grad():
        assert Watch(layers).is_plain()


def test_numbers_that_change_in_place_are_read_anew_by_themselves(layers, layer):
    watch = Watch(layers)
    layer.input_layernorm.weight.data.add_(0)
    assert watch.is_same()


def test_tensors_are_not_kept():
    layer = packed("llama", ("int4-g32",)).model.layers[0]
    watch = Watch([layer])
    gone = weakref.ref(layer.mlp.up_proj.scales)
    layer.mlp.up_proj.scales = nn.Parameter(torch.zeros(1))
    gc.collect()
    assert not watch.is_same()
    assert gone() is None


def test_listeners_at_the_layer_itself_are_another_question(layers, layer):
    assert not are_heard(layers)
    layer.register_forward_hook(lambda m, a, out: None)
    assert are_heard(layers)
    assert not are_heard(layers[:1])
    assert Watch(layers).is_plain()


def test_a_class_that_calls_a_layer_otherwise_hears_it(layers):
    class Loud(type(layers[0])):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    assert are_heard([Loud(layers[0].self_attn.config, 0)])


def test_all_parts_of_a_layer_are_listed(layer):
    modules = modules_of(layer)
    assert len(modules) == 14
    assert {m for m in modules if m is not None} == {*layer.modules()} - {layer}
