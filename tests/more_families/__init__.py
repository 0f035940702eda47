"""Further tiny random families, for tests of structure: other layouts, mixtures of experts, hybrid layers.

The same mechanism as `tiny_models`, whose `TEXT` and `VISION` are the sizes here too; they go through quantize, save
and reload, but not through every other test of a family.
"""

from typing import Any

import pytest
import torch
import transformers as hf
from installed import older
from tiny_models import IMAGE_TOKEN, from_config
from torch import nn
from transformers import PreTrainedModel

from more_families.bridges import BRIDGES
from more_families.dual import DUALS
from more_families.experts import EXPERTS
from more_families.family import Family
from more_families.hybrids import HYBRIDS
from more_families.towers import TOWERS

MORE: dict[str, Family] = {**EXPERTS, **HYBRIDS, **TOWERS, **BRIDGES, **DUALS}


def build(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of the family in eval mode with fixed random weights; padding rows are zero, as some loads make them."""
    given = MORE[family]
    try:
        config = given.config()
    except (AttributeError, KeyError) as error:
        if not older("transformers", "5.23"):
            raise
        pytest.skip(f"not in this version: {error}")
    model = from_config(getattr(hf, given.auto), config, dtype)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight.data[module.padding_idx] = 0
    return model


def inputs(family: str, rows: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A batch for the model's forward: `rows` samples of 12 tokens, or more with the image's."""
    given, generator = MORE[family], torch.Generator().manual_seed(4321)
    ids = torch.randint(3, 190, (rows, 12 + max(0, given.image_tokens - 4)), generator=generator)
    ids[:, 2 : 2 + given.image_tokens] = IMAGE_TOKEN
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if given.has_ids else {}
    batch |= given.extra(rows, ids)
    return {key: v.to(dtype) if v.is_floating_point() else v for key, v in batch.items()}
