"""Seconds that were measured before, replayed through pytest-benchmark's fixture by a clock of its own.

Its timer and `pedantic` are public, the way it makes statistics of samples is not; so the samples go in as time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_now = 0.0


def now() -> float:
    """The clock: `@pytest.mark.benchmark(timer=now)`."""
    return _now


class Replay:
    """Samples, as a function that takes as long as the next of them each time it is called."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self.seconds = list(seconds)

    def into(self, benchmark: Any) -> None:
        """Let a fixture time all of them."""
        left = iter(self.seconds)

        def pass_time() -> None:
            global _now
            # From zero each time: sums of many seconds would cost a microsecond its last digits.
            _now += next(left)

        def reset() -> None:
            global _now
            _now = 0.0

        benchmark.pedantic(pass_time, setup=reset, rounds=len(self.seconds), iterations=1)
