"""What a site remembers of exact queries, so that two of them cannot be subtracted.

The same question (data set, program, handler) about rows that differ by fewer than k people
tells their values: the difference of the two answers. So the journal keeps, with every exact
release, what was asked and a *sketch* of the rows it was asked of, and refuses a question that
was asked before about rows that differ by 1 … k − 1.

Under a protection that hides a site's share, the cohort is remembered too, and whose sum was told of the very same
question: the same rows asked of a cohort that has one site more or less would tell that site's share.

A question about a closed period (a handler's *period*, such as a day) is another one for each period, and is answered
again over the very same rows only: what is late, or was corrected, would else be the difference of two answers.

What this does not stop: another program that tells the same, cells that a recipe changes where rows
stay who they are, and iterations that are near-repeats. All are what differential privacy is for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from atoll.contract.errors import DisclosureError
from atoll.contract.rounds import not_taken
from atoll.contract.wire import Array, Json, Message, body_parts, canonical_json
from atoll.data.sketch import Sketch


def query_key(dataset: str, message: Message) -> str:
    """What makes two queries alike: data set, program and handler (hex). Not the parameters, of which some
    change no number, nor the recipe: the same question about other rows is what is looked for."""
    asked = {"dataset": dataset, **{name: message.meta[name] for name in ("program", "name")}}
    return hashlib.sha256(b"atoll query 1\0" + canonical_json(asked)).hexdigest()


class Question:
    """What one task asks, with whichever of its *arrays*: what is the same of all digests is encoded once."""

    def __init__(self, meta: Mapping[str, Json], arrays: Mapping[str, Array]) -> None:
        asked = canonical_json({name: meta[name] for name in ("program", "name", "params", "view", "fields")})
        self._begin, self._arrays = b"atoll question 1\0[" + asked + b",", arrays
        self._known: dict[tuple[str, ...], str] = {}

    def digest(self, names: Iterable[str]) -> str:
        """What a release entry says of the question: SHA-256 (hex) over program, handler, parameters, view, fields and
        the sent arrays of these *names*."""
        of = tuple(names)
        if of not in self._known:
            specs, parts = body_parts({name: self._arrays[name] for name in of})
            digest = hashlib.sha256(self._begin + canonical_json(specs) + b"]")
            for part in parts:
                digest.update(part)
            self._known[of] = digest.hexdigest()
        return self._known[of]


def question_digest(meta: Mapping[str, Json], arrays: Mapping[str, Array]) -> str:
    """:class:`Question`'s digest over all of *arrays*."""
    return Question(meta, arrays).digest(arrays)


def period_of(name: str, sent: Mapping[str, Array]) -> str:
    """The closed period that a question is about, by the sent array *name*: as a number, in whatever dtype it came; ""
    for a handler that names no period (*name* is empty). Raises ProtocolError where what was sent names none."""
    if not name:
        return ""
    told = sent.get(name)
    if told is None or told.shape or told.dtype.kind not in "fiu" or not np.isfinite(told):
        raise not_taken(name)
    return (told.astype(np.float64) + 0.0).tobytes().hex()


@dataclass(frozen=True, slots=True)
class Query:
    """An exact query, as it is remembered: its digest, the sketches of the rows it was asked of (training and
    held-out, [2, cells]), and, where a protection hides the site's share, the cohort. closed: it is about a closed
    period."""

    key: str
    rows: Sketch
    cohort: frozenset[str]
    min_group_size: int
    min_sites: int = 1
    closed: bool = False

    @property
    def digest(self) -> str:
        """Of the rows' sketches, hex."""
        return hashlib.sha256(self.rows.tobytes()).hexdigest()

    def check(self, cells: bytes, cohort: frozenset[str]) -> None:
        """Raise DisclosureError if subtracting the answer given for *cells* and *cohort* would tell too much."""
        before = np.frombuffer(cells, np.uint64).reshape(self.rows.shape)
        changed = (before != self.rows).sum(axis=1)
        if self.closed and changed.any():
            raise DisclosureError(
                "disclosure.closed-period", "the same period was asked about before, over other rows", field="repeats",
                remedy="leave it as it was told; the site's operator decides: policy.yaml, 'repeats'",
            )  # fmt: skip
        if ((changed > 0) & (changed < self.min_group_size)).any():
            raise DisclosureError(
                "disclosure.differencing",
                f"the same was asked before, over rows that differ by fewer than {self.min_group_size}",
                field="repeats",
                remedy="ask about disjoint, closed periods; the site's operator decides: policy.yaml, 'repeats'",
            )
        apart = len(self.cohort ^ cohort) if self.cohort and cohort else 0
        if not changed.any() and 0 < apart < max(self.min_sites, 2):
            raise DisclosureError(
                "disclosure.cohort-differencing",
                f"the same was asked before, of a cohort that differs by {apart} sites",
                field="repeats",
                remedy=f"keep the cohort, or change it by {max(self.min_sites, 2)} sites; the operator decides: "
                "policy.yaml, 'repeats'",
            )

    def check_sums(self, cohorts: set[frozenset[str]]) -> None:
        """Raise DisclosureError when sums over two other *cohorts* were told: three can be combined to tell of few."""
        if self.cohort and len(cohorts - {self.cohort, frozenset()}) > 1:
            raise DisclosureError(
                "disclosure.cohort-differencing", "the same was asked before, of two other cohorts",
                field="repeats", remedy="keep the cohort; the operator decides: policy.yaml, 'repeats'",
            )  # fmt: skip
