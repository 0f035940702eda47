"""What calibration runs on: a sequence of batches that knows its size, its origin and a hash of its tensors."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any, overload

from torch import Tensor, uint8

from vlmq.calib.tokens import ANSWER, IMAGE, PADDING, CalibBatch


@dataclass(frozen=True, repr=False)
class CalibrationSet(Sequence[CalibBatch]):
    """A sequence of calibration batches.

    Attributes:
        batches: the batches.
        source: what they were made from, for people.
        n_dropped: rows left out because their images did not fit into max_tokens.
    """

    batches: tuple[CalibBatch, ...]
    source: str = "batches"
    n_dropped: int = 0

    def __repr__(self) -> str:
        """What it is, not its tensors."""
        return f"CalibrationSet({self.description}; {len(self.batches)} batches)"

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, index: int) -> CalibBatch: ...
    @overload
    def __getitem__(self, index: slice) -> "CalibrationSet": ...
    def __getitem__(self, index: int | slice) -> "CalibBatch | CalibrationSet":
        if isinstance(index, slice):
            return CalibrationSet(self.batches[index], self.source, self.n_dropped)
        return self.batches[index]

    def _n(self, *kinds: int) -> int:
        return sum(int((batch.kinds == kind).sum()) for batch in self.batches for kind in kinds)

    @property
    def n_rows(self) -> int:
        """How many rows the batches hold."""
        return sum(len(batch.kinds) for batch in self.batches)

    @property
    def n_tokens(self) -> int:
        """How many tokens are no padding."""
        return sum(int((batch.kinds != PADDING).sum()) for batch in self.batches)

    @property
    def n_image_tokens(self) -> int:
        """How many tokens stand for visual features."""
        return self._n(IMAGE)

    @property
    def n_answer_tokens(self) -> int:
        """How many tokens the assistant says."""
        return self._n(ANSWER)

    @cached_property
    def hash(self) -> str:
        """Sha256 over all inputs and kinds, in order; the same on every machine for the same tensors."""
        digest = hashlib.sha256()
        for batch in self.batches:
            for name, value in sorted(batch.inputs.items()):
                digest.update(name.encode())
                _digest(value, digest.update)
            _digest(batch.kinds, digest.update)
        return digest.hexdigest()

    @property
    def description(self) -> str:
        """One line for logs and model cards; of a path only its last part."""
        text = (
            f"{PurePath(self.source).name}: {self.n_rows} rows, {self.n_tokens} tokens "
            f"({self.n_image_tokens} of images, {self.n_answer_tokens} of answers)"
        )
        return text + (
            f", {self.n_dropped} rows dropped (images beyond max_tokens)" if self.n_dropped else ""
        )


def _digest(value: Any, update: Any) -> None:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        update(tensor.reshape(-1).view(uint8).numpy().tobytes() if tensor.numel() else b"")
    else:
        update(repr(value).encode())
