"""Whole decoder layers in one call, where one new token of each sequence is wanted on a CPU.

The decoder layers of Llama, Mistral, Qwen2, Qwen3, SmolLM3 and of the language models of many VLMs are one computation.
`DecoderStep` takes the place of such a layer's forward, and computes a call by `vlmq.kernels.decoder` where

  - the code of the layer and of its parts is known (`vlmq.known_code`),
  - each part is as the family made it: no adapter, no hook, no forward of somebody else's,
  - all its linear layers are packed, and the cache is a `GrowingLayer` with room for the token.

Everything else goes to the layer's own code: prompts, training, compilation, other caches. Results differ from its
results by rounding.
"""

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from transformers import DynamicCache

from vlmq.decoding_attention import CHANGING, NAME
from vlmq.growing_cache import GrowingLayer
from vlmq.kernels.cpu import BoundLayer
from vlmq.kernels.decoder import N_LAYERS, Decoder, Norm, Sizes, why_not
from vlmq.kernels.ops import runs_plainly
from vlmq.known_code import AttentionCode, attention_code
from vlmq.linear import QuantLinear

ATTENTION_LAYERS = "q_proj", "k_proj", "v_proj", "o_proj"
MLP_LAYERS = "gate_proj", "up_proj", "down_proj"


def install_steps(model: nn.Module) -> None:
    """Let the decoder layers whose code is known compute new tokens in one call; all else they do as before."""
    for module in model.modules():
        if "forward" not in module.__dict__ and attention_code(module) is not None:
            module.forward = DecoderStep(module)


class DecoderStep:
    """The forward of a decoder layer whose code is known."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.__signature__ = inspect.signature(type(layer).forward.__get__(layer))
        self._modules: tuple[nn.Module | None, ...] = ()
        self._places: list[tuple[int, int]] = []
        self._decoder: Decoder | None = None
        self._turns_always = True

    def __reduce__(self) -> tuple[Any, ...]:
        return DecoderStep, (self.layer,)  # addresses mean nothing in a copy

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what the layer's own forward does."""
        layer = self.layer
        if not args and not torch.compiler.is_compiling() and hidden_states.shape[-2] == 1:
            out = self._decode(hidden_states, **kwargs)
            if out is not None:
                return out
        return type(layer).forward(layer, hidden_states, *args, **kwargs)

    def _decode(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        modules = _modules_of(self.layer)
        attention: Any = modules[0]
        if (
            type(past_key_values) is not DynamicCache
            or past_key_values.offloading
            or attention.training
            or attention.config._attn_implementation != NAME
            or any(kwargs.get(name) is not None for name in CHANGING)
            or any(module is not None and _is_changed(module) for module in modules)
            or module_hooks._global_forward_hooks
            or module_hooks._global_forward_pre_hooks
            or len(past_key_values.layers) <= attention.layer_idx
        ):
            return None
        cached, decoder = past_key_values.layers[attention.layer_idx], self._decoder_of(modules, x)
        room = cached.room_for_one() if isinstance(cached, GrowingLayer) else None
        if decoder is None or room is None:
            return None
        keys, values, n_past = room
        turns = self._turns_always or attention.use_rope
        turn = position_embeddings if turns else None
        if turns and turn is None:
            return None  # the layer's own code says what is missing
        if not decoder.takes(x, turn, keys, values, attention_mask, n_past):
            return None
        out = decoder(x, turn, keys, values, attention_mask, n_past)
        cast(GrowingLayer, cached).advance()
        return out

    def _decoder_of(self, modules: tuple[nn.Module | None, ...], x: Tensor) -> Decoder | None:
        """Return the layer as one function, made anew where a module or a tensor is not the one of before."""
        parts = [p for module in modules[2:] if module is not None for p in module._parameters.values()]
        if not runs_plainly(x, tuple(parts)):
            return None
        places = [(part.data_ptr(), part.nbytes) for part in parts if part is not None]
        if modules != self._modules or places != self._places:
            code = attention_code(self.layer)
            self._decoder = None if code is None else _make_decoder(code, modules, x)
            self._turns_always = code is None or not code.asks_for_rope
            self._modules, self._places = modules, places
        return self._decoder


def _modules_of(layer: nn.Module) -> tuple[nn.Module | None, ...]:
    """Return attention, MLP, the four norms (None for norms of heads that it has not), and the seven linear layers."""
    own = layer._modules
    attention, mlp = cast(nn.Module, own["self_attn"]), cast(nn.Module, own["mlp"])
    inner, outer = attention._modules, mlp._modules
    return (
        attention,
        mlp,
        own["input_layernorm"],
        own["post_attention_layernorm"],
        inner.get("q_norm"),
        inner.get("k_norm"),
        *[inner.get(name) for name in ATTENTION_LAYERS],
        *[outer.get(name) for name in MLP_LAYERS],
        outer.get("act_fn"),
    )


def _is_changed(module: nn.Module) -> bool:
    """Whether somebody listens to a module, or has replaced its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _make_decoder(code: AttentionCode, modules: tuple[nn.Module | None, ...], x: Tensor) -> Decoder | None:
    attention = cast(Any, modules[0])
    linear = [m for m in modules[6:13] if isinstance(m, QuantLinear)]
    bound = [b for m in linear if isinstance(b := m.bound_to(x), BoundLayer)]
    if len(bound) < len(linear) or len(linear) < N_LAYERS or attention.head_dim < 1:
        return None
    norms = [_norm_of(m) for m in modules[2 : 6 if code.has_norms else 4]]
    norms += [None] * (4 - len(norms))
    heads, rest = divmod(linear[0].out_features, attention.head_dim)
    kv_heads, kv_rest = divmod(linear[1].out_features, attention.head_dim)
    sizes = Sizes(heads, kv_heads, attention.head_dim, attention.scaling)
    if rest or kv_rest or why_not(bound, norms, sizes, x.dtype) is not None:
        return None
    return Decoder(bound, norms, sizes, x.dtype)


def _norm_of(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)
