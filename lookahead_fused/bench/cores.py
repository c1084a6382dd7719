"""How long this process's threads had no core: what spoils a measurement most. Linux tells, other systems do not."""

from __future__ import annotations

from pathlib import Path


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
