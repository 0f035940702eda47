"""One row of a benchmark that takes turns with others: two calls each, of which the second is timed.

The first call after another row is slower: its threads were asleep, its code was not in the cache.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

SLOW_MILLISECONDS = 20.0
SLOW_EVERY = 10
"""A row slower than SLOW_MILLISECONDS takes part in every SLOW_EVERY-th turn only."""

Call = Callable[[int], object]


@dataclass(frozen=True)
class Turn:
    """A row.

    Attributes:
        run: milliseconds of the i-th turn.
        n_bytes: read by one call.
        bits_per_weight: all that is stored; None where nothing is multiplied.
        error: relative, of the output against float64 with the same weights.
        is_slow: takes part in few turns.
    """

    run: Callable[[int], float]
    n_bytes: int
    bits_per_weight: float | None = None
    error: float | None = None
    is_slow: bool = False


def second_of_two(call: Call, i: int) -> float:
    """Call the layers 2 i and 2 i + 1; returns the milliseconds of the second."""
    call(2 * i)
    start = time.perf_counter()
    call(2 * i + 1)
    return 1e3 * (time.perf_counter() - start)
