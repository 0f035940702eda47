"""Whether decoder layers are still what they were when their addresses were given to the C library.

It is asked for every token, of a few hundred modules and tensors. Loops over them would take longer than a small
model's layers do, so that each question goes through all of them at once in the interpreter's own C code.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, repeat
from operator import attrgetter, contains, is_, itemgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmq.decoding_attention import NAME

ATTENTION_LAYERS = "q_proj", "k_proj", "v_proj", "o_proj"
MLP_LAYERS = "gate_proj", "up_proj", "down_proj"

_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks")
_CHILDREN, _PARAMETERS = itemgetter("_modules"), itemgetter("_parameters")
_TRAINING, _INDEX, _CONFIG = itemgetter("training"), itemgetter("layer_idx"), itemgetter("config")
_REQUIRES_GRAD = attrgetter("requires_grad")


def modules_of(layer: nn.Module) -> tuple[nn.Module | None, ...]:
    """Return attention, MLP, the four norms (None for those of heads that it has not), the seven linear layers and
    the activation."""
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


class Watch:
    """The modules and tensors of decoder layers at one time."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        parts = [modules_of(layer) for layer in layers]
        parents = [parent for layer, own in zip(layers, parts, strict=True) for parent in (layer, *own[:2])]
        self._parents = [cast(nn.Module, parent).__dict__ for parent in parents]
        self._owns = [module.__dict__ for own in parts for module in own if module is not None]
        self._attentions = [cast(nn.Module, own[0]).__dict__ for own in parts]
        self._children = [*_all_values(_CHILDREN, self._parents)]
        # Tensors are not held: those of a model whose weights come and go would stay.
        self._places = self._places_now()
        self._configs = [*map(_CONFIG, self._attentions)]
        self._settings = [
            vars(config) for config in {id(config): config for config in self._configs}.values()
        ]
        self.indices = self._indices_now()
        self._ropes = self._ropes_now()

    def is_same(self) -> bool:
        """Whether the modules and tensors are those of before, where they were."""
        return (
            [*_all_values(_CHILDREN, self._parents)] == self._children
            and self._places_now() == self._places
            and all(map(is_, map(_CONFIG, self._attentions), self._configs))
            and self._indices_now() == self.indices
            and self._ropes_now() == self._ropes
        )

    def is_plain(self) -> bool:
        """Whether nobody listens to them, has replaced a forward or wants anything but results."""
        return (
            not any(chain.from_iterable(map(_HOOKS, self._owns)))
            and not any(map(contains, self._owns, repeat("forward")))
            and not any(map(_TRAINING, self._attentions))
            and all(settings.get("_attn_implementation_internal") == NAME for settings in self._settings)
            and not (torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, self._tensors())))
        )

    def _tensors(self) -> list[Tensor]:
        return [tensor for tensor in _all_values(_PARAMETERS, self._owns) if tensor is not None]

    def _places_now(self) -> list[int]:
        tensors = self._tensors()
        return [*map(Tensor.data_ptr, tensors), *[tensor.nbytes for tensor in tensors]]

    def _indices_now(self) -> list[int]:
        return [*map(_INDEX, self._attentions)]

    def _ropes_now(self) -> list[object]:
        return [attention.get("use_rope") for attention in self._attentions]


def are_heard(layers: Sequence[nn.Module]) -> bool:
    """Whether somebody listens to what goes into layers or comes out of them, or calls them in a way of his own."""
    return any(chain.from_iterable(map(_HOOKS, map(vars, layers)))) or any(
        type(layer).__call__ is not GradientCheckpointingLayer.__call__ for layer in layers
    )


def _all_values(get: Callable[[Any], Any], owns: list[dict[str, Any]]) -> Iterable[Any]:
    return chain.from_iterable(map(dict.values, map(get, owns)))
