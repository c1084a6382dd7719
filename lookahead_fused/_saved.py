"""What a checkpoint has in place of what lies in memory, where others could not read that, or not send it.

The names of the entries stay: torch.distributed.checkpoint looks for those that stand in an optimizer's state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import _masters as masters
from ._rules import Rule
from ._state_dtype import without_codes
from ._tensors import check_memory, local_tensor
from ._torch import is_dtensor


def in_checkpoint(param: Tensor, entries: dict[str, Any], name: str, rule: Rule | None) -> dict[str, Any]:
    """One parameter's state as a checkpoint has it. Of moments in codes that is what these stand for, exactly: another
    optimizer can read that, and what is cut or joined (by FSDP, say) has no blocks.

    Args:
        name: What messages call the parameter.
        rule: Whose state it is, if known.
    """
    if rule is not None:
        entries = without_codes(param, entries, rule)
    low = entries.get(masters.LOW)
    if is_dtensor(param) and isinstance(low, Tensor) and low.dtype == torch.int16:
        # Neither gloo nor NCCL sends int16.
        check_memory(local_tensor(low), f"state {masters.LOW!r} of {name}")
        return {**entries, masters.LOW: low.to(torch.int32)}
    return entries


def check_range(entries: Mapping[str, Any], name: str) -> None:
    """Raises ValueError for numbers of a checkpoint that the dtype in which they lie in memory does not have."""
    low = entries.get(masters.LOW)
    if not isinstance(low, Tensor) or dtype_in_memory(masters.LOW, low.dtype) == low.dtype:
        return
    local, told, has = local_tensor(low), f"state {masters.LOW!r} of {name}", torch.iinfo(torch.int16)
    check_memory(local, told)
    if local.numel() == 0:
        return
    least, most = (int(bound) for bound in local.aminmax())
    if least < has.min or most > has.max:
        raise ValueError(
            f"{told} must be the lower 16 bits of a number, from {has.min} to {has.max}, got numbers from {least} to "
            f"{most}"
        )


def dtype_in_memory(name: str, dtype: torch.dtype) -> torch.dtype:
    """In which dtype a state entry lies in memory that a checkpoint has in this one."""
    return torch.int16 if name == masters.LOW and dtype == torch.int32 else dtype
