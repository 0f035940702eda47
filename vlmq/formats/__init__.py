"""Weight formats: what a code means, and a quantized matrix in its stored form."""

from vlmq.formats.format import FORMATS, GROUP_SIZES, Format, get_format
from vlmq.formats.weight import QuantizedWeight, expand_groups, n_groups, row_slices

__all__ = [
    "FORMATS",
    "GROUP_SIZES",
    "Format",
    "QuantizedWeight",
    "expand_groups",
    "get_format",
    "n_groups",
    "row_slices",
]
