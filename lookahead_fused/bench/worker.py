"""One side of a comparison of two installs: a process that steps an optimizer when it is told to.

Its harness is the comparing process's own, under another name; `lookahead_fused` is the install that is measured.
Requests come on stdin and answers go to stdout, one JSON object a line.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import lookahead_fused

from . import opponents, parameters


def main() -> None:
    """Answers requests until stdin ends."""
    # What anything in here prints must not look like an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    step: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "make":
            step, told = _make(request)
        else:
            told = _turn(step, request["steps"])
        answers.write(json.dumps(told) + "\n")
        answers.flush()


def _make(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """An optimizer with its state made, and what it is."""
    torch.set_num_threads(request["threads"])
    setting = opponents.Setting(request["optimizer"], request["dtype"], request["k"])
    case = parameters.CASES[request["case"]]
    params = parameters.make(case, dtype=setting.param_dtype)
    step = opponents.make_ours(request["backend"], setting, parameters.groups(params, "one")).step
    # State, tables and threads; and a whole period, so that both sides sync in the same turns.
    for _ in range(setting.k):
        step()
    # A collection falls into one side's step and not into the other's.
    gc.collect()
    gc.disable()
    return step, {
        "version": lookahead_fused.__version__,
        "folder": str(Path(lookahead_fused.__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _turn(step: Any, steps: int) -> dict[str, float]:
    """The seconds of a turn's steps: by the wall clock, and of all cores."""
    wall, cores = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    return {"cores": time.process_time() - cores, "wall": time.perf_counter() - wall}
