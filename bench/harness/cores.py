"""Whether other work holds the cores: the condition that spoils a measurement most. Linux tells, other systems do not.

Without torch: how its threads are to wait is asked before it loads.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

# Beyond this share, other work decides how long a step takes.
BUSY = 0.1


class Others:
    """How busy everybody else keeps the machine.

    ``share()`` is the part of all cores that other processes had since this object was made; nan except on Linux.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter(), self._seconds()

    def share(self) -> float:
        elapsed = time.perf_counter() - self.start[0]
        # Counted in clock ticks, so that nobody else at all may come out as a little less than nothing.
        return max((self._seconds() - self.start[1]) / (elapsed * (os.cpu_count() or 1)), 0.0)

    @staticmethod
    def _seconds() -> float:
        times = _core_times()
        if times is None:
            return float("nan")
        idle, total = times
        return (total - idle) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def waiting_policy() -> dict[str, str]:
    """What to add to the environment before torch loads: nothing on a quiet machine, as a user would train there.

    OpenMP's threads, torch's among them, spin for milliseconds where they wait for each other. Where other work holds
    the cores the one that is waited for is often not running, and the spinning keeps it from it: a step of the demo
    then took ten times as long as with threads that sleep. But these wake slower, so a quiet machine is left alone.
    """
    busy = busy_share()
    return {"OMP_WAIT_POLICY": "passive"} if busy is not None and busy > BUSY else {}


def busy_share(seconds: float = 0.5) -> float | None:
    """The share of all cores' time that is in use now, this process asleep; None except on Linux."""
    before = _core_times()
    time.sleep(seconds)
    after = _core_times()
    if before is None or after is None:
        return None
    idle, total = after[0] - before[0], after[1] - before[1]
    return 1 - idle / total


def _core_times() -> tuple[int, int] | None:
    """Idle and total time of all cores since the start of the system, in ticks."""
    try:
        # user nice system idle iowait irq softirq steal; what follows is counted in user and nice already.
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    return ticks[3] + ticks[4], sum(ticks)
