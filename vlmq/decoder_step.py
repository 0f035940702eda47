"""Whole decoder layers in one call, where one new token of each sequence is wanted on a CPU.

The decoder layers of Llama, Mistral, Qwen2, Qwen3, SmolLM3 and of the language models of many VLMs are one computation.
`DecoderStep` takes the place of such a layer's forward, and computes a call by `vlmq.kernels.decoder` where

  - the code of the layer and of its parts is known (`vlmq.known_code`),
  - each part is as the family made it: no adapter, no hook, no forward of somebody else's,
  - all its linear layers are packed, and the cache is a `GrowingLayer` with room for the token.

It computes the layers that follow in the same call, if the model is known to call them next (`vlmq.decoder_run`) and
the same holds for them. Everything else goes to the layer's own code: prompts, training, compilation, other caches.
Results differ from its results by rounding.
"""

import inspect
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from transformers import DynamicCache

from vlmq.decoder_run import Run, current_run
from vlmq.decoding_attention import CHANGING
from vlmq.growing_cache import GrowingLayer
from vlmq.kernels.cpu import BoundLayer
from vlmq.kernels.decoder import N_LAYERS, Decoder, Norm, Past, Sizes, Token, decode, why_not
from vlmq.kernels.ops import runs_plainly
from vlmq.known_code import attention_code
from vlmq.linear import QuantLinear
from vlmq.watching import Watch, are_heard, modules_of


def install_steps(model: nn.Module) -> None:
    """Let the decoder layers whose code is known compute new tokens in one call; all else they do as before."""
    for module in model.modules():
        if "forward" not in module.__dict__ and attention_code(module) is not None:
            module.forward = DecoderStep(module)


class Ready(NamedTuple):
    """A layer as a function of a token, its keys and values, and the part of the cache that holds them."""

    layer: nn.Module
    decoder: Decoder
    past: Past
    cached: GrowingLayer


class Stack:
    """Layers that are computed with the one before them: the first of `layers`, up to one that cannot be.

    Args:
        kind: of the layer before them (`Decoder.kind`).
        layers: layers that are called one after the other.
        x: a token.
    """

    def __init__(self, kind: tuple[Any, ...], layers: list[nn.Module], x: Tensor) -> None:
        self._kind, self._asked, self._end = kind, layers, None
        self._decoders: list[Decoder] = []
        for layer in layers:
            self._end = _decoder_of(layer, x)
            if self._end is None or self._end.kind != kind:
                break
            self._decoders.append(self._end)
        self._layers = layers[: len(self._decoders)]
        self._steps = [layer.__dict__["forward"] for layer in self._layers]
        self._watch = Watch(self._layers)

    def holds(self, kind: tuple[Any, ...], layers: list[nn.Module], x: Tensor) -> bool:
        """Whether it is what would be made anew of these."""
        n = len(self._layers)
        return (
            layers == self._asked
            and kind == self._kind
            and (n == len(layers) or _decoder_of(layers[n], x) is self._end)
            and [layer.__dict__.get("forward") for layer in self._layers] == self._steps
            and not are_heard(self._layers)
            and self._watch.is_same()
            and self._watch.is_plain()
        )

    def ready(self, first: Ready, cache: DynamicCache, token: Token) -> list[Ready]:
        """Return the layers that can compute a token after the first, each with a cache of its own."""
        ready, seen = [], {first.cached}
        for layer, decoder, i in zip(self._layers, self._decoders, self._watch.indices, strict=True):
            cached = _growing_layer(cache, i)
            past = None if cached is None else cached.room_for_one()
            if cached is None or cached in seen or past is None or past.n_tokens != first.past.n_tokens:
                break
            if not decoder.fits(token, past):
                break
            seen.add(cached)
            ready.append(Ready(layer, decoder, past, cached))
        return ready


class DecoderStep:
    """The forward of a decoder layer whose code is known."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.__signature__ = inspect.signature(type(layer).forward.__get__(layer))
        self._watch: Watch | None = None
        self._made: tuple[Watch, Decoder | None] | None = None
        self._stack: Stack | None = None

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

    def decoder(self, x: Tensor) -> Decoder | None:
        """Return the layer as a function of a token; None where its own code must compute it."""
        watch, made = self._watch, self._made
        if watch is None or not watch.is_same():
            watch = self._watch = Watch([self.layer]) if attention_code(self.layer) is not None else None
        if watch is None or not watch.is_plain():
            return None
        if made is None or made[0] is not watch:
            made = self._made = watch, _make_decoder(self.layer, x)
        return made[1]

    def _decode(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        run, shared = current_run(), (attention_mask, past_key_values, position_embeddings)
        if run is not None and (out := run.take(self.layer, x, shared)) is not None:
            return out
        if (
            type(past_key_values) is not DynamicCache
            or past_key_values.offloading
            or any(kwargs.get(name) is not None for name in CHANGING)
            or module_hooks._global_forward_hooks
            or module_hooks._global_forward_pre_hooks
            or not runs_plainly(x, ())
        ):
            return None
        token = Token(x, position_embeddings, attention_mask)
        first = self._ready(past_key_values, token)
        if first is None:
            return None  # where something is missing, the layer's own code says what
        rest = [] if run is None else self._after(first, run, past_key_values, token)
        outs = decode([(one.decoder, one.past) for one in (first, *rest)], token)
        first.cached.advance()
        if run is not None and rest:
            ahead = [(one.layer, one.cached, out) for one, out in zip(rest, outs[1:], strict=True)]
            run.keep(outs[0], shared, ahead)
        return outs[0]

    def _ready(self, cache: DynamicCache, token: Token) -> Ready | None:
        cached = _growing_layer(cache, getattr(self.layer._modules["self_attn"], "layer_idx", -1))
        past = None if cached is None else cached.room_for_one()
        decoder = None if past is None else self.decoder(token.x)
        if cached is None or past is None or decoder is None or not decoder.takes(token, past):
            return None
        return Ready(self.layer, decoder, past, cached)

    def _after(self, first: Ready, run: Run, cache: DynamicCache, token: Token) -> list[Ready]:
        """Return layers that may be computed with this one: they come next, and nobody sees what lies between."""
        if self.layer.__dict__.get("forward") is not self or are_heard([self.layer]):
            return []
        stack, asked = self._stack, (first.decoder.kind, run.after(self.layer), token.x)
        if stack is None or not stack.holds(*asked):
            stack = self._stack = Stack(*asked)
        return stack.ready(first, cache, token)


def _growing_layer(cache: DynamicCache, i: int) -> GrowingLayer | None:
    cached = cache.layers[i] if 0 <= i < len(cache.layers) else None
    return cast(GrowingLayer, cached) if isinstance(cached, GrowingLayer) else None


def _decoder_of(layer: nn.Module, x: Tensor) -> Decoder | None:
    """Return a layer that nobody else sees at work as a function of a token; None if it is none."""
    step = layer.__dict__.get("forward")
    if not isinstance(step, DecoderStep) or step.layer is not layer or are_heard([layer]):
        return None
    return step.decoder(x)


def _make_decoder(layer: nn.Module, x: Tensor) -> Decoder | None:
    code, modules = attention_code(layer), modules_of(layer)
    attention = cast(Any, modules[0])
    linear = [m for m in modules[6:13] if isinstance(m, QuantLinear)]
    bound = [b for m in linear if isinstance(b := m.bound_to(x), BoundLayer)]
    if code is None or len(bound) < len(linear) or len(linear) < N_LAYERS or attention.head_dim < 1:
        return None
    norms = [_norm_of(m) for m in modules[2 : 6 if code.has_norms else 4]]
    norms += [None] * (4 - len(norms))
    heads, rest = divmod(linear[0].out_features, attention.head_dim)
    kv_heads, kv_rest = divmod(linear[1].out_features, attention.head_dim)
    sizes = Sizes(heads, kv_heads, attention.head_dim, attention.scaling)
    if rest or kv_rest or why_not(bound, norms, sizes, x.dtype) is not None:
        return None
    turns = not code.asks_for_rope or bool(attention.use_rope)
    return Decoder(bound, norms, sizes, x.dtype, turns=turns)


def _norm_of(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)
