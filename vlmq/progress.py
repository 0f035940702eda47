"""Progress: what `quantize` tells its caller while it works.

`quantize(..., progress=p)` calls `p.start` once after planning, `p.layer` after each quantized layer, `p.epoch` after
each pass of the learning of a block, and `p.finish` at the end, also when it stops with an error. A progress object
only listens: it returns nothing and changes nothing. The library itself never prints; the command line brings an
object that draws a bar.
"""

from typing import Protocol

from vlmq.report import EpochReport, LayerReport


class Progress(Protocol):
    """The calls that `quantize` makes, in this order."""

    def start(self, n_blocks: int, n_layers: int) -> None:
        """Work begins: so many blocks, with so many layers to quantize in all."""
        ...

    def layer(self, report: LayerReport, block_name: str) -> None:
        """One layer of the block of that name is done."""
        ...

    def epoch(self, report: EpochReport) -> None:
        """One pass of the learning of a block is done; only a solver that learns makes this call."""
        ...

    def finish(self) -> None:
        """Work has ended, with or without an error."""
        ...


class SilentProgress:
    """The default: says nothing."""

    def start(self, n_blocks: int, n_layers: int) -> None:
        """Ignore it."""

    def layer(self, report: LayerReport, block_name: str) -> None:
        """Ignore it."""

    def epoch(self, report: EpochReport) -> None:
        """Ignore it."""

    def finish(self) -> None:
        """Ignore it."""
