"""Fused Lookahead optimizers for PyTorch."""

import re
import sys
from typing import TYPE_CHECKING


def _report_is_asked_for() -> bool:
    """Whether this import is the first half of ``python -m lookahead_fused``."""
    # While -m looks for its module, sys.argv holds "-m" for the module's place. What stands there in the command line
    # is its name, alone or after letters of options: -m lookahead_fused, -mlookahead_fused, -Im lookahead_fused.
    if sys.argv[:1] != ["-m"]:
        return False
    named = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)]
    return re.fullmatch(r"(-[A-Za-z]*m)?lookahead_fused(\.__main__)?", named) is not None


# The report tells what needs no torch before it imports this again: a broken torch may raise, or end the process.
if not _report_is_asked_for():
    from . import _build as build
    from ._averaging import GPA, ScheduleFree
    from ._convert import convert
    from ._ema import EMA
    from ._lookahead import Lookahead
    from ._optimizers import (
        Lion,
        LookaheadAdam,
        LookaheadAdamW,
        LookaheadLion,
        LookaheadRAdam,
        LookaheadRMSprop,
        LookaheadSGD,
    )
    from .backends import BackendStatus

    if TYPE_CHECKING:
        from .backends import backends
    else:  # the package, which can be called as its function: the function would hide it from `import ... as`
        from . import backends

    __version__ = build.version()
    # Where a user imports them from. Pickles and help() then name no private module.
    for _public in (
        BackendStatus,
        EMA,
        GPA,
        Lion,
        Lookahead,
        LookaheadAdam,
        LookaheadAdamW,
        LookaheadLion,
        LookaheadRAdam,
        LookaheadRMSprop,
        LookaheadSGD,
        ScheduleFree,
        convert,
    ):
        _public.__module__ = __name__

__all__ = [
    "EMA",
    "GPA",
    "BackendStatus",
    "Lion",
    "Lookahead",
    "LookaheadAdam",
    "LookaheadAdamW",
    "LookaheadLion",
    "LookaheadRAdam",
    "LookaheadRMSprop",
    "LookaheadSGD",
    "ScheduleFree",
    "__version__",
    "backends",
    "convert",
]
