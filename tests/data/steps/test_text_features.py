"""Hashed n-grams equal a second implementation, and their weights scikit-learn's on the pooled counts."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfTransformer

from atoll.contract.errors import PlanError

COLUMNS = {"note": {"dtype": "text"}, "k": {"range": [0, 1]}}
TEXT = {"step": "text_features", "column": "note", "into": "text", "dims": 16}


def bucket(gram: str, dims: int) -> int:
    """FNV-1a and MurmurHash3's finaliser, in plain integers."""
    key = 14695981039346656037
    for letter in gram:
        key = (key ^ ord(letter)) * 1099511628211 % 2**64
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        key = (key ^ key >> 33) * factor % 2**64
    return (key ^ key >> 33) % dims


def counted(grams: list[str], dims: int = 16, cap: int = 15) -> list[float]:
    counts = np.zeros(dims)
    for gram in grams:
        counts[bucket(gram, dims)] += 1
    return np.minimum(counts, cap).tolist()


def matrix(table: Any, dims: int = 16) -> np.ndarray:
    return np.column_stack([table[f"text_{i}"] for i in range(dims)])


def site(table_of: Any, notes: list[Any]) -> Any:
    return table_of({"note": notes, "k": [0] * len(notes)}, COLUMNS)


@settings(max_examples=25)
@given(st.lists(st.one_of(st.none(), st.text(alphabet="abc 发热咳嗽x́Ａ\U0001f600", max_size=12)), max_size=8))
def test_characters(table_of: Any, prepare: Any, notes: list[Any]) -> None:
    found = matrix(prepare([TEXT], {"one": site(table_of, notes)})["one"])
    for note, row in zip(notes, found, strict=True):
        if note is None:
            assert np.isnan(row).all()
        else:
            text = " ".join(unicodedata.normalize("NFKC", note).casefold().split())
            grams = [text[i : i + n] for n in (2, 3) for i in range(len(text) - n + 1)]
            assert row.tolist() == counted(grams)


def test_words(table_of: Any, prepare: Any) -> None:
    step = {**TEXT, "level": "word", "ngrams": [1, 2]}
    found = matrix(prepare([step], {"one": site(table_of, ["High fever, high pulse", "", None])})["one"])
    assert found[0].tolist() == counted(["high", "fever", "high", "pulse", "high fever", "fever high", "high pulse"])
    assert found[1].tolist() == [0] * 16
    assert np.isnan(found[2]).all()


def test_counts_are_capped_and_texts_do_not_leak_into_each_other(table_of: Any, prepare: Any) -> None:
    made = prepare([{**TEXT, "cap": 3, "ngrams": [2]}], {"one": site(table_of, ["aaaaaaaaaa", "b", "c"])})["one"]
    assert matrix(made).max() == 3
    assert matrix(made)[1:].sum() == 0
    assert "note" not in made.columns
    assert made.schema.columns["text_0"].bounds() == (0, 3)


def test_weights_are_those_of_the_pooled_texts(table_of: Any, prepare: Any) -> None:
    random = np.random.default_rng(0)
    words = ["发热", "咳嗽", "头痛", "fever", "cough", "呼吸困难", "乏力"]

    def notes(n: int) -> list[Any]:
        return [
            " ".join(random.choice(words, random.integers(0, 5))) if random.random() > 0.1 else None for _ in range(n)
        ]

    tables = {"a": site(table_of, notes(70)), "b": site(table_of, []), "c": site(table_of, notes(31))}
    counts = np.concatenate([matrix(t) for t in prepare([TEXT], tables).values()])
    made = prepare([TEXT, {"step": "tf_idf", "columns": "text", "dims": 16}], tables)
    present = ~np.isnan(counts[:, 0])
    expected = TfidfTransformer().fit_transform(counts[present]).toarray()
    found = np.concatenate([matrix(t) for t in made.values()])
    assert np.allclose(found[present], expected, rtol=1e-9, atol=1e-12)
    assert np.isnan(found[~present]).all()


def test_small_buckets_weigh_as_if_nobody_had_them(table_of: Any, prepare: Any) -> None:
    step = [{**TEXT, "ngrams": [2]}, {"step": "tf_idf", "columns": "text", "dims": 16}]
    notes = ["ab"] * 30 + ["abxy"] * 2 + [""] * 30
    made = matrix(prepare(step, {"a": site(table_of, notes)}, 5)["a"])
    rare, usual = np.log(63 / 1) + 1, np.log(63 / 33) + 1
    row = np.zeros(16)
    for gram, weight in {"ab": usual, "bx": rare, "xy": rare}.items():
        row[bucket(gram, 16)] += weight
    assert len({bucket(gram, 16) for gram in ("ab", "bx", "xy")}) == 3
    assert np.allclose(made[30], row / np.linalg.norm(row))


@pytest.mark.parametrize("wrong", [{"ngrams": [0]}, {"ngrams": [2, 2]}, {"ngrams": []}, {"dims": 1}, {"column": "k"}])
def test_recipes_that_cannot_work_are_refused(table_of: Any, prepare: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        prepare([{**TEXT, **wrong}], {"a": site(table_of, ["x"])})
