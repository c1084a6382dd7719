"""What tests ask of the release of torch that they run under."""

from __future__ import annotations

import pytest
import torch
from torch.torch_version import TorchVersion

TORCH = TorchVersion(torch.__version__)


def is_torch(release: str) -> bool:
    """Whether this torch is that release or a newer one.

    Args:
        release: As "2.9". Of those that `make test-versions` runs, the first under which a test passes: which of the
            releases in between brought the change was not asked.
    """
    return bool(release <= TORCH)


def needs_torch(release: str, what: str) -> pytest.MarkDecorator:
    """Skips a test under an older torch than `release`, which has `what` the test asks for."""
    return pytest.mark.skipif(not is_torch(release), reason=f"torch {release} has {what}, and this is {TORCH}")
