"""Packed models in the formats of other engines."""

from vlmq.exports.export import Export, check_convert, check_export, export_model
from vlmq.exports.targets import TARGETS

__all__ = ["TARGETS", "Export", "check_convert", "check_export", "export_model"]
