"""Code of decoder layers is known by its words, and by nothing else."""

import pytest
import torch
from tiny_models import build
from torch import nn

from vlmq.known_code import ATTENTION, AttentionCode, attention_code, fingerprint


def plain(x):
    return x.float() * 2


def written_otherwise(x: torch.Tensor, more: int = 1) -> torch.Tensor:
    """Words of its own."""
    # and a remark
    return (
        x.float() * 2  # here too
    )


def decorated(function):
    return function


@decorated
def with_a_decorator(x: dict[str, int]):
    return x.float() * 2


def another(x):
    return x.float() * 3


def one_line(x):
    for y in x:
        print(y)
    print(x)


def two_lines(x):
    for y in x:
        print(y)
        print(x)


def test_only_the_words_of_the_body_count():
    assert fingerprint(plain) == fingerprint(with_a_decorator)
    assert fingerprint(plain) != fingerprint(another)
    assert fingerprint(one_line) != fingerprint(two_lines)


def test_docstrings_and_remarks_do_not_count():
    def remarked(x: torch.Tensor, more: int = 1) -> torch.Tensor:
        """Words of its own."""
        # and a remark
        return x.float() * 2

    assert fingerprint(remarked) == fingerprint(plain)


@pytest.mark.parametrize("function", [len, eval("lambda x: x"), None, nn.Identity])
def test_what_has_no_source_or_is_no_such_function_is_not_known(function):
    assert fingerprint(function) not in ATTENTION


def decoder_layers(family):
    return [m for m in build(family).modules() if type(m).__name__.endswith("DecoderLayer")]


@pytest.mark.parametrize(
    "family", ["llama", "llava", "smolvlm", "internvl", "qwen2_vl", "qwen2_5_vl", "mistral3"]
)
def test_families_that_compute_as_llama_are_known(family):
    layers = decoder_layers(family)
    assert layers
    assert {attention_code(layer) for layer in layers} == {AttentionCode()}


def test_families_with_norms_of_heads_are_known():
    layers = [m for m in build("qwen3_vl").modules() if type(m).__name__ == "Qwen3VLTextDecoderLayer"]
    assert layers
    assert {attention_code(layer) for layer in layers} == {AttentionCode(has_norms=True)}


@pytest.mark.parametrize("family", ["gemma3", "paligemma", "qwen3_5"])
def test_families_that_compute_something_else_are_not(family):
    layers = decoder_layers(family)
    assert layers
    assert {attention_code(layer) for layer in layers} == {None}


@pytest.mark.parametrize("name", ["self_attn", "mlp", "input_layernorm"])
def test_a_part_of_another_class_makes_a_layer_unknown(name):
    layer = decoder_layers("llama")[0]

    class Other(type(getattr(layer, name))):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    getattr(layer, name).__class__ = Other
    assert attention_code(layer) is None


def test_an_activation_of_another_kind_makes_a_layer_unknown():
    layer = decoder_layers("llama")[0]
    layer.mlp.act_fn = nn.GELU()
    assert attention_code(layer) is None
