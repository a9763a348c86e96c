"""A bag of hashed words for texts: the mean of what each word, run of words and run of letters is to the model.

Source: Joulin et al. 2017, Bag of Tricks for Efficient Text Classification (EACL), §2; Bojanowski et al. 2017,
Enriching Word Vectors with Subword Information (TACL), §3.2. How text is taken apart stands in ``models/text.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from atoll.contract.program import TableView
from atoll.contract.wire import Array
from atoll.models import model as port
from atoll.models.model import model
from atoll.models.network import Network
from atoll.models.text import bucket, filled, hashed, letters, runs, text_column, texts


class EmbeddingBagSpec(port.Settings):
    """text: the column. buckets: into which words are hashed. width: of the representation. words: runs of up to so
    many words. letters: runs of letters of these sizes, from and to; null: none. length: terms of a text that count."""

    kind: Literal["embedding_bag"] = "embedding_bag"
    text: str
    buckets: int = Field(default=8192, ge=2, le=1 << 20)
    width: int = Field(default=16, ge=1, le=1024)
    words: int = Field(default=2, ge=1, le=5)
    letters: tuple[int, int] | None = (3, 5)
    length: int = Field(default=256, ge=1, le=65_536)

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.letters is not None and not 1 <= self.letters[0] <= self.letters[1]:
            raise ValueError("letters are runs from 1 letter or more to as many or more, such as [3, 5]")
        return self


class Bag(nn.Module):
    """Mean of the embeddings of all places but 0; zeros where there is none."""

    def __init__(self, buckets: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(buckets, width)

    def forward(self, places: Tensor) -> Tensor:
        """Places [num_rows, length] → [num_rows, width]."""
        there = (places > 0).unsqueeze(-1)
        total: Tensor = (self.words(places) * there).sum(1)
        return total / there.sum(1).clamp(min=1)


@model
class EmbeddingBag(Network):
    """See the module's docstring."""

    Spec: ClassVar[type[EmbeddingBagSpec]] = EmbeddingBagSpec
    settings: EmbeddingBagSpec

    def encoder(self) -> tuple[nn.Module, int]:
        """The mean of embeddings."""
        text_column(self.schema, self.settings.text)
        return Bag(self.settings.buckets, self.settings.width), self.settings.width

    def inputs(self, table: TableView) -> tuple[Array, ...]:
        """Places of each text's terms, words first, int32 [num_rows, length]; raises SchemaError where a text is
        missing."""
        s = self.settings

        @lru_cache(1 << 16)
        def inside(word: str) -> tuple[int, ...]:
            return tuple(bucket(run, s.buckets) for run in letters(word, s.letters)) if s.letters else ()

        def places(found: list[str]) -> Iterator[int]:
            yield from (bucket(run, s.buckets) for run in runs(found, s.words))
            for word in found:
                yield from inside(word)

        return (hashed(texts(table, s.text), s.length, places),)

    def tensors(self, inputs: tuple[Array, ...]) -> tuple[Tensor, ...]:
        """The places, int64 [num_rows, ≤ length]."""
        return (torch.from_numpy(filled(inputs[0])),)
