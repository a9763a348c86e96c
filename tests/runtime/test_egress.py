"""The egress gate: nothing leaves but what was declared, allowed, and durably written down first."""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from atoll.contract.capabilities import Capabilities
from atoll.contract.errors import AtollError, DisclosureError, IntegrityError, PolicyError, ProtocolError
from atoll.contract.program import Handler
from atoll.contract.protection import Choice, Terms
from atoll.contract.rounds import Field, TaskId, count, opaque, real
from atoll.contract.wire import body_parts, canonical_json
from atoll.crypto.identity import Identity, verify
from atoll.crypto.session import Session
from atoll.ledger.entry import verify_entry
from atoll.runtime.budget import Budget, Charge
from atoll.runtime.egress import Cost, EgressGate, Request, body_digest
from atoll.runtime.journal import Journal
from atoll.runtime.party import Own
from atoll.runtime.policy import Policy

IDENTITY = Identity.generate("north")
TASK = TaskId("0" * 32, 3, 0, "reply", "north")


class Doubled:
    """A stand-in for a protection: what leaves is not what was given."""

    name = "doubled"
    reveals = True
    attempts = False
    capabilities = Capabilities("doubled")

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def answer(self, step: str, party: Any, arrays: dict[str, Any], fields: Any) -> dict[str, Any]:
        assert step == "reply"
        self.seen.append({name: array.copy() for name, array in arrays.items()})
        return {name: array * 2 for name, array in arrays.items()}


class Plain(Doubled):
    name = "plain"

    def answer(self, step: str, party: Any, arrays: dict[str, Any], fields: Any) -> dict[str, Any]:
        return arrays


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal(tmp_path / "journal.db", "north", IDENTITY.public, IDENTITY.sign)
    yield made
    made.close()


def request(fields: dict[str, Field], groups: str = "", reduce: str = "sum", task: TaskId = TASK) -> Request:
    handler = Handler(lambda *_: {}, reduce, frozenset(groups.split()))
    return Request(task, "p", "moments", handler, fields, "plan-hash", "roster-hash")


def release(journal: Journal, asked: Request, reply: Any, policy: Policy | None = None, **more: Any) -> Any:
    roster = {"north": IDENTITY.public}
    terms = Terms(TASK.run, TASK.round, TASK.attempt, roster, "roster-hash", 1, Choice(sum="plain"))
    party = Own("north", terms, Session(Session.fresh()), {}, {}, IDENTITY.sign, policy or Policy())
    cost = Cost(Charge(TASK.run, TASK.round, "d", math.inf, Budget(exact_releases=None), ""))
    values = {"protection": Plain(), "party": party, "cost": cost, "state": {}, **more}
    return EgressGate(policy or Policy(), journal).release(asked, reply, **values)


def nothing_left(journal: Journal, asked: Request, reply: Any, kind: type[AtollError], **more: Any) -> AtollError:
    """The release is refused, and the journal is as it was."""
    before, head = _contents(journal), journal.chain.head
    with pytest.raises(kind) as error:
        release(journal, asked, reply, **{"state": {"w": np.ones(1)}, **more})
    assert _contents(journal) == before and journal.chain.head == head
    _, kept, state = journal.begin(str(asked.task), asked.task.run, asked.program)
    assert kept is None and state == {}
    return error.value


def _contents(journal: Journal) -> list[Any]:
    db = sqlite3.connect(journal._path)
    rows = [db.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in ("ledger", "release", "state")]
    db.close()
    return rows


# ---------------------------------------------------------------- what leaves


def test_a_release_is_what_was_declared_and_is_written_down(journal: Journal) -> None:
    fields = {"x": real((2, 3), bound=10), "n": count(bound=1000)}
    message = release(journal, request(fields), {"x": np.arange(6).reshape(2, 3), "n": 40}, state={"w": np.ones(2)})
    assert list(message.arrays) == ["x", "n"] and message.arrays["x"].dtype == "<f8" and message.arrays["n"] == 40
    entry = message.meta["entry"]
    verify_entry(entry, IDENTITY.public, verify)
    assert message.meta["re"] == str(TASK) and entry == journal.entry(1)
    assert entry["body"] == {
        **TASK.to_json(), "program": "p", "handler": "moments", "reduce": "sum", "protection": "plain",
        "plan": "plan-hash", "roster": "roster-hash", "fields": [["x", "<f8", [2, 3]], ["n", "<i8", []]], "bytes": 56,
        "clipped": 0, "epsilon": None, "digest": entry["body"]["digest"], "question": "",
    }  # fmt: skip
    _, kept, state = journal.begin(str(TASK), TASK.run, "p")
    assert kept is not None and np.array_equal(kept.arrays["x"], message.arrays["x"])
    assert state["w"].tolist() == [1, 1]


def test_the_entry_commits_to_what_leaves_not_to_what_was_given(journal: Journal) -> None:
    protection = Doubled()
    message = release(journal, request({"x": real(3)}), {"x": [1.0, 2.0, 3.0]}, protection=protection)
    assert message.arrays["x"].tolist() == [2, 4, 6] and protection.seen[0]["x"].tolist() == [1, 2, 3]
    specs, parts = body_parts(message.arrays)
    digest = body_digest(specs, hashlib.sha256(b"".join(parts)).digest())
    body = message.meta["entry"]["body"]
    assert (body["digest"], body["protection"]) == (digest, "doubled")
    text = b"atoll release 1\0" + canonical_json([["x", "<f8", [3]]]) + hashlib.sha256(np.array([2.0, 4, 6])).digest()
    assert digest == hashlib.sha256(text).hexdigest()


def test_the_digest_covers_names_dtypes_and_shapes() -> None:
    data = hashlib.sha256(bytes(16)).digest()
    specs = [[["x", "<f8", [2]]], [["y", "<f8", [2]]], [["x", "<i8", [2]]], [["x", "<f8", [2, 1]]], []]
    assert len({body_digest(spec, data) for spec in specs}) == 5


def test_no_data_value_stands_in_the_ledger(journal: Journal) -> None:
    release(journal, request({"x": real()}), {"x": 8675309.125})
    assert "8675309" not in json.dumps(journal.entry(1))


# ---------------------------------------------------------------- what does not


@pytest.mark.parametrize(
    ("reply", "field"),
    [
        ({}, "n, x"),
        ({"x": 1.0}, "n"),
        ({"n": 1}, "x"),
        ({"x": 1.0, "n": 1, "m": [65]}, "m"),
        ({"X": 1.0, "n": 1}, "X, x"),
    ],
)
def test_missing_or_additional_fields(journal: Journal, reply: dict[str, Any], field: str) -> None:
    error = nothing_left(journal, request({"x": real(), "n": count()}), reply, ProtocolError)
    assert (error.code, error.field) == ("reply.fields", field)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ([1.0, 2.0], "reply.shape"), (1.0, "reply.shape"), (np.ones((3, 1)), "reply.shape"),
        (np.ones(4), "reply.shape"),
        (["a", "b", "c"], "reply.dtype"), (np.ones(3, complex), "reply.dtype"), ([None] * 3, "reply.dtype"),
        ([[1], [1, 2], []], "reply.shape"), (np.array(["2020-01-01"] * 3, "M8[D]"), "reply.dtype"),
    ],
)  # fmt: skip
def test_wrong_shapes_and_dtypes(journal: Journal, value: Any, code: str) -> None:
    error = nothing_left(journal, request({"x": real(3)}), {"x": value}, ProtocolError)
    assert (error.code, error.field) == (code, "x")


def test_reals_are_not_released_as_counts(journal: Journal) -> None:
    assert nothing_left(journal, request({"n": count()}), {"n": 3.5}, ProtocolError).code == "reply.dtype"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bound", [None, 5.0])
def test_nan_and_infinity_are_never_summed(journal: Journal, bad: float, bound: float | None) -> None:
    for reduce in ("sum", "stream"):
        asked = request({"x": real((2, 2), bound=bound)}, reduce=reduce)
        error = nothing_left(journal, asked, {"x": [[1, 2], [bad, 3]]}, ProtocolError)
        assert (error.code, error.field) == ("reply.not-finite", "x") and error.remedy


def test_an_undefined_metric_may_be_told(journal: Journal) -> None:
    asked = request({"auc": real(2, bound=1.0)}, reduce="gather")
    message = release(journal, asked, {"auc": [np.nan, 0.5]})
    assert np.isnan(message.arrays["auc"][0]) and message.arrays["auc"][1] == 0.5
    other = TaskId("0" * 32, 4, 0, "reply", "north")
    for bad in (np.inf, -np.inf):
        asked = request({"auc": real(2, bound=1.0)}, reduce="gather", task=other)
        assert nothing_left(journal, asked, {"auc": [bad, 0.5]}, ProtocolError).code == "reply.not-finite"


def test_overflow_when_narrowing_is_not_released(journal: Journal) -> None:
    with np.errstate(over="ignore"):
        error = nothing_left(journal, request({"x": real(dtype="<f4")}), {"x": 1e300}, ProtocolError)
    assert error.code == "reply.not-finite"


# ---------------------------------------------------------------- small groups


@pytest.mark.parametrize("smallest", [1, 2, 3, 4])
def test_a_count_of_few_people_does_not_leave(journal: Journal, smallest: int) -> None:
    fields = {"counts": count((2, 3), bound=1000), "x": real()}
    reply = {"counts": [[100, 5, 7], [0, smallest, 9]], "x": 2.0}
    error = nothing_left(journal, request(fields, "counts"), reply, DisclosureError)
    assert (error.code, error.field) == ("disclosure.small-group", "counts")
    text = json.dumps(error.public())
    assert not any(str(n) in text for n in (100, 7, 9)) and "min_group_size" in error.remedy


def test_the_policys_own_threshold_counts(journal: Journal) -> None:
    fields, reply = {"counts": count(2)}, {"counts": [5, 10]}
    for size, left in ((11, False), (6, False), (5, True)):
        if left:
            release(journal, request(fields, "counts"), reply, Policy(min_group_size=size))
        else:
            nothing_left(journal, request(fields, "counts"), reply, DisclosureError, policy=Policy(min_group_size=size))


def test_only_what_counts_people_is_a_group(journal: Journal) -> None:
    fields = {"counts": count(2), "rounds": count(2), "mean": real(2)}
    message = release(journal, request(fields, "counts"), {"counts": [0, 5], "rounds": [1, 2], "mean": [1.0, 0.5]})
    assert message.arrays["counts"].tolist() == [0, 5]


def test_groups_given_as_reals_are_groups_too(journal: Journal) -> None:
    error = nothing_left(journal, request({"c": real(2)}, "c"), {"c": [100.0, 4.0]}, DisclosureError)
    assert error.code == "disclosure.small-group"


def test_a_group_cannot_be_disguised_by_its_bound(journal: Journal) -> None:
    """The check comes before clipping: a bound below the threshold does not turn 3 into something else."""
    nothing_left(journal, request({"c": count(bound=0)}, "c"), {"c": 3}, DisclosureError)


# ---------------------------------------------------------------- clipping


def test_everything_beyond_its_bound_is_clipped_and_counted(journal: Journal) -> None:
    fields = {"x": real(4, bound=2.5), "n": count(3, bound=10), "free": real(2), "edge": real(2, bound=1.0)}
    reply = {"x": [2.5, -2.6, 1e300, 0], "n": [10, 11, -11], "free": [1e300, -1e300], "edge": [1.0, -1.0]}
    message = release(journal, request(fields), reply)
    assert message.arrays["x"].tolist() == [2.5, -2.5, 2.5, 0] and message.arrays["n"].tolist() == [10, 10, -10]
    assert message.arrays["free"].tolist() == [1e300, -1e300] and message.arrays["edge"].tolist() == [1, -1]
    assert message.meta["entry"]["body"]["clipped"] == 4
    assert reply["x"][1] == -2.6  # what the handler keeps is its own


def test_the_protection_sees_only_what_is_within_bounds(journal: Journal) -> None:
    protection = Doubled()
    release(journal, request({"x": real(2, bound=1.0)}), {"x": [5.0, -5.0]}, protection=protection)
    assert protection.seen[0]["x"].tolist() == [1, -1]


def test_the_least_integer_is_clipped_too(journal: Journal) -> None:
    """Its absolute value is not representable, so that taking it would let it through."""
    for number, dtype in enumerate(("<i8", "<i4", "<i2", "|i1")):
        least = np.array([np.iinfo(dtype).min, 3], dtype)
        task = TaskId("0" * 32, number, 0, "reply", "north")
        message = release(journal, request({"n": Field(dtype, (2,), 10, 1)}, task=task), {"n": least})
        assert message.arrays["n"].tolist() == [-10, 3] and message.meta["entry"]["body"]["clipped"] == 1


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["<f8", "<f4", "<i8", "<i4", "<i2"]).flatmap(
        lambda dtype: npst.arrays(
            dtype, 5, elements={"allow_nan": False, "allow_infinity": False} if dtype[1] == "f" else None
        )
    ),
    st.integers(0, 2**15),
)
def test_no_element_beyond_its_bound_leaves(array: Any, bound: int) -> None:
    journal = Journal(":memory:", "north", IDENTITY.public, IDENTITY.sign, durable=False)
    message = release(journal, request({"x": Field(array.dtype.str, (5,), bound, 1)}), {"x": array})
    left = [float(value) for value in message.arrays["x"]]
    assert all(-bound <= value <= bound for value in left)
    inside = [-bound <= float(value) <= bound for value in array]
    assert message.meta["entry"]["body"]["clipped"] == inside.count(False)
    assert all(a == b for a, b, keep in zip(array.tolist(), message.arrays["x"].tolist(), inside, strict=True) if keep)
    journal.close()


def test_bytes_are_left_alone(journal: Journal) -> None:
    sealed = np.arange(256, dtype="|u1")
    message = release(journal, request({"e": opaque(1000)}), {"e": sealed})
    assert np.array_equal(message.arrays["e"], sealed) and message.meta["entry"]["body"]["clipped"] == 0


# ---------------------------------------------------------------- size, and the journal


def test_a_release_larger_than_the_policy_allows(journal: Journal) -> None:
    fields, reply = {"x": real(101)}, {"x": np.zeros(101)}
    error = nothing_left(journal, request(fields), reply, PolicyError, policy=Policy(max_message_bytes=807))
    assert (error.code, error.field) == ("policy.too-large", "max_message_bytes")
    release(journal, request(fields), reply, Policy(max_message_bytes=808))


def test_an_open_ended_field_has_a_limit(journal: Journal) -> None:
    error = nothing_left(journal, request({"e": opaque(10)}), {"e": np.zeros(11, "|u1")}, ProtocolError)
    assert error.code == "reply.shape"


@pytest.mark.parametrize("table", ["ledger", "release", "state"])
def test_if_the_journal_cannot_be_written_nothing_leaves(journal: Journal, table: str) -> None:
    journal._db.execute(f"CREATE TRIGGER no BEFORE INSERT ON {table} BEGIN SELECT raise(ABORT, 'no'); END")
    error = nothing_left(journal, request({"x": real()}), {"x": 1.0}, IntegrityError)
    assert error.code == "ledger.not-written"
    journal._db.execute("DROP TRIGGER no")
    assert release(journal, request({"x": real()}), {"x": 1.0}).arrays["x"] == 1.0


def test_a_journal_that_is_read_only_lets_nothing_out(journal: Journal) -> None:
    journal._db.execute("PRAGMA query_only=ON")
    assert nothing_left(journal, request({"x": real()}), {"x": 1.0}, IntegrityError).code == "ledger.not-written"


def test_a_protection_that_fails_lets_nothing_out(journal: Journal) -> None:
    class Failing(Plain):
        def answer(self, step: str, party: Any, arrays: dict[str, Any], fields: Any) -> dict[str, Any]:
            raise ProtocolError("protection.failed", "no")

    error = nothing_left(journal, request({"x": real()}), {"x": 1.0}, ProtocolError, protection=Failing())
    assert error.code == "protection.failed"
