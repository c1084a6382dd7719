"""How the reference backend rounds moments to bf16 and to codes: see `csrc/state/bfloat16.h` and `csrc/state/int8.h`,
which have the reasons.

Of torch's operators few know unsigned words of 32 bits: they are the lower halves of int64 numbers here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _codes as codes
from .._torch import is_plain

_WORD, _WEYL = 0xFFFFFFFF, 0x9E3779B9


def rounded(values: Tensor, like: Tensor, moment: int, updates: int, own_pass: bool) -> Tensor:
    """fp32 numbers as bf16, each one of its two neighbours, and on the mean the number itself.

    Args:
        values: The numbers.
        like: The row's parameter, in whose memory's order they are counted.
        moment: The place of the moment among its rule's.
        updates: How many the parameter had.
        own_pass: A sync that is a pass of its own.
    """
    bits = values.contiguous().view(torch.int32).to(torch.int64) & _WORD
    random = _drawn(_places(like), moment, updates, own_pass)
    magnitude = bits & 0x7FFFFFFF
    half = torch.where(magnitude < 0x7F7F0000, bits + random, bits) >> 16
    half = torch.where(magnitude > 0x7F800000, 0x7FFF, half)
    # As int16, whose upper half of numbers is negative.
    return torch.where(half >= 1 << 15, half - (1 << 16), half).to(torch.int16).view(torch.bfloat16)


def encoded(
    values: Tensor, kind: codes.Kind, like: Tensor, moment: int, updates: int, own_pass: bool
) -> tuple[Tensor, Tensor]:
    """fp32 numbers as codes of a kind, and the scales of their blocks; the arguments are those of `rounded`."""
    places = torch.arange(like.numel(), dtype=torch.int64, device=like.device)
    return codes.encoded(values, like, kind, _drawn(places, moment, updates, own_pass))


def _drawn(places: Tensor, moment: int, updates: int, own_pass: bool) -> Tensor:
    """16 random bits for the element at each of these places."""
    key = _mixed((2 * updates + own_pass + _WEYL) & _WORD)
    random: Tensor = _mixed((places + key) & _WORD)
    return random & 0xFFFF if moment == 0 else (random if moment == 1 else random * _WEYL & _WORD) >> 16


def _places(like: Tensor) -> Tensor:
    """Of each element its place in memory; of a class around other tensors, which may lie anywhere, in the shape."""
    places = torch.arange(like.numel(), dtype=torch.int64, device=like.device)
    return places.as_strided(like.shape, like.stride()) if is_plain(like) else places.view(like.shape)


def _mixed(x: Any) -> Any:
    """Of a number, or of each in a tensor of int64."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & _WORD
    return x ^ (x >> 16)
