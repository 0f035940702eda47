"""Packed models in the formats of other engines."""

from vlmq.exports.export import TARGETS, Export, check_export, export_model

__all__ = ["TARGETS", "Export", "check_export", "export_model"]
