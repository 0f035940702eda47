"""Faster generation on a CPU: what lies between the products of packed layers, in C.

With packed layers most of a token's time is spent elsewhere. A packed model whose attention is "sdpa" therefore gets
the attention "vlmq" (`vlmq.decoding_attention`), a cache that grows without being copied (`vlmq.growing_cache`), and,
where the code of its decoder layers is known, one call for the whole of a layer (`vlmq.decoder_step`). An output head
that stays dense is read in C too (`vlmq.dense_step`). A family whose
code asks for "sdpa" by name keeps its attention, and `model.set_attn_implementation("sdpa")` gives all of it back but
the cache.
"""

import inspect
import re
import sys
from functools import cache

from torch import nn
from transformers import PreTrainedModel

from vlmq.decoder_run import install_runs
from vlmq.decoder_step import install_steps
from vlmq.decoding_attention import NAME
from vlmq.dense_step import install_dense_step
from vlmq.growing_cache import grow_cache
from vlmq.kernels.cpu import missing_library


def prepare_decoding(model: nn.Module) -> None:
    """Let a packed model generate faster on a CPU, where there are C kernels; its results differ by rounding only."""
    if missing_library() is not None or not isinstance(model, PreTrainedModel):
        return
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and _may_change(module):
            module.config._attn_implementation_internal = NAME
    if grow_cache not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(grow_cache, with_kwargs=True)
    install_steps(model)
    install_runs(model)
    install_dense_step(model)


def _may_change(model: PreTrainedModel) -> bool:
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return False
    return not _asks_for_sdpa(type(model).__module__)


@cache
def _asks_for_sdpa(module: str) -> bool:
    """Whether the code of a family compares the name of its attention with "sdpa"; a default asks nothing."""
    try:
        code = inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):
        return True
    return re.search(r"""["']sdpa["']""", code.replace('attn_implementation: str = "sdpa"', "")) is not None
