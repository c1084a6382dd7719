"""What a checkpoint has in place of what lies in memory, where ranks could not send that to each other.

The names of the entries stay: torch.distributed.checkpoint looks for those that stand in an optimizer's state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _masters as masters
from ._tensors import check_memory, local_tensor
from ._torch import is_dtensor


def in_checkpoint(param: Tensor, entries: dict[str, Any], name: str) -> dict[str, Any]:
    """One parameter's state as a checkpoint has it; the same object where that is as it lies in memory.

    Args:
        name: What messages call the parameter.
    """
    low = entries.get(masters.LOW)
    if is_dtensor(param) and isinstance(low, Tensor) and low.dtype == torch.int16:
        # Neither gloo nor NCCL sends int16.
        check_memory(local_tensor(low), f"state {masters.LOW!r} of {name}")
        return {**entries, masters.LOW: low.to(torch.int32)}
    return entries


def dtype_in_memory(name: str, dtype: torch.dtype) -> torch.dtype:
    """In which dtype a state entry lies in memory that a checkpoint has in this one."""
    return torch.int16 if name == masters.LOW and dtype == torch.int32 else dtype
