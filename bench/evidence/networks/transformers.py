"""Pre-norm transformers over characters with tied embeddings: a causal GPT, and a masked model like BERT."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bench.evidence.networks.stack import Batch, Parameters, cross_entropies, drawn, linear, norm

PROJECTIONS = ("query", "key", "value")


@dataclass(frozen=True)
class GPT:
    """Predicts every next character.

    Attributes:
        vocabulary: number of characters.
        width: features of a character; a multiple of `heads`.
        layers: number of blocks: attention, then a perceptron of twice the width.
        heads: of the attention.
        context: longest window.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    context: int

    causal = True

    @property
    def hidden(self) -> frozenset[str]:
        kinds = (*PROJECTIONS, "mixed", "up", "down")
        return frozenset(f"{kind}{layer}" for kind in kinds for layer in range(self.layers))

    def start(self, generator: Generator) -> dict[str, Tensor]:
        width = self.width
        parameters = {
            "token": drawn(generator, self.vocabulary, width, fan_in=width),
            "position": drawn(generator, self.context, width, fan_in=width),
            "gain": torch.ones(1, width),
        }
        # What each block adds to the residual stream shrinks with depth, so that its variance does not grow (GPT-2).
        last = 1 / math.sqrt(2 * self.layers)
        for i in range(self.layers):
            for kind in PROJECTIONS:
                parameters[f"{kind}{i}"] = drawn(generator, width, width, fan_in=width)
            parameters[f"mixed{i}"] = drawn(generator, width, width, fan_in=width, gain=last)
            parameters[f"up{i}"] = drawn(generator, width, 2 * width, fan_in=width)
            parameters[f"down{i}"] = drawn(generator, 2 * width, width, fan_in=2 * width, gain=last)
            parameters[f"gain_attention{i}"] = torch.ones(1, width)
            parameters[f"gain_perceptron{i}"] = torch.ones(1, width)
        return parameters

    def losses(self, parameters: Parameters, batch: Batch) -> Tensor:
        (text,) = batch
        features = self.features(parameters, text[..., :-1])
        return cross_entropies(linear(features, parameters["token"].mT), text[..., 1:])

    def scores(self, parameters: Parameters, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.losses(parameters, batch)}

    def features(self, parameters: Parameters, text: Tensor) -> Tensor:
        """Characters [R, B, T] to [R, B, T, width]."""
        rows = torch.arange(len(text)).view(-1, 1, 1)
        x = parameters["token"][rows, text] + parameters["position"][:, None, : text.shape[-1]]
        for i in range(self.layers):
            x = x + self._attention(parameters, i, norm(x, parameters[f"gain_attention{i}"]))
            up = linear(norm(x, parameters[f"gain_perceptron{i}"]), parameters[f"up{i}"])
            x = x + linear(torch.relu(up), parameters[f"down{i}"])
        return norm(x, parameters["gain"])

    def _attention(self, parameters: Parameters, layer: int, x: Tensor) -> Tensor:
        weights = torch.cat([parameters[f"{kind}{layer}"] for kind in PROJECTIONS], -1)
        projected = linear(x, weights).view(*x.shape[:-1], 3, self.heads, -1)
        query, key, value = (p.flatten(0, 1).transpose(1, 2) for p in projected.unbind(3))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return linear(mixed.transpose(1, 2).reshape(x.shape), parameters[f"mixed{layer}"])


@dataclass(frozen=True)
class Masked(GPT):
    """Predicts the characters that a window hides, from both sides; the last of the vocabulary stands for a hidden one.

    Batch: text with characters hidden [R, B, T], their places [R, B, m], what they were [R, B, m].
    """

    causal = False

    def losses(self, parameters: Parameters, batch: Batch) -> Tensor:
        text, places, hidden = batch
        features = self.features(parameters, text)
        chosen = features.gather(2, places.unsqueeze(-1).expand(-1, -1, -1, self.width))
        return cross_entropies(linear(chosen, parameters["token"].mT), hidden)
