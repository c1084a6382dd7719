"""Fused Lookahead optimizers for PyTorch."""

import sys

try:
    from . import build
    from .backends import BackendStatus, backends
    from .optimizers import LookaheadAdam, LookaheadAdamW, LookaheadSGD
    from .wrapper import Lookahead

    __version__ = build.version()
except ImportError:
    # The report `python -m lookahead_fused` comes by here first, and is there to tell what is broken.
    if sys.orig_argv[1:3] != ["-m", "lookahead_fused"]:
        raise

__all__ = ["BackendStatus", "Lookahead", "LookaheadAdam", "LookaheadAdamW", "LookaheadSGD", "__version__", "backends"]
