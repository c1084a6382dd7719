"""Whether other work holds the cores, before the demo and during it. Without torch: it is asked before torch loads."""

from __future__ import annotations

import time
from pathlib import Path

# Beyond this share, other work decides how long a step takes.
BUSY = 0.1


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


def core_seconds(tasks: Path = Path("/proc/self/task")) -> tuple[float, float] | None:
    """Seconds that this process's threads ran, and waited for a core while ready to; None except on Linux."""
    told = []
    for thread in tasks.iterdir() if tasks.exists() else ():
        try:
            told.append((thread / "schedstat").read_text().split())
        except OSError:  # it ended since it was listed
            continue
    if not told:
        return None
    return sum(int(ran) for ran, _, _ in told) / 1e9, sum(int(waited) for _, waited, _ in told) / 1e9


def waited_share(before: tuple[float, float] | None, after: tuple[float, float] | None) -> float | None:
    """Of the time between two ``core_seconds()`` in which threads ran or could have, how much they waited."""
    if before is None or after is None:
        return None
    ran, waited = after[0] - before[0], after[1] - before[1]
    return waited / (ran + waited)


def _core_times() -> tuple[int, int] | None:
    """Idle and total time of all cores since the start of the system, in ticks."""
    try:
        # user nice system idle iowait irq softirq steal; what follows is counted in user and nice already.
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    return ticks[3] + ticks[4], sum(ticks)
