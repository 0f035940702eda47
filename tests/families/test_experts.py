"""Fused experts taken apart: the same function for every variant of the contract, and back again."""

import copy

import pytest
import torch
from installed import older
from torch import nn
from transformers import (
    AriaTextConfig,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    NemotronHConfig,
    Qwen3MoeConfig,
    Step3p7TextConfig,
)
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from vlmq.families.experts import SortedExperts, UnfusedExperts, is_fused, layers_of, owner, unfuse

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_local_experts": 5, "num_experts": 5}
KINDS = {
    "plain": lambda: MixtralExperts(MixtralConfig(**SIZES)),
    "other sizes": lambda: Qwen3MoeExperts(Qwen3MoeConfig(**SIZES, moe_intermediate_size=24)),
    "transposed": lambda: AriaExperts(AriaTextConfig(**SIZES, moe_num_experts=5)),
    "transposed, biases, own gate": lambda: GptOssExperts(GptOssConfig(**SIZES)),
    "no gate": lambda: NemotronHExperts(
        NemotronHConfig(**SIZES, n_routed_experts=5, moe_intermediate_size=24)
    ),
    "no attributes, clamped": lambda: Step3p7Experts(
        Step3p7TextConfig(**SIZES, moe_intermediate_size=24), swiglu_limit=0.5
    ),
}
if not older("transformers", "5.20"):  # the family came with it
    from transformers import MuseSparkTextConfig
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

    KINDS["norm"] = lambda: MuseSparkExperts(
        MuseSparkTextConfig(**SIZES, moe_hidden_size=32, moe_intermediate_size=24, num_attention_heads=4)
    )
SORTED = "sorted"
ALL = {**KINDS, SORTED: lambda: Llama4TextExperts(Llama4TextConfig(**SIZES))}


def build(kind: str) -> nn.Module:
    torch.manual_seed(3)
    module = ALL[kind]()
    if hasattr(module, "config"):
        module.config._experts_implementation = "eager"
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3)
    return module


def routed(n_tokens: int = 11, n_experts: int = 5, n_chosen: int = 2):
    generator = torch.Generator().manual_seed(4)
    scores = torch.rand(n_tokens, n_experts, generator=generator)
    scores[:, 1] = 0  # an expert that nobody chooses
    weights, chosen = scores.topk(n_chosen)
    return torch.randn(n_tokens, 32, generator=generator), chosen, weights


@pytest.mark.parametrize("kind", KINDS)
def test_taken_apart_the_experts_compute_the_same(kind):
    module = build(kind)
    assert is_fused(module)
    apart = UnfusedExperts(module)
    with torch.no_grad():
        torch.testing.assert_close(apart(*routed()), module(*routed()), rtol=1e-5, atol=1e-5)
        nothing = routed(n_tokens=0)
        assert apart(*nothing).shape == (0, 32)


def stacks(n_tokens: int = 11) -> torch.Tensor:
    """The same as Llama 4's experts get it: a stack of all tokens for each, zero where it is not chosen."""
    tokens, chosen, weights = routed(n_tokens)
    scores = torch.zeros(n_tokens, 5).scatter(1, chosen, weights)
    return (tokens * scores.T[:, :, None]).reshape(-1, 32)


def given_to(kind: str) -> tuple[torch.Tensor, ...]:
    return (stacks(),) if kind == SORTED else routed()


def test_experts_of_sorted_tokens_compute_the_same_and_only_what_is_chosen():
    module = build(SORTED)
    assert is_fused(module)
    apart = SortedExperts(module)
    with torch.no_grad():
        torch.testing.assert_close(apart(stacks()), module(stacks()), rtol=1e-5, atol=1e-5)
        assert apart(torch.zeros(15, 32)).eq(0).all()
        rows = []
        apart.layer(1, "down_proj").register_forward_hook(lambda *_: rows.append("expert that nobody chose"))
        apart.layer(0, "down_proj").register_forward_hook(lambda _, x, y: rows.append(len(y)))
        apart(stacks())
    assert rows == [int((routed()[1] == 0).sum())]


def test_sorted_tokens_are_routed_to_the_expert_of_their_stack():
    tokens, chosen, weights = SortedExperts(build(SORTED)).routed(stacks())
    assert torch.equal(tokens, stacks())
    assert weights.eq(1).all()
    expected = torch.full((5, 11), -1)
    for token, numbers in enumerate(routed()[1].tolist()):
        for number in numbers:
            expected[number, token] = number
    assert torch.equal(chosen, expected.view(-1, 1))


@pytest.mark.parametrize("kind", ALL)
def test_put_together_they_are_what_they_were(kind):
    module = build(kind)
    again = UnfusedExperts(copy.deepcopy(module)).fused()
    assert type(again) is type(module)
    assert again.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in module.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(*given_to(kind)), module(*given_to(kind)))


@pytest.mark.parametrize("kind", ALL)
def test_the_layers_foretold_are_the_layers_made_and_share_the_memory(kind):
    module = build(kind)
    foretold = {f"{layer.expert}.{layer.projection}": layer for layer in layers_of(module)}
    apart = UnfusedExperts(module)
    assert list(foretold) == apart.layer_names()
    for name, layer in foretold.items():
        linear = apart.get_submodule(name)
        assert type(linear) is nn.Linear
        assert (linear.in_features, linear.out_features) == (layer.in_features, layer.out_features)
        assert tuple(linear.weight.shape) == (layer.out_features, layer.in_features)
        assert layer.n_bytes == linear.weight.numel() * 4
    storage = module.down_proj.untyped_storage().data_ptr()  # type: ignore[union-attr,operator]
    assert apart.layer(2, "down_proj").weight.untyped_storage().data_ptr() == storage  # type: ignore[union-attr,operator]


def test_the_gradient_of_the_tokens_passes():
    module, (tokens, chosen, weights) = build("plain"), routed()
    found = []
    for experts in (module, UnfusedExperts(module)):
        x = tokens.clone().requires_grad_()
        experts(x, chosen, weights).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[0], found[1])


def test_a_copy_computes_the_same_and_is_independent():
    apart = UnfusedExperts(build("norm"))
    twin = copy.deepcopy(apart)
    with torch.no_grad():
        before = apart(*routed())
        twin.post_expert_norm.weight.zero_()
        assert torch.equal(apart(*routed()), before)
        assert not torch.equal(twin(*routed()), before)


def test_only_experts_that_are_named_are_taken_apart():
    model = nn.ModuleDict({"a": nn.ModuleDict({"experts": build("plain")}), "b": build("plain")})
    model["c"] = nn.ModuleDict({"experts": build(SORTED)})
    found = unfuse(
        model,
        [
            "a.experts.3.down_proj",
            "a.experts.0.gate_up_proj",
            "b.down_proj",
            "c.experts.1.x",
            "d.experts.1.x",
        ],
    )
    assert list(found) == ["a.experts", "c.experts"]
    assert type(model.get_submodule("c.experts")) is SortedExperts
    assert is_fused(found["a.experts"])
    assert isinstance(model.get_submodule("a.experts"), UnfusedExperts)
    assert is_fused(model.get_submodule("b"))


def test_the_owner_is_read_from_the_name():
    assert owner("model.layers.1.mlp.experts.12.down_proj") == "model.layers.1.mlp.experts"
    assert owner("experts.0.up_proj") == "experts"
    assert owner("lm_head") is None
    assert owner("mlp.down_proj") is None
    assert owner("model.norm.weight") is None


def test_other_layouts_are_not_taken_for_fused_experts():
    module = build("plain")
    module.register_parameter("router", nn.Parameter(torch.zeros(5, 32)))
    assert not is_fused(module)
    assert not is_fused(nn.Linear(2, 2))
    assert not is_fused(UnfusedExperts(build("plain")))
