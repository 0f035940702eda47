"""The saliency of one row's image tokens, as a map over the image.

The saliency is `loss_grad`: the mean square of the gradient of the answer's loss at the outputs of the
layers,

    s_t = mean_layers [ g_lt / mean_t g_lt ],   g_lt = mean_c (dLoss / dZ_ltc)^2

over the linear layers of the language model, so a token weighs much where an error in it costs the answer
most.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from vlmq.calib.data import load
from vlmq.calib.saliency import prepare
from vlmq.calib.tokens import IMAGE
from vlmq.families import describe


def token_map(model: PreTrainedModel, processor: Any, row: Mapping[str, Any]) -> np.ndarray:
    """Saliency of the image tokens of a question with its answer.

    Args:
        model: the full-precision image-text-to-text model; it is left as it was.
        processor: its own.
        row: "image", "question" and "answer"; its image takes a square number of tokens, row by row.

    Returns:
        (n_rows, n_columns) float32, relative to the mean of the image's tokens.

    Raises:
        ValueError: the number of image tokens is no square.
    """
    batches = list(load([dict(row)], processor, n_samples=1))
    is_image = batches[0].kinds[0] == IMAGE
    side = math.isqrt(int(is_image.sum()))
    if side == 0 or side**2 != int(is_image.sum()):
        raise ValueError(f"expected a square number of image tokens, got {int(is_image.sum())}")
    layout = describe(model)
    weights = prepare("loss_grad", model, layout, batches).loss_weights or {}
    scores = [
        weights[n][0][is_image]
        for n, info in layout.linears.items()
        if info.part == "language" and n in weights
    ]
    # The last layers see no gradient at the image tokens: nothing reads them any more.
    relative = [score / score.mean() for score in scores if float(score.mean()) > 0]
    return torch.stack(relative).mean(0).reshape(side, side).float().numpy()
