"""What a model consists of: blocks, parts, towers, and what is kept; no family has code of its own."""

from vlmq.families.layout import BlockSpec, ExpertInfo, Layout, LinearInfo, describe
from vlmq.families.parts import PARTS

__all__ = ["PARTS", "BlockSpec", "ExpertInfo", "Layout", "LinearInfo", "describe"]
