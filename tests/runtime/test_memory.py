"""Differencing: the same exact query over nearly the same rows is refused, by what the journal remembers."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.contract.errors import AtollError, DisclosureError, ProtocolError
from atoll.contract.schema import Column, TableSchema
from atoll.contract.wire import body_parts, canonical_json
from atoll.crypto.identity import Identity
from atoll.data.sketch import CELLS, sketch
from atoll.data.table import Table
from atoll.runtime.journal import Journal
from atoll.runtime.memory import Query, Question, period_of, question_digest
from atoll.runtime.policy import Policy

COLUMNS: dict[str, dict[str, Any]] = {
    "id": {"dtype": "text", "role": "entity"},
    "x": {"range": [0, 100]},
    "ward": {"dtype": "text", "values": ["north", "south"]},
}
POLICY = Policy(
    programs=("*",), purposes=("*",), protections=("*",), min_sites=1, approval="automatic", roster="automatic"
)


def people(federation: Any, first: int, last: int, **changed: float) -> Table:
    ids = [f"p{i}" for i in range(first, last)]
    x = [changed.get(name, i % 90) for i, name in enumerate(ids, first)]
    return federation.table({"id": ids, "x": x, "ward": ["north", "south"] * (len(ids) // 2)}, COLUMNS)


@given(
    rows=st.lists(st.integers(0, 2**64 - 1), max_size=60),
    more=st.lists(st.integers(0, 2**64 - 1), max_size=20, unique=True),
)
def test_a_sketch_never_counts_more_than_the_difference(rows: list[int], more: list[int]) -> None:
    a, b = np.array(rows, np.uint64), np.array(rows + more, np.uint64)
    changed = int((sketch(a) != sketch(b)).sum())
    assert changed <= len(more)
    assert (changed > 0) == bool(more)
    assert np.array_equal(sketch(a), sketch(a[::-1]))


def test_a_sketch_sees_nearly_all_of_a_small_difference() -> None:
    random = np.random.default_rng(3)
    seen = []
    for _ in range(200):
        rows = random.integers(0, 2**63, 5000, dtype=np.uint64)
        seen.append(int((sketch(rows) != sketch(rows[:-10])).sum()))
    assert np.mean(seen) > 9.8
    assert CELLS == 512


@pytest.mark.parametrize("names", [(), ("x",), ("n",), ("x", "n")])
def test_a_question_is_all_that_is_asked_in_one_spelling(names: tuple[str, ...]) -> None:
    """The bytes that are hashed stand in ledgers: they do not change."""
    meta = {"program": "p", "name": "h", "params": {"b": 1, "a": [0.5]}, "view": {}, "fields": {}, "round": 3}
    arrays = {"x": np.arange(3.0), "n": np.array(7)}
    some = {name: arrays[name] for name in names}
    specs, parts = body_parts(some)
    asked = {name: value for name, value in meta.items() if name != "round"}
    spelled = b"atoll question 1\0" + canonical_json([asked, specs]) + b"".join(parts)
    question = Question(meta, arrays)
    for _ in range(2):
        assert question.digest(names) == hashlib.sha256(spelled).hexdigest() == question_digest(meta, some)


def test_rows_are_who_they_are(federation: Any) -> None:
    table = people(federation, 0, 40)
    assert np.array_equal(table.ids, people(federation, 0, 40, p3=99.0).ids)  # the entity says who
    nameless = Table(
        TableSchema(name="t", columns={n: Column(**c) for n, c in COLUMNS.items() if n != "id"}),
        {n: v for n, v in table.columns.items() if n != "id"},
    )
    assert len(set(nameless.ids.tolist())) == 40
    assert np.array_equal(nameless.rows(np.arange(40) > 3).ids, nameless.ids[4:])


def ask(federation: Any, tables: dict[str, Table], again: bool = True, **more: Any) -> Any:
    program = more.pop("program", "statistics.describe")
    plan = federation.plan(program, more.pop("params", {"columns": ["x"], "bins": 4}), tables, **more)
    if not again:
        return federation.run(plan, tables, dict.fromkeys(tables, POLICY))
    for name, site in federation.sites.items():
        site._data = federation._reader(name, tables[name], federation.home)
    federation.submit(plan)
    return federation.drive()


def test_a_differencing_pair_of_queries_is_refused(federation: Any) -> None:
    others = {"b": people(federation, 100, 180), "c": people(federation, 200, 280)}
    ask(federation, {"a": people(federation, 0, 80), **others}, again=False)
    ask(federation, {"a": people(federation, 0, 80), **others})  # the same once more tells nothing new
    with pytest.raises(AtollError) as caught:
        ask(federation, {"a": people(federation, 0, 78), **others})
    assert (caught.value.code, caught.value.where["site"]) == ("disclosure.differencing", "a")
    with pytest.raises(AtollError):
        ask(federation, {"a": people(federation, 4, 80), **others}, purpose="another")  # nor by another plan
    ask(federation, {"a": people(federation, 20, 80), **others})
    with pytest.raises(AtollError):  # nor by parameters that change nothing
        ask(federation, {"a": people(federation, 0, 78), **others}, params={"columns": ["x"], "bins": 5})
    ask(
        federation,
        {"a": people(federation, 0, 78), **others},
        program="statistics.frequency",
        params={"columns": ["x"]},
    )


def test_nothing_is_remembered_of_a_release_that_was_refused(federation: Any) -> None:
    ask(federation, {"a": people(federation, 0, 80)}, again=False, cohort={"min_sites": 1})
    before = federation.journals["a"]._db.execute("SELECT count(*) FROM asked").fetchone()[0]
    with pytest.raises(AtollError):
        ask(federation, {"a": people(federation, 0, 78)}, cohort={"min_sites": 1})
    assert federation.journals["a"]._db.execute("SELECT count(*) FROM asked").fetchone()[0] == before


def test_the_operator_may_allow_repeats(federation: Any) -> None:
    tables = {"a": people(federation, 0, 80)}
    plan = federation.plan("statistics.describe", {"columns": ["x"], "bins": 4}, tables)
    federation.run(plan, tables, {"a": POLICY.model_copy(update={"repeats": "allow"})})
    ask(federation, {"a": people(federation, 0, 78)})


def query(rows: np.ndarray, cohort: str = "") -> Query:
    return Query("k", np.stack([sketch(rows), sketch(rows[:0])]), frozenset(cohort.split()), 5)


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [("a b c d", "a b c", True), ("a b c", "a b c", False), ("a b c", "a b c d e", False), ("", "a b c", False)],
)
def test_a_cohort_that_differs_by_one_site_under_a_protection(first: str, second: str, refused: bool) -> None:
    rows = np.arange(50, dtype=np.uint64)
    asked, before = query(rows, second), query(rows, first)
    if refused:
        with pytest.raises(DisclosureError) as caught:
            asked.check(before.rows.tobytes(), before.cohort)
        assert caught.value.code == "disclosure.cohort-differencing"
    else:
        asked.check(before.rows.tobytes(), before.cohort)


def test_the_memory_outlives_the_process(tmp_path: Any) -> None:
    identity = Identity.generate("a")
    rows = np.arange(100, dtype=np.uint64)

    def store(journal: Journal, task: str, asked: Query) -> None:
        journal.store_release(task, "r", "p", {}, {}, None, (), asked)

    journal = Journal(tmp_path / "j.db", "a", identity.public, identity.sign)
    store(journal, "1", query(rows))
    journal.close()
    journal = Journal(tmp_path / "j.db", "a", identity.public, identity.sign)
    with pytest.raises(DisclosureError):
        store(journal, "2", query(rows[3:]))
    store(journal, "3", query(rows[30:]))
    journal.close()


def test_a_closed_period_is_answered_again_over_the_very_same_rows_only() -> None:
    ids = np.arange(1000, dtype=np.uint64)
    rows, more = (np.stack([sketch(ids[:n]), sketch(ids[:0])]) for n in (900, 1000))
    for closed in (True, False):
        query = Query("day 1", more, frozenset(), 5, closed=closed)
        query.check(more.tobytes(), frozenset())
        if not closed:
            query.check(rows.tobytes(), frozenset())  # a hundred rows more
            continue
        with pytest.raises(DisclosureError) as caught:
            query.check(rows.tobytes(), frozenset())
        assert caught.value.code == "disclosure.closed-period"


def test_only_what_a_handler_names_makes_a_question_another_period() -> None:
    """Else any array that it ignores would make every question a new one."""
    day = {"day": np.array(7.0), "": np.array(1.0)}
    assert period_of("", day) == ""
    assert period_of("day", day) == period_of("day", {"day": np.array(7, np.int64)}) != ""
    for told in ({}, {"day": np.zeros(2)}, {"day": np.array(np.nan)}):
        with pytest.raises(ProtocolError):
            period_of("day", told)
