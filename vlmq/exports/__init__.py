"""Packed models in the formats of other engines."""

from vlmq.exports.export import TARGETS, Export, export_model

__all__ = ["TARGETS", "Export", "export_model"]
