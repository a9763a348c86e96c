"""A small transformer encoder for time series: one token a step; the newest step's is the window's representation.

Source: Vaswani et al. 2017, Attention Is All You Need (NeurIPS), §3 (the encoder, sinusoidal positions); normalisation
stands before each part and not behind it: Xiong et al. 2020, On Layer Normalization in the Transformer Architecture.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from atoll.contract.errors import PlanError
from atoll.models.model import model
from atoll.models.sequence import Sequence, SeriesSpec


class SeriesTransformerSpec(SeriesSpec):
    """width: of a token, a multiple of 2 · heads. layers: how many. Feed-forward parts are twice as wide."""

    kind: Literal["series_transformer"] = "series_transformer"
    width: int = Field(default=32, ge=2, le=1024)
    heads: int = Field(default=4, ge=1, le=64)
    layers: int = Field(default=2, ge=1, le=12)


def positions(steps: int, width: int) -> Tensor:
    """sin and cos of step / 10000^(2i / width) in turn, [steps, width]."""
    angles = torch.arange(steps)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)


class Attention(nn.Module):
    """Every step attends to every step: softmax(Q Kᵀ / √d) V in several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.ask, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[num_rows, steps, width] → the same."""
        parts = self.ask(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)  # each [num_rows, heads, steps, width / heads]
        weights = (query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])).softmax(3)
        found: Tensor = self.out((weights @ value).transpose(1, 2).flatten(2))
        return found


class Layer(nn.Module):
    """Attention, then a feed-forward part, each on what is normalised and added to what was there."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.forward_part = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[num_rows, steps, width] → the same."""
        x = x + self.attention(x)
        found: Tensor = x + self.forward_part(x)
        return found


class Encoder(nn.Module):
    """[num_rows, steps, channels] → [num_rows, width]."""

    def __init__(self, channels: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Linear(channels, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, window: Tensor) -> Tensor:
        """The newest token, normalised."""
        tokens = self.tokens(window)
        found: Tensor = self.norm(self.layers(tokens + positions(*tokens.shape[1:]).to(tokens))[:, -1])
        return found


@model
class SeriesTransformer(Sequence):
    """See the module's docstring."""

    Spec: ClassVar[type[SeriesTransformerSpec]] = SeriesTransformerSpec
    settings: SeriesTransformerSpec

    def body(self, channels: int) -> tuple[nn.Module, int]:
        """The encoder; raises PlanError where the width cannot be shared among the heads."""
        s = self.settings
        if s.width % (2 * s.heads):
            raise PlanError(
                "model.bad-heads", "a token's width is not a multiple of twice the heads", field="model.width",
                remedy="such as width 32 with 4 heads",
            )  # fmt: skip
        return Encoder(channels, s.width, s.heads, s.layers), s.width
