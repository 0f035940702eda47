"""The packed layout of weights, and the linear operator that reads it."""

from vlmq.kernels.packing import BITS, pack, row_bytes, unpack

__all__ = ["BITS", "pack", "row_bytes", "unpack"]
