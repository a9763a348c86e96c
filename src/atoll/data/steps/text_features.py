"""Free text as numbers: hashed n-grams, weighted by how rare they are in the cohort. No vocabulary leaves a site."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from atoll.contract.schema import Column, TableSchema
from atoll.data.frame import Frame
from atoll.data.step import Fitted, Found, Need, Step, column_of, free_name, numeric_of, step
from atoll.data.steps.arrays import beside
from atoll.data.steps.declare import enough

_OFFSET, _PRIME = 0xCBF29CE484222325, 0x100000001B3
_WORD = re.compile(r"\w+")


@step("text_features")
class TextFeatures(Step):
    """Replace the free text ``column`` by ``into_0`` … ``into_(dims − 1)``: how many n-grams it has of each bucket.

    Texts are normalised (NFKC, lower case, spaces collapsed). level: n-grams of characters ("char", which also
    serves languages written without spaces) or words. ngrams: which lengths. Bucket: 64-bit FNV-1a over the n-gram's
    code points, mixed by MurmurHash3's finaliser, modulo dims: the same at every site. cap: larger counts
    are told as that. Missing text gives missing counts.
    """

    column: str
    into: str
    dims: int = Field(default=64, ge=2, le=1024)
    level: Literal["char", "word"] = "char"
    ngrams: tuple[int, ...] = Field(default=(2, 3), min_length=1)
    cap: int = Field(default=15, ge=1, le=255)

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if not all(1 <= n <= 8 for n in self.ngrams) or len(set(self.ngrams)) < len(self.ngrams):
            raise ValueError("ngrams must be different lengths from 1 to 8")
        return self

    def after(self, schema: TableSchema) -> TableSchema:
        source = column_of(schema, self.column, "text")
        role: Any = source.role if source.role in ("feature", "label") else "feature"
        made = Column(dtype="integer", range=(0, self.cap), role=role, missing=source.missing)
        columns = {name: column for name, column in schema.columns.items() if name != self.column}
        for name in bucket_names(self.into, self.dims):
            columns[free_name(schema, name, self.column)] = made
        return schema.model_copy(update={"columns": columns})

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        names = bucket_names(self.into, self.dims)
        frame = beside(frame, [self.column], [f"__{name}" for name in names], self._counted)
        return frame.replace({name: frame[f"__{name}"] for name in names}, self.after(frame.schema))

    def _counted(self, batch: pa.RecordBatch) -> NDArray[np.float64]:
        """Counts of each bucket, [num_rows, dims]; NaN where there is no text."""
        texts = batch.column(0).to_pylist()
        counts = np.minimum(self._counts([_normal(text or "") for text in texts]), self.cap).astype(np.float64)
        counts[[text is None for text in texts]] = np.nan
        return counts

    def _counts(self, texts: list[str]) -> NDArray[np.int64]:
        found = np.zeros(len(texts) * self.dims, np.int64)
        if self.level == "word":
            words = [_WORD.findall(text) for text in texts]
            grams = [[" ".join(w[i : i + n]) for n in self.ngrams for i in range(len(w) - n + 1)] for w in words]
            bucket = {gram: _bucket_of(gram, self.dims) for gram in {gram for row in grams for gram in row}}
            cells = [row * self.dims + bucket[gram] for row, of_row in enumerate(grams) for gram in of_row]
            found += np.bincount(np.array(cells, np.int64), minlength=len(found))
            return found.reshape(-1, self.dims)
        letters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
        rows = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        for n in self.ngrams:
            size = max(len(letters) - n + 1, 0)
            if size:
                whole = rows[:size] == rows[n - 1 :]
                key = np.full(size, _OFFSET, np.uint64)
                for i in range(n):
                    key = (key ^ letters[i : i + size]) * np.uint64(_PRIME)
                place = (_mixed(key) % np.uint64(self.dims)).astype(np.int64)
                found += np.bincount((rows[:size] * self.dims + place)[whole], minlength=len(found))
        return found.reshape(-1, self.dims)


@step("tf_idf")
class TfIdf(Step):
    """Weight counts that ``text_features`` made (``columns``_0 …) by rarity, and give each text length 1:
    tf · (ln((1 + n) / (1 + df)) + 1), with n texts and df of them in the bucket, over all sites' training rows.

    dims, cap: as there. Where too few texts are in a bucket to be told, its df counts as 0; where too few are
    outside, as n.
    """

    columns: str
    dims: int = Field(default=64, ge=2, le=1024)
    cap: int = Field(default=15, ge=1, le=255)

    def needs(self) -> tuple[Need, ...]:
        names = bucket_names(self.columns, self.dims)
        return (  # bins of half a count: the first one holds exactly the zeros
            Need("statistics.frequency", names, (("bins", 2 * self.cap),)),
            Need("statistics.describe", names, (("bins", 1),)),
        )

    def fit(self, found: Found) -> Fitted:
        histograms, described = (found[need] for need in self.needs())
        columns, means = histograms["frequency"]["columns"], described["columns"]
        counts = enough(columns, bucket_names(self.columns, self.dims), "count")
        return {"weights": [self._weight(columns[name], n, means[name]["mean"]) for name, [n] in counts.items()]}

    def _weight(self, histogram: Any, n: float, mean: float) -> float:
        # a first bin that was merged: nearly nobody, or nearly everybody, is outside it
        df = n - histogram["counts"][0] if 0.5 in histogram["edges"] else n if mean > 0.5 else 0.0
        return math.log((1 + n) / (1 + df)) + 1

    def after(self, schema: TableSchema) -> TableSchema:
        made = {}
        for name in bucket_names(self.columns, self.dims):
            source = numeric_of(schema, name)
            made[name] = Column(range=(0, 1), role=source.role, missing=source.missing)
        return schema.with_columns(made)

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        weights = dict(zip(bucket_names(self.columns, self.dims), fitted["weights"], strict=True))
        weighted = {name: frame[name] * float(weight) for name, weight in weights.items()}
        squares = [cell * cell for cell in weighted.values()]
        while len(squares) > 1:  # a balanced tree: engines limit how deep an expression may be
            squares = [sum(squares[i + 1 : i + 2], squares[i]) for i in range(0, len(squares), 2)]
        frame = Frame.replace(frame, {"__length": squares[0].sqrt(), **weighted})
        length = frame["__length"]
        scaled = {name: (length > 0).ifelse(frame[name] / length, frame[name]).clip(0, 1) for name in weights}
        return frame.replace(scaled, self.after(frame.schema))


def bucket_names(into: str, dims: int) -> tuple[str, ...]:
    """Names of the columns of buckets."""
    return tuple(f"{into}_{i}" for i in range(dims))


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _mixed(key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    key = (key ^ (key >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    key = (key ^ (key >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return key ^ (key >> np.uint64(33))


def _bucket_of(gram: str, dims: int) -> int:
    key = _OFFSET
    for letter in gram:
        key = ((key ^ ord(letter)) * _PRIME) & 0xFFFFFFFFFFFFFFFF
    return int(_mixed(np.array([key], np.uint64))[0] % np.uint64(dims))
