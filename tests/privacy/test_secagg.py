"""Secure aggregation in a whole federation: the same numbers as plain, whoever drops out, and nothing but the sum."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError, DisclosureError, PolicyError, ProtocolError, TransportError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.protection import OWN
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, count, real
from atoll.contract.wire import Message, decode
from atoll.data.table import Table
from atoll.runtime.policy import Policy
from atoll.transport.base import Endpoint, Progress

COLUMNS: dict[str, dict[str, Any]] = {
    "x": {"range": [-50, 100]},
    "sick": {"dtype": "integer", "values": [0, 1], "role": "label"},
}
STEPS = ("shares", "reply", "agree", "unmask")
STRICT = Policy.sandbox().model_copy(update={"repeats": "refuse", "min_sites": 3})


class Died(BaseException):
    """Stands for the process being killed: nothing catches it."""


@program("test.secagg.sums", needs={"sum"}, offers={"bounded", "resolution"})
class Sums:
    """Rounds of sums, each depending on the one before; sites count their calls in their state."""

    class Params(ProgramParams):
        rounds: int = 2
        only: tuple[str, ...] = ()
        beyond: float = 1.0
        nan_at: str = ""

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Any = None) -> Steps:
        value, seen = 1.0, []
        for _ in range(self.params.rounds):
            fields = {"x": real(bound=1e6, step=1e-6), "n": count(bound=10**6), "calls": count(bound=100)}
            sites = self.params.only or None
            total = yield Round("step", Sum(), fields, {"value": value}, sites=sites)
            value = 1 + float(total["x"]) / 1e6
            seen.append((float(total["x"]), int(total["n"]), int(total["calls"]), total.sites))
        return {"seen": seen}

    @handler("step")
    def step(self, site: SiteView, task: Task) -> Reply:
        site.state["calls"] = calls = site.state.get("calls", np.zeros((), np.int64)) + 1
        x = site.table["x"].sum() * float(task.take("value", ())) * self.params.beyond
        return {"x": np.nan if site.name == self.params.nan_at else x, "n": len(site.table), "calls": calls}


def tables_of(federation: Any, sites: int = 5, rows: int = 40) -> dict[str, Table]:
    random = np.random.default_rng(5)
    made = {}
    for i in range(sites):
        x = random.normal(i % 7, 9, rows).clip(-50, 100)
        made[f"s{i}"] = federation.table({"x": x, "sick": (x + random.normal(0, 9, rows) > i).astype(float)}, COLUMNS)
    return made


def glm(federation: Any, tables: Mapping[str, Table], protection: Any, **more: Any) -> Any:
    params = {"family": "logistic", "target": "sick", "features": ["x"]}
    return federation.plan("horizontal.glm", params, tables, protection=protection, **more)


def sums(federation: Any, tables: Mapping[str, Table], **params: Any) -> Any:
    return federation.plan("test.secagg.sums", params, tables, protection="secagg")


def exact(seen: tuple[float, int, int, tuple[str, ...]], tables: Mapping[str, Table], value: float = 1.0) -> None:
    """The sum is that of the sites it names, to half a step each, and counts are exact."""
    x, n, _, sites = seen
    wanted = sum(float(tables[site]["x"].sum()) * value for site in sites)
    assert abs(x - wanted) <= len(sites) * 0.5e-6 + 1e-9
    assert n == sum(len(tables[site]) for site in sites)


def gone_at(step: str, who: tuple[str, ...], number: int = 1, *, late: bool = False) -> Any:
    """Sites *who* cannot be reached from *step* of round *number* on; late: they do answer that step, too late."""

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        lost = False

        def handle(message: Message, progress: Progress) -> Message:
            nonlocal lost
            at = (message.meta.get("round"), message.meta.get("step"))
            if not lost and name in who and at == (number, step):
                lost = True
                if late:
                    assert endpoint(message, progress).kind == "release"
            if lost:
                raise TransportError("link.lost", "gone", field=name)
            return endpoint(message, progress)

        return handle

    return wrap


def changed_at(step: str, who: str, change: Callable[[Message], Message], number: int = 0) -> Any:
    """What site *who* is sent in *step* of round *number* is changed on its way."""

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def handle(message: Message, progress: Progress) -> Message:
            at = (name, message.meta.get("round"), message.meta.get("step"))
            return endpoint(change(message) if at == (who, number, step) else message, progress)

        return handle

    return wrap


def released(federation: Any, step: str) -> list[str]:
    return [body["site"] for body in federation.releases() if body["step"] == step]


# ---------------------------------------------------------------- the same as plain


@pytest.mark.parametrize("adversary", ["curious", "active"])
def test_it_gives_what_plain_gives(federation: Any, adversary: str) -> None:
    tables = tables_of(federation)
    plain = federation.run(glm(federation, tables, "plain"), tables)["result"]
    hidden = federation.run(glm(federation, tables, {"sum": "secagg", "adversary": adversary}), tables)["result"]
    assert hidden["rows"] == plain["rows"] == 200
    assert np.allclose(hidden["model"].weights, plain["model"].weights, rtol=0, atol=1e-9)


@pytest.mark.parametrize("lost", [1, 2])
@pytest.mark.parametrize("step", STEPS)
def test_sites_that_drop_out_at_any_step(federation: Any, step: str, lost: int) -> None:
    tables = tables_of(federation)
    plan = glm(federation, tables, "secagg", cohort={"min_sites": 3}, run={"deadline_s": 20})
    away = ("s1", "s3")[:lost]
    outcome = federation.run(plan, tables, wrap=gone_at(step, away))["result"]
    left = {name: table for name, table in tables.items() if name not in away}
    alone = federation.run(glm(federation, left, "plain"), left)["result"]
    assert outcome["rows"] == 40 * len(left)
    assert np.allclose(outcome["model"].weights, alone["model"].weights, rtol=1e-6)


@pytest.mark.parametrize("step", STEPS)
def test_too_many_drop_out_and_nothing_is_told(federation: Any, step: str) -> None:
    tables = tables_of(federation)
    plan = sums(federation, tables, rounds=1)
    with pytest.raises(AtollError) as caught:
        federation.run(plan, tables, wrap=gone_at(step, ("s0", "s1", "s3"), 0))
    assert caught.value.code == "secagg.too-few" and caught.value.field == step
    assert caught.value.where["trace"] == federation.run_id
    assert federation.store.rounds(federation.run_id) == []
    opened = released(federation, "unmask")
    assert opened == ([] if step != "unmask" else ["s2", "s4"])  # two shares of each secret; three make one
    assert {journal.status(federation.run_id) for journal in federation.journals.values()} <= {"failed", "running"}
    for journal in federation.journals.values():  # and keys are gone where the end was heard
        if journal.status(federation.run_id) == "failed":
            assert journal.setting(f"session {federation.run_id}") == ""


def test_seventy_sites_on_the_sparse_graph(federation: Any) -> None:
    """One round, dropouts at every step, and the exact sum of those whose vectors arrived."""
    tables = tables_of(federation, sites=70, rows=3)
    lost = {"shares": ("s3", "s60"), "reply": ("s7", "s44", "s9"), "agree": ("s11", "s12"), "unmask": ("s33",)}
    wraps = [gone_at(step, who, 0) for step, who in lost.items()]

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        for one in wraps:
            endpoint = one(name, endpoint)
        return endpoint

    [seen] = federation.run(sums(federation, tables, rounds=1), tables, wrap=wrap)["result"]["seen"]
    assert set(seen[3]) == set(tables) - {*lost["shares"], *lost["reply"]}
    exact(seen, tables)
    assert len(federation.store.rounds(federation.run_id)) == 1
    assert {body["attempt"] for body in federation.releases()} == {0}


def test_a_reply_that_arrives_too_late_stays_out(federation: Any) -> None:
    tables = tables_of(federation)
    [seen] = federation.run(sums(federation, tables, rounds=1), tables, wrap=gone_at("reply", ("s2",), 0, late=True))[
        "result"
    ]["seen"]
    assert seen[3] == ("s0", "s1", "s3", "s4") and sorted(released(federation, "reply")) == sorted(tables)
    exact(seen, tables)
    assert "s2" not in released(federation, "unmask")


def test_ledgers_hold_together_and_say_what_left(federation: Any) -> None:
    tables = tables_of(federation)
    federation.run(sums(federation, tables), tables)
    ledgers = federation.ledgers()
    for name in tables:
        bodies = [entry["body"] for entry in ledgers[name].entries if entry["kind"] == "release"]
        assert [(body["round"], body["step"]) for body in bodies] == [(n, step) for n in (0, 1) for step in STEPS]
        assert {body["protection"] for body in bodies} == {"secagg"} and not ledgers[name].unacknowledged


# ---------------------------------------------------------------- the coordinator dies within a round


def die_at(federation: Any, step: str, number: int, answered: int) -> None:
    """The coordinator dies in *step* of round *number*, once so many sites answered it."""
    request, done = federation.transport.request, 0

    async def dying(site: str, message: Message, *rest: Any, **more: Any) -> Any:
        nonlocal done
        here = (message.meta.get("step"), message.meta.get("round")) == (step, number)
        if here and not answered:
            raise Died
        reply = await request(site, message, *rest, **more)
        done += here
        if here and done >= answered:
            raise Died
        return reply

    federation.transport.request = dying


def resume(federation: Any, run: str) -> Any:
    federation.start_coordinator()
    federation.start_transport()
    return federation.drive(run)["result"]["seen"]


@pytest.mark.parametrize("answered", [0, 2, 5])
@pytest.mark.parametrize("step", STEPS)
def test_a_coordinator_that_dies_within_a_round(federation: Any, step: str, answered: int) -> None:
    """The round is begun anew, from the sites' states before it, and gives the same sum."""
    tables = tables_of(federation)
    plan = sums(federation, tables, rounds=3)
    wanted = federation.run(plan, tables)["result"]["seen"]
    assert [calls for _, _, calls, _ in wanted] == [5, 10, 15]
    federation.build(tables, dict.fromkeys(tables, STRICT))
    run = federation.submit(plan)
    die_at(federation, step, 1, answered)
    with pytest.raises(Died):
        federation.drive(run)
    assert resume(federation, run) == wanted
    attempts = {(body["round"], body["attempt"]) for body in federation.releases()}
    assert attempts <= {(0, 0), (1, 0), (1, 1), (2, 0)} and (1, 1) in attempts
    assert not any(ledger.unacknowledged for name, ledger in federation.ledgers().items() if name == "coordinator")


def test_a_coordinator_that_dies_again_and_again(federation: Any) -> None:
    tables = tables_of(federation, 4)
    plan = sums(federation, tables, rounds=2)
    wanted = federation.run(plan, tables)["result"]["seen"]
    federation.build(tables, dict.fromkeys(tables, STRICT))
    run = federation.submit(plan)
    for step, answered in (("unmask", 3), ("shares", 1), ("agree", 0), ("unmask", 4)):
        die_at(federation, step, 1, answered)
        with pytest.raises(Died):
            federation.drive(run)
        federation.start_coordinator()
        federation.start_transport()
    assert federation.drive(run)["result"]["seen"] == wanted
    assert max(body["attempt"] for body in federation.releases()) == 4


@pytest.mark.parametrize("policy", [Policy.sandbox(), STRICT])
def test_two_sets_of_survivors_of_one_round_are_not_told(federation: Any, policy: Policy) -> None:
    """It dies with a sum in hand, and begins anew without one site: the difference would be that site's share."""
    tables = tables_of(federation)
    federation.build(tables, dict.fromkeys(tables, policy))
    run = federation.submit(sums(federation, tables, rounds=1))
    die_at(federation, "unmask", 0, 5)
    with pytest.raises(Died):
        federation.drive(run)
    federation.start_coordinator()
    federation.wrap = gone_at("reply", ("s4",), 0)
    federation.start_transport()
    with pytest.raises(DisclosureError) as caught:
        federation.drive(run)
    assert caught.value.code == "disclosure.cohort-differencing"
    assert len(released(federation, "unmask")) == 5  # those of the first attempt


def test_the_same_question_is_not_answered_for_a_cohort_less_one(federation: Any) -> None:
    """In another run, too: a site's journal remembers whose sum was told."""
    tables = tables_of(federation)
    plan = sums(federation, tables, rounds=1)
    federation.build(tables, dict.fromkeys(tables, STRICT))
    federation.submit(plan)
    federation.drive()
    federation.submit(plan)
    federation.drive()  # the same sites
    federation.wrap = gone_at("reply", ("s4",), 0)
    federation.start_transport()
    federation.submit(plan)
    with pytest.raises(DisclosureError) as caught:
        federation.drive()
    assert caught.value.code == "disclosure.cohort-differencing"


# ---------------------------------------------------------------- a coordinator that does not keep the protocol


def with_arrays(**changes: Callable[[np.ndarray], np.ndarray]) -> Callable[[Message], Message]:
    def change(message: Message) -> Message:
        arrays = dict(message.arrays)
        for name, act in changes.items():
            arrays[OWN + name] = act(arrays[OWN + name].copy())
        return dataclasses.replace(message, arrays=arrays)

    return change


def flipped(array: np.ndarray) -> np.ndarray:
    array[1][-1] ^= 1
    return array


@pytest.mark.parametrize(
    ("step", "change", "code"),
    [
        ("shares", with_arrays(sessions=flipped), "session.not-signed"),
        ("reply", with_arrays(adverts=flipped), "secagg.signature"),
        ("reply", with_arrays(adverts=lambda rows: rows[::-1].copy()), "secagg.signature"),
        ("reply", with_arrays(sealed=flipped), "envelope.altered"),
        ("reply", with_arrays(sealed=lambda rows: rows[:, :-1].copy()), "secagg.malformed"),
        ("agree", with_arrays(survivors=lambda there: np.array([1, 1, 1, 0, 1], np.uint8)), "secagg.survivors"),
        ("unmask", with_arrays(signatures=flipped), "secagg.signature"),
    ],
)  # fmt: skip
def test_what_is_changed_on_its_way_ends_the_run_at_both_ends(
    federation: Any, step: str, change: Any, code: str
) -> None:
    tables = tables_of(federation)
    with pytest.raises(AtollError) as caught:
        federation.run(sums(federation, tables, rounds=1), tables, wrap=changed_at(step, "s3", change))
    assert (caught.value.code, caught.value.where["site"]) == (code, "s3")
    assert federation.store.run(federation.run_id)["status"] == "failed"
    status, _, note = federation.journals["s3"].run(federation.run_id)
    assert status == "failed" and (code in note or caught.value.remedy in note)
    assert "s3" not in released(federation, step)


def test_another_question_to_one_site_is_refused_by_it(federation: Any) -> None:
    """Narrower bounds, or other numbers, than the others were sent: theirs would be known, and taken off."""

    def narrow(message: Message) -> Message:
        fields = {**message.meta["fields"], "x": ["<f8", [], 0.0, 1e-6, 0]}
        return dataclasses.replace(message, meta={**message.meta, "fields": fields})

    def zeroed(message: Message) -> Message:
        return dataclasses.replace(message, arrays={**message.arrays, "value": np.zeros(())})

    tables = tables_of(federation)
    for change in (narrow, zeroed):
        with pytest.raises(ProtocolError) as caught:
            federation.run(sums(federation, tables, rounds=1), tables, wrap=changed_at("reply", "s3", change))
        assert (caught.value.code, caught.value.where["site"]) == ("task.question", "s3")
        assert released(federation, "agree") == []


def test_another_question_to_all_but_one_is_refused_by_all(federation: Any) -> None:
    """Consistent lies to everybody but one: what they signed is about something else."""

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def handle(message: Message, progress: Progress) -> Message:
            if message.kind == "task" and name != "s3":
                message = dataclasses.replace(message, meta={**message.meta, "question": "0" * 64})
            return endpoint(message, progress)

        return handle

    tables = tables_of(federation)
    with pytest.raises(AtollError) as caught:
        federation.run(sums(federation, tables, rounds=1), tables, wrap=wrap)
    assert caught.value.code in ("task.question", "secagg.signature")
    assert not {"reply", "agree"} & {body["step"] for body in federation.releases()}


def test_a_second_set_of_survivors_in_the_same_attempt(federation: Any) -> None:
    told: list[Message] = []

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def handle(message: Message, progress: Progress) -> Message:
            reply = endpoint(message, progress)
            if message.meta.get("step") == "agree":
                there = np.array([1, 1, 1, 1, 0], np.uint8)
                other = dataclasses.replace(message, arrays={OWN + "survivors": there})
                told.append(endpoint(other, progress))
                assert endpoint(message, progress).meta["entry"] == reply.meta["entry"]  # but the same may be repeated
            return reply

        return handle

    tables = tables_of(federation)
    federation.run(sums(federation, tables, rounds=1), tables, wrap=wrap)
    assert [(reply.kind, reply.meta["code"]) for reply in told] == [("failure", "task.changed")] * 5
    assert sorted(released(federation, "agree")) == sorted(tables)


def test_a_session_key_of_an_earlier_run(federation: Any) -> None:
    """The coordinator gives the other sites a key that s2 had signed in a run before."""
    old: list[str] = []

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def handle(message: Message, progress: Progress) -> Message:
            reply = endpoint(message, progress)
            if (name, reply.kind) != ("s2", "opened"):
                return reply
            old.append(reply.meta["session"])
            return dataclasses.replace(reply, meta={**reply.meta, "session": old[0]})

        return handle

    tables = tables_of(federation)
    plan = sums(federation, tables, rounds=1)
    federation.run(plan, tables, wrap=wrap)
    federation.submit(plan)
    with pytest.raises(AtollError) as caught:
        federation.drive()
    assert caught.value.code == "session.not-signed" and caught.value.field == "s2"
    assert len(set(old)) == 2


@pytest.mark.parametrize("session", [None, "", "zz", "00" * 95, 7])
def test_a_site_that_opens_without_a_session_key(federation: Any, session: Any) -> None:
    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def handle(message: Message, progress: Progress) -> Message:
            reply = endpoint(message, progress)
            bad = name == "s2" and reply.kind == "opened"
            return dataclasses.replace(reply, meta={**reply.meta, "session": session}) if bad else reply

        return handle

    tables = tables_of(federation, 3)
    with pytest.raises(ProtocolError) as caught:
        federation.run(sums(federation, tables), tables, wrap=wrap)
    assert caught.value.code == "session.malformed"


# ---------------------------------------------------------------- too few sites, and bad values


def test_a_sites_policy_wants_more_survivors(federation: Any) -> None:
    tables = tables_of(federation)
    wary = Policy.sandbox().model_copy(update={"min_sites": 4})
    plan = sums(federation, tables, rounds=1)
    with pytest.raises(PolicyError) as caught:
        federation.run(plan, tables, {"s4": wary}, wrap=gone_at("reply", ("s0", "s1"), 0))
    assert (caught.value.code, caught.value.where["site"]) == ("policy.too-few-survivors", "s4")
    assert released(federation, "unmask") == []
    [seen] = federation.run(plan, tables, {"s4": wary}, wrap=gone_at("reply", ("s0",), 0))["result"]["seen"]
    exact(seen, tables)


def test_a_round_of_fewer_sites_than_the_threshold(federation: Any) -> None:
    """A program that asks two of five: below the threshold of the roster, whatever it is for."""
    tables = tables_of(federation)
    with pytest.raises(TransportError) as caught:
        federation.run(sums(federation, tables, only=("s0", "s1")), tables)
    assert caught.value.code == "secagg.too-few"
    assert federation.releases() == []
    seen = federation.run(sums(federation, tables, only=("s0", "s1", "s3")), tables)["result"]["seen"]
    assert seen[0][3] == ("s0", "s1", "s3")
    exact(seen[0], tables)


def test_a_plan_for_more_sites_than_there_are(federation: Any) -> None:
    tables = tables_of(federation, 4)
    plan = federation.plan("test.secagg.sums", {}, tables, protection="secagg", cohort={"min_sites": 5})
    with pytest.raises(AtollError) as caught:
        federation.run(plan, tables)
    assert caught.value.code == "cohort.too-small"


def test_values_beyond_their_bounds_are_clipped_and_counted_at_the_site_alone(
    federation: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """How many were clipped is a number about one site: it is in its log, and not in what leaves."""
    tables = tables_of(federation, 3)
    with caplog.at_level(logging.WARNING, "atoll.site"):
        [seen] = federation.run(sums(federation, tables, rounds=1, beyond=1e9), tables)["result"]["seen"]
    assert abs(seen[0]) in (1e6, 3e6)
    assert [name for name in tables if f"{name}: 1 values" in caplog.text] == list(tables)
    replies = [body for body in federation.releases() if body["step"] == "reply"]
    assert len(replies) == 3 and {body["clipped"] for body in replies} == {None}


def test_nan_at_one_site_ends_the_run_and_tells_no_value(federation: Any) -> None:
    tables = tables_of(federation)
    with pytest.raises(ProtocolError) as caught:
        federation.run(sums(federation, tables, rounds=1, nan_at="s1"), tables)
    assert (caught.value.code, caught.value.field, caught.value.where["site"]) == ("reply.not-finite", "x", "s1")
    assert not {"agree", "unmask"} & {body["step"] for body in federation.releases()}


# ---------------------------------------------------------------- what the coordinator has


def test_vectors_differ_from_run_to_run(federation: Any) -> None:
    """The same plan and tables again: no masked element is the same, and no key, share or signature."""
    tables = tables_of(federation, 4)
    plan = sums(federation, tables, rounds=1)
    federation.build(tables)
    runs: list[dict[tuple[str, str, str], np.ndarray]] = []
    for _ in range(2):
        federation.wire.clear()
        federation.submit(plan)
        federation.drive()
        replies = [(name, decode(data)) for name, way, data in federation.wire if way == "from"]
        sent = {
            (n, m.meta["entry"]["body"]["step"], k): a
            for n, m in replies
            if m.kind == "release"
            for k, a in m.arrays.items()
        }
        runs.append(sent)
    first, second = runs
    assert first.keys() == second.keys() and len(first) == 4 * 6
    for key, array in first.items():
        assert not np.array_equal(array, second[key]), key
        if key[2].startswith("ring"):
            assert (array != second[key]).all()
