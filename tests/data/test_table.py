"""Tables in memory, and the split into training and held-out rows."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import SchemaError
from atoll.data.table import Table, concatenate, hold_out, hold_out_latest


def split_again(labels: list[Any] | None, num_rows: int, fraction: float, seed: int, site: str) -> list[bool]:
    """The documented split, written a second time from its description."""
    held = [False] * num_rows
    if fraction > 0:
        key = hashlib.sha256(b"atoll split\x00" + str(seed).encode() + b"\x00" + site.encode()).digest()[:16]
        random = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        missing = [r for r in range(num_rows) if labels is not None and labels[r] != labels[r]]
        known = [r for r in range(num_rows) if labels is not None and r not in missing]
        classes = [[r for r in known if labels[r] == value] for value in sorted({labels[r] for r in known})]
        strata = [list(range(num_rows))] if labels is None else [*classes, missing]
        for stratum in strata:
            if stratum:
                for row in random.permutation(stratum)[: round(fraction * len(stratum))]:
                    held[int(row)] = True
    return held


LABELS = st.none() | st.lists(st.sampled_from([0.0, 1.0, 2.0, float("nan")]), max_size=60)


@settings(deadline=None)
@given(LABELS, st.floats(0, 0.95), st.integers(0, 2**62), st.sampled_from(["a", "b", "hôpital"]))
def test_the_split_is_the_documented_one(labels: list[float] | None, fraction: float, seed: int, site: str) -> None:
    n = 37 if labels is None else len(labels)
    given_labels = None if labels is None else np.array(labels)
    assert hold_out(given_labels, n, fraction, seed, site).tolist() == split_again(labels, n, fraction, seed, site)


@settings(deadline=None)
@given(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=80), st.floats(0.01, 0.9), st.integers(0, 9))
def test_each_class_gives_its_fraction(labels: list[int], fraction: float, seed: int) -> None:
    y = np.array(labels)
    held = hold_out(y, len(y), fraction, seed, "a")
    for value in (0, 1):
        assert held[y == value].sum() == round(fraction * (y == value).sum())


def test_splits_differ_by_site_and_seed_and_are_repeatable() -> None:
    def split(seed: int, site: str) -> list[bool]:
        return hold_out(None, 100, 0.5, seed, site).tolist()

    assert split(1, "a") == split(1, "a")
    assert split(1, "a") != split(1, "b")
    assert split(1, "a") != split(2, "a")


def test_nothing_is_held_out_of_nothing() -> None:
    assert not hold_out(np.array([1.0, 0.0]), 2, 0.0, 7, "a").any()
    assert hold_out(np.empty(0), 0, 0.5, 7, "a").tolist() == []
    assert hold_out(None, 0, 0.5, 7, "a").tolist() == []


def test_text_labels_with_missing_ones_are_strata_too() -> None:
    labels = np.array(["b", None, "a", "b", None, "a"] * 10, dtype=object)
    held = hold_out(labels, 60, 0.3, 7, "a")
    for value in ("a", "b", None):
        assert held[[label == value for label in labels]].sum() == 6
    numbers = np.array([{"a": 0.0, "b": 1.0, None: np.nan}[label] for label in labels])
    assert np.array_equal(held, hold_out(numbers, 60, 0.3, 7, "a"))  # sorted order, missing last


def make(federation: Any, n: int, **columns: Any) -> Table:
    data = {name: np.arange(n, dtype=float) + shift for name, shift in columns.items()}
    return federation.table(data, {name: {"range": [-1e6, 1e6]} for name in columns})


def test_batches_rows_and_parts(federation: Any) -> None:
    table = make(federation, 10, x=0, y=100)
    batches = list(table.batches(("y", "x"), 4))
    assert [batch.shape for batch in batches] == [(4, 2), (4, 2), (2, 2)]
    assert np.array_equal(np.concatenate(batches), np.column_stack([table["y"], table["x"]]))
    held = Table(table.schema, table.columns, np.arange(10) % 3 == 0)
    training, holdout = held.parts()
    assert training["x"].tolist() == [1, 2, 4, 5, 7, 8]
    assert holdout["x"].tolist() == [0, 3, 6, 9]
    assert len(table.parts()[0]) == 10
    assert len(table.parts()[1]) == 0
    assert held.rows(held["x"] > 5).held_out.tolist() == [True, False, False, True]
    both = concatenate([held, make(federation, 2, x=0, y=0)])
    assert both["y"].tolist() == [*range(100, 110), 0, 1]
    assert both.held_out.sum() == 4


def test_an_unknown_column_is_an_error_that_suggests(federation: Any) -> None:
    table = make(federation, 3, age=0, height=1)
    with pytest.raises(SchemaError) as caught:
        table["hieght"]
    assert (caught.value.code, caught.value.field) == ("schema.no-column", "hieght")
    assert "'height'" in caught.value.remedy
    with pytest.raises(SchemaError):
        list(table.batches(("age", "sex")))


def test_the_latest_rows_are_held_out_and_equals_stay_together() -> None:
    days = np.array(["2024-01-03", "2024-01-01", "NaT", "2024-01-02", "2024-01-02"], "datetime64[D]")
    assert hold_out_latest(days, 0.25).tolist() == [True, False, False, False, False]
    assert hold_out_latest(days, 0.5).tolist() == [True, False, False, True, True]  # the border is on equal days
    assert not hold_out_latest(days, 0.0).any()
    assert hold_out_latest(np.array([np.nan, 2.0, 1.0]), 0.01).tolist() == [False, True, False]
    assert not hold_out_latest(np.full(5, 3.0), 0.5).any()  # nothing would be left to learn from
    assert hold_out_latest(np.array([1.0, 1.0, 1.0, 2.0]), 0.9).tolist() == [False, False, False, True]
    assert hold_out_latest(np.empty(0), 0.5).tolist() == []


@given(times=st.lists(st.integers(0, 50), min_size=1, max_size=60), fraction=st.floats(0.01, 0.99))
def test_no_held_out_row_is_before_a_training_row(times: list[int], fraction: float) -> None:
    order = np.array(times, float)
    held = hold_out_latest(order, fraction)
    assert held.any() == (len(set(times)) > 1)
    assert not held.any() or order[~held].max() < order[held].min()
