"""Decoder layers whose code is known: Llama's, and those of families that wrote the same out anew.

transformers has a file for each family, and most of its decoder layers are copies. Their code is recognized by a hash
of its words, without comments, annotations of the head and docstrings. Code that was changed, by a new version or by
somebody who replaced it, has another hash and is not known.
"""

import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from torch import nn
from transformers.activations import SiLUActivation

SKIPPED = {tokenize.COMMENT, tokenize.NL}
LAYOUT = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


class AttentionCode(NamedTuple):
    """What the code of an attention does beyond Llama's."""

    has_norms: bool = False
    asks_for_rope: bool = False


# Of transformers 5.17 to 5.23; what else has the same words is known too.
LAYER = {"b46efec6f94f05e0"}
NORM = {"56e5c23eee907c84"}
MLP = {"ce7ec52c0a4d932e", "3c3c118984893813"}
ACTIVATIONS = (nn.SiLU, SiLUActivation)
TURN = {"5c81d2c9f37413fa"}
HALVES = {"8098f978bcb6c252"}
ATTENTION = {
    "dc76318ba04d1296": AttentionCode(),  # Llama
    "f3e549dfc6773bab": AttentionCode(),  # Mistral
    "4fd7b502d4740828": AttentionCode(),  # Qwen2
    "9d071e000bb1fb62": AttentionCode(),  # Qwen2-VL, Qwen2.5-VL
    "f12c59a9663306d4": AttentionCode(has_norms=True),  # Qwen3
    "364923aa05041fd2": AttentionCode(has_norms=True),  # Qwen3-VL
    "d88c081da18c9688": AttentionCode(asks_for_rope=True),  # SmolLM3
}
# Models that call their layers one after the other, and do nothing between but, as Qwen3-VL, to add to what one gives.
PLAIN_LOOPS = {
    "a4e9d7f252e2c414",  # Llama
    "acbcec8c13ec5080",  # Mistral
    "a9fc20c158eb9b80",  # Qwen2, Qwen3, SmolLM3
    "fb4c02e95436251f",  # Qwen2-VL, Qwen2.5-VL
    "5101d43d6876d4c5",  # Qwen3-VL
}


@cache
def fingerprint(function: Callable[..., Any]) -> str:
    """Hash the words of a function's body; an empty string where its source cannot be read."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return ""
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in SKIPPED]
    body = tokens[_end_of_head(tokens) :]
    if len(body) > 2 and body[2].type == tokenize.STRING:
        del body[2:4]  # a docstring and its line end, after the line end and the indent of the head
    words = [tokenize.tok_name[t.type] if t.type in LAYOUT else t.string for t in body]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def attention_code(layer: nn.Module) -> AttentionCode | None:
    """Say what the attention of a decoder layer does beyond Llama's; None if any code of the layer is not known."""
    attention, mlp = layer._modules.get("self_attn"), layer._modules.get("mlp")
    norms = [layer._modules.get(name) for name in ("input_layernorm", "post_attention_layernorm")]
    if attention is None or mlp is None or not all(is_known_norm(norm) for norm in norms):
        return None
    forward = type(attention).forward
    turn = getattr(forward, "__globals__", {}).get("apply_rotary_pos_emb")
    halves = getattr(turn, "__globals__", {}).get("rotate_half")
    known = ATTENTION.get(fingerprint(forward))
    is_known = (
        fingerprint(type(layer).forward) in LAYER
        and fingerprint(type(mlp).forward) in MLP
        and type(mlp._modules.get("act_fn")) in ACTIVATIONS
        and fingerprint(turn) in TURN
        and fingerprint(halves) in HALVES
    )
    heads = [attention._modules.get(name) for name in ("q_norm", "k_norm")]
    if known is None or not is_known or (known.has_norms and not all(is_known_norm(norm) for norm in heads)):
        return None
    return known


def is_known_norm(module: nn.Module | None) -> bool:
    """Say whether a module is an RMSNorm as Llama's."""
    return module is not None and fingerprint(type(module).forward) in NORM


def is_plain_loop(model: nn.Module) -> bool:
    """Say whether a model's forward does nothing of its own between its decoder layers."""
    return "layers" in model._modules and fingerprint(type(model).forward) in PLAIN_LOOPS


def _end_of_head(tokens: list[tokenize.TokenInfo]) -> int:
    """Return where the body of a function begins: behind the colon of its `def`, decorators skipped."""
    depth, has_begun = 0, False
    for i, token in enumerate(tokens):
        has_begun |= depth == 0 and token.string == "def"
        depth += (token.string in "([{") - (token.string in ")]}") if token.type == tokenize.OP else 0
        if has_begun and depth == 0 and token.string == ":":
            return i + 1
    return len(tokens)
