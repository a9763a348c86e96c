"""Free text as numbers, by a public rule: no vocabulary has to be agreed, and none can tell what a site's texts say.

Text is lower-cased and split into runs of letters and digits; an ideograph is a word of its own; a web address becomes
``<url>`` and a handle ``<user>``, so that neither is learned. Words, runs of words and runs of letters within a word
("<rain>": <ra, rai, ain, in>) are hashed into *buckets* by CRC-32, the same at every site and on every machine; what
falls into one bucket is one to the model. 0 is no word: it fills short texts up.

A bucket's embedding changes only where one of its words occurs: under ``plain`` an update tells the coordinator which
buckets a site's texts fell into, under secure aggregation that some site's did; differential privacy hides that too.

Sources: Weinberger et al. 2009, Feature Hashing for Large Scale Multitask Learning (ICML), §2; Joulin et al. 2017, Bag
of Tricks for Efficient Text Classification (EACL), §2.2 (hashed runs of words); Bojanowski et al. 2017, Enriching Word
Vectors with Subword Information (TACL), §3.2 (runs of letters).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import PlanError
from atoll.contract.program import TableView
from atoll.contract.schema import TableSchema
from atoll.models.model import missing

Places = Callable[[list[str]], Iterator[int]]
"""Words → places in the table of embeddings, the most telling first."""

IDEOGRAPH = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"(?:https?://|www\.)\S+|@\w+|[{IDEOGRAPH}]|[^\W_{IDEOGRAPH}]+")


def words(text: str) -> list[str]:
    """The words of a text, in order."""
    return [_marked(found) for found in WORD.findall(text.lower())]


def _marked(word: str) -> str:
    if word[0] == "@":
        return "<user>"
    return "<url>" if word.startswith(("http://", "https://", "www.")) else word


def bucket(term: str, buckets: int) -> int:
    """1 … buckets − 1: CRC-32 of the term in UTF-8."""
    return crc32(term.encode("utf-8", "replace")) % (buckets - 1) + 1


def runs(found: list[str], most: int) -> Iterator[str]:
    """Words, then runs of two words, and so on up to *most*."""
    for size in range(1, most + 1):
        for start in range(len(found) - size + 1):
            yield " ".join(found[start : start + size])


def letters(word: str, sizes: tuple[int, int]) -> Iterator[str]:
    """Runs of letters of a word between "<" and ">", of the smallest to the largest of *sizes*; never all of it."""
    edged = f"<{word}>"
    for size in range(sizes[0], min(sizes[1], len(edged) - 1) + 1):
        for start in range(len(edged) - size + 1):
            yield edged[start : start + size]


def hashed(texts: NDArray[Any], length: int, places: Places) -> NDArray[np.int32]:
    """The first *length* places of each text, then zeros, [num_rows, length]; *texts* are str objects."""
    found = np.zeros((len(texts), length), np.int32)
    for row, text in zip(found, texts, strict=True):
        some = list(islice(places(words(text)), length))
        row[: len(some)] = some
    return found


def filled(places: NDArray[np.int32]) -> NDArray[np.int64]:
    """Without the columns in which no text has a word any more, but for the first, [num_rows, ≤ length]."""
    longest = int(np.count_nonzero(places.any(axis=0)))
    return places[:, : max(longest, 1)].astype(np.int64)


def text_column(schema: TableSchema, name: str) -> None:
    """Raises PlanError unless *name* is a column of text."""
    column = schema.columns.get(name)
    if column is None or column.dtype != "text" or column.role == "ignore":
        raise PlanError(
            "plan.bad-column", f"{name!r} is not a text column of the prepared table", field=name,
            remedy="check the plan's column names against the schema",
        )  # fmt: skip


def texts(table: TableView, name: str) -> NDArray[Any]:
    """A column of text, [num_rows]; raises SchemaError where a cell is missing."""
    column = table[name]
    if any(cell is None for cell in column):
        raise missing([name])
    return column
