"""A convolutional autoencoder and a variational one over small colour patches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bench.evidence.networks.stack import Batch, Parameters, apart, beside, convolve, deconvolve, drawn, linear

COLOURS = 3


@dataclass(frozen=True)
class Autoencoder:
    """Two convolutions of stride 2, a code, and their mirror. Batch: patches [R, B, 3, size, size] from 0 to 1.

    The score "error" is the mean squared error of a colour value.

    Attributes:
        size: height and width of a patch, a multiple of 4.
        channels: of the first convolution; the second has twice as many.
        code: numbers that a patch is pressed into.
    """

    size: int
    channels: int
    code: int
    hidden: frozenset[str] = frozenset()

    # Numbers that the encoder gives for each of the code.
    PER_CODE = 1

    def start(self, generator: Generator) -> dict[str, Tensor]:
        few, many = self.channels, 2 * self.channels
        flat, relu = many * (self.size // 4) ** 2, math.sqrt(2)
        codes = self.PER_CODE * self.code
        return {
            "conv0": drawn(generator, few, COLOURS, 3, 3, fan_in=9 * COLOURS, gain=relu),
            "conv0_bias": torch.zeros(1, few),
            "conv1": drawn(generator, many, few, 3, 3, fan_in=9 * few, gain=relu),
            "conv1_bias": torch.zeros(1, many),
            "encode": drawn(generator, flat, codes, fan_in=flat),
            "encode_bias": torch.zeros(1, codes),
            "decode": drawn(generator, self.code, flat, fan_in=self.code, gain=relu),
            "decode_bias": torch.zeros(1, flat),
            # Each output of a transposed convolution of stride 2 has a quarter of its 16 weights.
            "deconv1": drawn(generator, many, few, 4, 4, fan_in=4 * many, gain=relu),
            "deconv1_bias": torch.zeros(1, few),
            "deconv0": drawn(generator, few, COLOURS, 4, 4, fan_in=4 * few),
            "deconv0_bias": torch.zeros(1, COLOURS),
        }

    def losses(self, parameters: Parameters, batch: Batch) -> Tensor:
        (patches,) = batch
        return self._errors(parameters, self.encode(parameters, patches), patches)

    def scores(self, parameters: Parameters, batch: Batch) -> dict[str, Tensor]:
        losses = self.losses(parameters, batch)
        return {"loss": losses, "error": losses}

    def encode(self, parameters: Parameters, patches: Tensor) -> Tensor:
        """Patches to codes [R, B, PER_CODE * code]."""
        x = beside(patches - 0.5)
        for name in ("conv0", "conv1"):
            x = torch.relu(convolve(x, parameters[name], parameters[name + "_bias"], stride=2))
        return linear(apart(x, len(patches)).flatten(2), parameters["encode"], parameters["encode_bias"])

    def decode(self, parameters: Parameters, codes: Tensor) -> Tensor:
        """Codes [R, B, code] to patches."""
        side = self.size // 4
        flat = torch.relu(linear(codes, parameters["decode"], parameters["decode_bias"]))
        x = beside(flat.view(*flat.shape[:2], 2 * self.channels, side, side))
        x = torch.relu(deconvolve(x, parameters["deconv1"], parameters["deconv1_bias"]))
        x = deconvolve(x, parameters["deconv0"], parameters["deconv0_bias"])
        return apart(x, len(codes)) + 0.5

    def _errors(self, parameters: Parameters, codes: Tensor, patches: Tensor) -> Tensor:
        return F.mse_loss(self.decode(parameters, codes), patches, reduction="none").flatten(1).mean(1)


@dataclass(frozen=True)
class VariationalAutoencoder(Autoencoder):
    """Codes are normal with a mean and a variance of each patch. Batch: patches, and noise [R, B, code].

    The loss is the negative evidence bound in nats a colour value, under Gaussian pixels of standard deviation `pixel`,
    without its constant.
    """

    pixel: float = 0.1

    PER_CODE = 2

    def losses(self, parameters: Parameters, batch: Batch) -> Tensor:
        patches, noise = batch
        mean, log_variance = self._normal(parameters, patches)
        codes = mean + noise * (0.5 * log_variance).exp()
        errors = self._errors(parameters, codes, patches) / (2 * self.pixel**2)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(2).sum(2).mean(1)
        return errors + divergence / (COLOURS * self.size**2)

    def scores(self, parameters: Parameters, batch: Batch) -> dict[str, Tensor]:
        patches, _ = batch
        mean, _ = self._normal(parameters, patches)
        return {"loss": self.losses(parameters, batch), "error": self._errors(parameters, mean, patches)}

    def _normal(self, parameters: Parameters, patches: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encode(parameters, patches).chunk(2, -1)
        return mean, log_variance
