"""A small convolutional network for images of ten classes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from bench.evidence.networks.stack import Batch, Parameters, apart, beside, convolve, cross_entropies, drawn, linear

CLASSES = 10


@dataclass(frozen=True)
class ConvNet:
    """3x3 convolutions with ReLU, then a linear classifier; no normalisation, so that no step depends on a batch.

    Attributes:
        size: height and width of the grey images.
        channels: of each convolution.
        strides: of each convolution.
    """

    size: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    hidden: frozenset[str] = frozenset()

    def start(self, generator: Generator) -> dict[str, Tensor]:
        parameters = {}
        for i, (inputs, outputs) in enumerate(zip((1, *self.channels), self.channels, strict=False)):
            parameters[f"conv{i}"] = drawn(generator, outputs, inputs, 3, 3, fan_in=9 * inputs, gain=math.sqrt(2))
            parameters[f"bias{i}"] = torch.zeros(1, outputs)
        features = self.channels[-1] * self._last_size**2
        parameters["classifier"] = drawn(generator, features, CLASSES, fan_in=features)
        parameters["classifier_bias"] = torch.zeros(1, CLASSES)
        return parameters

    def losses(self, parameters: Parameters, batch: Batch) -> Tensor:
        images, classes = batch
        return cross_entropies(self.logits(parameters, images), classes)

    def scores(self, parameters: Parameters, batch: Batch) -> dict[str, Tensor]:
        images, classes = batch
        logits = self.logits(parameters, images)
        right = (logits.argmax(-1) == classes).float().mean(1)
        return {"loss": cross_entropies(logits, classes), "accuracy": 100 * right}

    def logits(self, parameters: Parameters, images: Tensor) -> Tensor:
        """Images [R, B, 1, size, size] to [R, B, 10]."""
        x = beside(images)
        for i, stride in enumerate(self.strides):
            x = torch.relu(convolve(x, parameters[f"conv{i}"], parameters[f"bias{i}"], stride))
        features = apart(x, len(images)).flatten(2)
        return linear(features, parameters["classifier"], parameters["classifier_bias"])

    @property
    def _last_size(self) -> int:
        size = self.size
        for stride in self.strides:
            size = (size - 1) // stride + 1
        return size
