"""Fused Lookahead optimizers for PyTorch."""

from . import build
from .backends import BackendStatus, backends
from .optimizers import LookaheadAdam, LookaheadAdamW, LookaheadSGD
from .wrapper import Lookahead

__version__ = build.version()

__all__ = ["BackendStatus", "Lookahead", "LookaheadAdam", "LookaheadAdamW", "LookaheadSGD", "__version__", "backends"]
