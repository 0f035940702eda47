"""Kinds of tokens, and one calibration batch: what goes into the model beside what each token is.

A kind is an int8 per token: padding never enters a statistic, image tokens stand for visual features, answer
tokens are those of an assistant turn, and text is everything else.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

PADDING = 0
TEXT = 1
IMAGE = 2
ANSWER = 3


@dataclass
class CalibBatch:
    """One batch of calibration data.

    Attributes:
        inputs: keyword arguments of the model's forward.
        kinds: (rows, n_tokens) int8 (PADDING, TEXT, IMAGE, ANSWER), aligned with the language model's tokens.
    """

    inputs: dict[str, Any]
    kinds: Tensor
