"""What is kept of a master: a parameter in fp32, in which its updates accumulate.

Of an fp16 parameter the whole, as `master_param`. Of a bf16 one `master_low`, the low half of the fp32 number's bits
in int16: the parameter is the number rounded to the nearest, ties away from zero.
`csrc/table/master.h` states the bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._tensors import local_tensor
from ._torch import is_plain

# State names; a state has one of them.
WHOLE, LOW = "master_param", "master_low"
NAMES = (WHOLE, LOW)


def name_of(dtype: torch.dtype) -> str:
    """Under which name parameters of a dtype in 16 bits keep their masters."""
    return LOW if dtype == torch.bfloat16 else WHOLE


def name_for(param: Tensor) -> str:
    """The same of a parameter: of a class around other tensors the master is whole, since operators on such a class
    compute with its numbers and know nothing of their bits."""
    return name_of(param.dtype) if is_plain(param) else WHOLE


def join(param: Tensor, low: Tensor) -> Tensor:
    """The master of a bf16 parameter, from it and its low half.

    Beside a parameter that was changed by others, the master is within the rounding of what it was changed to. Only
    beside a zero or an infinity a low half may lead to where no number is, and there counts as 0.
    """
    alone = param.view(torch.int16).to(torch.int64) << 16
    both = (alone + low).to(torch.int32).view(torch.float32)
    return torch.where(both.isnan(), alone.to(torch.int32).view(torch.float32), both)


def halve(master: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 parameter of a master in fp32, and its low half."""
    bits = master.view(torch.int32).masked_fill(master.isnan(), 0x7FFF0000)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def read(param: Tensor, kept: Tensor | None) -> Tensor:
    """The weights of a parameter by what is kept of its master, or None; then it is the parameter."""
    if kept is None:
        return param
    return join(param, kept) if kept.dtype == torch.int16 else kept


def write(weights: Tensor, param: Tensor, kept: Tensor | None) -> None:
    """Puts weights into a parameter and what is kept of its master."""
    if kept is not None and kept.dtype == torch.int16:
        weights, low = halve(weights)
        kept.copy_(low)
    elif kept is not None:
        kept.copy_(weights)
    param.copy_(weights)


def kept(param: Tensor, own: Mapping[str, Any]) -> Tensor | None:
    """What a parameter's state keeps of a master. A checkpoint may have brought a whole one where the next step makes a
    low half of it; a low half alone tells nothing of a parameter that is not in bf16."""
    for name in NAMES:
        value = own.get(name)
        if isinstance(value, Tensor) and name in (WHOLE, name_for(param)):
            return local_tensor(value)
    return None
