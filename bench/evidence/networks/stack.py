"""What a stacked network is, and its layers: R replicas in one tensor, none of which sees another.

The parameters of one replica are a dictionary of tensors; those of R are the same with a leading dimension R. Losses
come as [R]: their sum has in each replica's part of the gradient what that replica alone would have. Matrices are
[inputs, outputs] and vectors [1, outputs], so that only matrices have two dimensions in one replica, and what is
stacked has none with two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Parameters: TypeAlias = Mapping[str, Tensor]
Batch: TypeAlias = tuple[Tensor, ...]


class Network(Protocol):
    """A kind of network at one size.

    Attributes:
        hidden: names of the matrices between hidden layers, which Muon takes; not embeddings and outputs.
    """

    @property
    def hidden(self) -> frozenset[str]: ...

    def start(self, generator: Generator) -> dict[str, Tensor]:
        """Parameters of one replica, without the leading R; all that is random comes from the generator."""
        ...

    def losses(self, parameters: Parameters, batch: Batch) -> Tensor:
        """Mean loss of each replica over its part of the batch, [R]. Batch: tensors [R, B, ...]."""
        ...

    def scores(self, parameters: Parameters, batch: Batch) -> dict[str, Tensor]:
        """Each replica's "loss", [R], and what else is judged on held-out data."""
        ...


def starts(network: Network, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Parameters of R replicas, [R, ...], each as its seed alone would have them."""
    alone = [network.start(torch.Generator().manual_seed(seed)) for seed in seeds]
    return {name: torch.stack([one[name] for one in alone]) for name in alone[0]}


def drawn(generator: Generator, *shape: int, fan_in: int, gain: float = 1.0) -> Tensor:
    """A normal start of variance gain^2 / fan_in."""
    return torch.randn(shape, generator=generator) * (gain / math.sqrt(fan_in))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[R, B, ..., in] to [R, B, ..., out], by weight [R, in, out] and bias [R, 1, out]."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    y = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias, rows, weight)
    return y.view(*x.shape[:-1], weight.shape[-1])


def norm(x: Tensor, gain: Tensor) -> Tensor:
    """Layer norm without bias: x [R, B, T, width], gain [R, 1, width]."""
    return F.layer_norm(x, x.shape[-1:]) * gain.unsqueeze(1)


def beside(x: Tensor) -> Tensor:
    """Images [R, B, C, H, W] as one image with the channels of all replicas side by side, [B, R * C, H, W]."""
    return x.transpose(0, 1).flatten(1, 2)


def apart(x: Tensor, replicas: int) -> Tensor:
    """The inverse of `beside`."""
    return x.view(len(x), replicas, -1, *x.shape[2:]).transpose(0, 1)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """3x3 convolutions, padded by 1: x as `beside` has it, weight [R, out, in, 3, 3], bias [R, 1, out]."""
    return F.conv2d(x, weight.flatten(0, 1), bias.flatten(), stride, 1, groups=len(weight))


def deconvolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """4x4 transposed convolutions, which double height and width: weight [R, in, out, 4, 4], bias [R, 1, out]."""
    return F.conv_transpose2d(x, weight.flatten(0, 1), bias.flatten(), 2, 1, groups=len(weight))


def cross_entropies(logits: Tensor, classes: Tensor) -> Tensor:
    """Mean of each replica, [R], of logits [R, ..., classes] for int64 classes [R, ...]."""
    each = F.cross_entropy(logits.flatten(0, -2), classes.flatten(), reduction="none")
    return each.view(len(logits), -1).mean(1)
