"""The two networks the demo trains: a small GPT over bytes and a small convolutional network for 8x8 digits.

Both are written plainly, so that a reader sees a model like his own and nothing made for the optimizer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256


class GPT(nn.Module):
    """A pre-norm decoder-only transformer over bytes, with tied input and output embedding.

    No layer has a bias. A key's bias has an exact gradient of zero (softmax ignores a shift common to a row);
    what autograd returns for it is rounding noise, which Adam blows up to full-sized steps, and two correct
    optimizers would part in parameters that no loss depends on.

    Args:
        width: features of a token; a multiple of ``heads``.
        layers: number of blocks.
        heads: attention heads of a block.
        context: longest sequence, in bytes.
    """

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width={width} and heads={heads}")
        self.token = nn.Embedding(BYTES, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        # Each block adds twice to the residual stream; so its variance does not grow with depth (GPT-2).
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attention_out.weight, std=0.02 / math.sqrt(2 * layers))
            nn.init.normal_(block.mlp_out.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Bytes as int64 of shape (batch, length) to logits of shape (batch, length, 256)."""
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = F.linear(self.norm(x), self.token.weight)
        return logits


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each normed before and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention_in = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.attention_in(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x


class ConvNet(nn.Module):
    """Three convolutions and a linear classifier over 8x8 images of ten digits.

    GELU and strides in place of ReLU and max-pooling: at a kink or a tie, rounding decides which way a
    gradient goes, and two correct optimizers part there as far as one with a small error does.

    Args:
        channels: of the first convolution; the second has twice, the third four times as many.
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * channels, 4 * channels, 3, stride=2, padding=1),
            nn.GELU(),
        )
        self.classifier = nn.Linear(16 * channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images as float32 of shape (batch, 1, 8, 8) to logits of shape (batch, 10)."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits
