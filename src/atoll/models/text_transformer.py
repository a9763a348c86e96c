"""A small transformer encoder for texts: one token a word, the mean over a text's words is its representation.

Words are hashed as ``models/text.py`` says; fill-up tokens are attended to by nobody and are in no mean.

Source: Vaswani et al. 2017, Attention Is All You Need (NeurIPS), §3 (the encoder, sinusoidal positions, embeddings
times √width); normalisation stands before each part: Xiong et al. 2020, On Layer Normalization in the Transformer
Architecture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from atoll.contract.program import TableView
from atoll.contract.wire import Array
from atoll.models import model as port
from atoll.models.model import model
from atoll.models.network import Network
from atoll.models.series_transformer import positions
from atoll.models.text import bucket, filled, hashed, text_column, texts

NOBODY = -1e9
"""Added to the attention to a token that is not there: its share is then exactly 0."""


class TextTransformerSpec(port.Settings):
    """text: the column. length: words of a text that count. buckets: into which words are hashed. width: of a token, a
    multiple of 2 · heads. layers: how many; feed-forward parts are twice as wide."""

    kind: Literal["text_transformer"] = "text_transformer"
    text: str
    length: int = Field(default=48, ge=1, le=4096)
    buckets: int = Field(default=8192, ge=2, le=1 << 20)
    width: int = Field(default=32, ge=2, le=1024)
    heads: int = Field(default=4, ge=1, le=64)
    layers: int = Field(default=2, ge=1, le=24)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError("width must be a multiple of twice the heads, such as width 32 with 4 heads")
        return self


class Attention(nn.Module):
    """Every token attends to every token that is there: softmax(Q Kᵀ / √d) V in several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.value, self.key, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """[num_rows, length, width] → the same; there: [num_rows, length]."""
        query, key, value = (
            of(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for of in (self.query, self.key, self.value)
        )  # each [num_rows, heads, length, width / heads]
        likeness = (query / math.sqrt(query.shape[-1])) @ key.transpose(2, 3)
        shares = (likeness + NOBODY * ~there[:, None, None]).softmax(3)
        found: Tensor = self.out((shares @ value).transpose(1, 2).flatten(2))
        return found


class Layer(nn.Module):
    """Attention, then a feed-forward part, each on what is normalised and added to what was there."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.forward_part = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """[num_rows, length, width] → the same."""
        x = x + self.attention(self.norm(x), there)
        found: Tensor = x + self.forward_part(x)
        return found


class Encoder(nn.Module):
    """Places [num_rows, length] → [num_rows, width]; zeros for a text without words."""

    def __init__(self, settings: TextTransformerSpec) -> None:
        super().__init__()
        s = settings
        self.words = nn.Embedding(s.buckets, s.width)
        self.layers = nn.ModuleList(Layer(s.width, s.heads) for _ in range(s.layers))
        self.norm = nn.LayerNorm(s.width)

    def forward(self, places: Tensor) -> Tensor:
        """The mean of the last layer's tokens, normalised, over those that are there."""
        there = places > 0
        width = self.words.embedding_dim
        x = self.words(places) * math.sqrt(width) + positions(places.shape[1], width).to(self.words.weight)
        for layer in self.layers:
            x = layer(x, there)
        total: Tensor = (self.norm(x) * there[:, :, None]).sum(1)
        return total / there.sum(1, keepdim=True).clamp(min=1)


@model
class TextTransformer(Network):
    """See the module's docstring."""

    Spec: ClassVar[type[TextTransformerSpec]] = TextTransformerSpec
    settings: TextTransformerSpec

    def encoder(self) -> tuple[nn.Module, int]:
        """Embeddings and layers."""
        text_column(self.schema, self.settings.text)
        return Encoder(self.settings), self.settings.width

    def inputs(self, table: TableView) -> tuple[Array, ...]:
        """Places of each text's words, int32 [num_rows, length]; raises SchemaError where a text is missing."""
        s = self.settings

        def places(found: list[str]) -> Iterator[int]:
            return (bucket(word, s.buckets) for word in found)

        return (hashed(texts(table, s.text), s.length, places),)

    def tensors(self, inputs: tuple[Array, ...]) -> tuple[Tensor, ...]:
        """The places, int64 [num_rows, ≤ length]."""
        return (torch.from_numpy(filled(inputs[0])),)
