"""Calibration: data, walking of blocks, statistics of layer inputs, and token saliency."""

from vlmq.calib.batches import as_batches
from vlmq.calib.calibration_set import CalibrationSet
from vlmq.calib.data import load
from vlmq.calib.sources import NAMED_SETS
from vlmq.calib.tokens import ANSWER, IMAGE, PADDING, TEXT, CalibBatch

__all__ = [
    "ANSWER",
    "IMAGE",
    "NAMED_SETS",
    "PADDING",
    "TEXT",
    "CalibBatch",
    "CalibrationSet",
    "as_batches",
    "load",
]
