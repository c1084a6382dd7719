"""timm imports torchvision, and PyPI's is built for CUDA: see the Makefile."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

# Where `make test-clients` keeps a torchvision that cannot be imported beside this torch as it is.
FOLDER = Path(sys.prefix, "torchvision-apart")


@contextlib.contextmanager
def torchvision_apart() -> Iterator[None]:
    """In here that one can be imported, where there is one.

    Its operators are not loaded, and its import fails at those that it tells torch more of. They are declared here, and
    stay without a kernel: timm's models and optimizers call none.
    """
    if not FOLDER.is_dir():
        yield
        return
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with mock.patch.object(sys, "path", [*sys.path, str(FOLDER)]):
        yield
