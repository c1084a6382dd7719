"""Whatever users do between two steps, in whatever order: every backend holds the same bits, and the oracle agrees.

A failure names its sequence and shows it shrunk. `--operations 1 --operations-seed SEED` runs that sequence again,
`--operations-minutes M` looks for hours.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import triton_on_host
from operations.sequences import draw_script, run, shrink
from operations.worlds import RULES

# Triton's interpreter takes part in one sequence of each rule among this many, and in a short one.
INTERPRETED_ONE_IN = 5
SHORT = 10

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs each sequence in a fork of this process")


def seeds_of(rule: str, config: pytest.Config) -> Iterator[int]:
    """The sequences of this rule among those that are asked for; the rule goes round with the seed."""
    first, minutes = config.getoption("operations_seed"), config.getoption("operations_minutes")
    end = time.monotonic() + 60 * minutes if minutes else None
    count = itertools.count(first) if minutes else range(first, first + config.getoption("operations"))
    for seed in count:
        if end is not None and time.monotonic() > end:
            return
        if RULES[seed % len(RULES)] == rule:
            yield seed


@needs_fork
@pytest.mark.parametrize("rule", RULES)
def test_any_operations(rule: str, host_backends: list[str], pytestconfig: pytest.Config, tmp_path: Path) -> None:
    without = tuple(filter(None, pytestconfig.getoption("operations_without").split(",")))
    for seed in seeds_of(rule, pytestconfig):
        (tmp_path / "sequence").write_text(str(seed))  # for a run that is ended from outside
        interpreted = seed // len(RULES) % INTERPRETED_ONE_IN == 0
        backends = [name for name in host_backends if interpreted or name != triton_on_host.NAME]
        script = draw_script(seed, **({"longest": SHORT} if interpreted else {}), without=without)
        outcome = run(script, backends)
        if outcome.failure:
            script, outcome = shrink(script, backends, outcome)
            pytest.fail(f"sequence {seed} of {', '.join(backends)}: {script}\n{outcome}", pytrace=False)
