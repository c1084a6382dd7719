"""Work in a process of its own, which finds its modules where this one does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

Result = TypeVar("Result")


def apart(task: Callable[..., Result], *arguments: object) -> Result:
    """What a module's function returns, or raises, in a process of its own.

    Where a process has its memory, and how much earlier benchmarks have used of it, makes a tenth of many ratios and a
    quarter of some (torch's bf16 moments), and stays as it is for as long as the process lives. One process for all
    gives each benchmark figures that it does not have alone.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(task, *arguments).result()


def search_path() -> dict[str, str]:
    """The variables under which a further Python looks for modules where this one does, and in no folder before.

    `-m` would put the current folder first: in the source tree the package there, and not the installed one that this
    process runs.
    """
    return {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "PYTHONSAFEPATH": "1"}
