"""A character model of one LSTM layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from bench.evidence.networks.stack import Batch, Parameters, cross_entropies, drawn, linear


@dataclass(frozen=True)
class LSTM:
    """Embedding, one LSTM layer, linear output; each window starts from a state of zeros.

    Attributes:
        vocabulary: number of characters.
        embedding: features of a character.
        width: of the state.
    """

    vocabulary: int
    embedding: int
    width: int
    hidden: frozenset[str] = frozenset({"input", "recurrent"})

    def start(self, generator: Generator) -> dict[str, Tensor]:
        gates = 4 * self.width
        bias = torch.zeros(1, gates)
        bias[:, self.width : 2 * self.width] = 1.0  # forget little at first
        return {
            "token": drawn(generator, self.vocabulary, self.embedding, fan_in=1),
            "input": drawn(generator, self.embedding, gates, fan_in=self.embedding + self.width),
            "recurrent": drawn(generator, self.width, gates, fan_in=self.embedding + self.width),
            "bias": bias,
            "output": drawn(generator, self.width, self.vocabulary, fan_in=self.width),
            "output_bias": torch.zeros(1, self.vocabulary),
        }

    def losses(self, parameters: Parameters, batch: Batch) -> Tensor:
        (text,) = batch
        return cross_entropies(self.logits(parameters, text[..., :-1]), text[..., 1:])

    def scores(self, parameters: Parameters, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.losses(parameters, batch)}

    def logits(self, parameters: Parameters, text: Tensor) -> Tensor:
        """Characters [R, B, T] to [R, B, T, vocabulary]."""
        replicas, batch, length = text.shape
        # What a character adds to the gates is a row of a table: one product for all that occur.
        table = torch.baddbmm(parameters["bias"], parameters["token"], parameters["input"])
        rows = torch.arange(replicas).view(-1, 1, 1)
        inputs = table[rows, text].unbind(2)
        h = c = table.new_zeros(replicas, batch, self.width)
        states = []
        for t in range(length):
            gates = torch.baddbmm(inputs[t], h, parameters["recurrent"])
            enter, forget, leave = gates[..., : 3 * self.width].sigmoid().chunk(3, -1)
            c = forget * c + enter * gates[..., 3 * self.width :].tanh()
            h = leave * c.tanh()
            states.append(h)
        return linear(torch.stack(states, 2), parameters["output"], parameters["output_bias"])
