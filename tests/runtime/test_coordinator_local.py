"""The driver and the sites in one process: reductions, dropouts, failures, crashes, and what may be seen of them.

The programs here are registered under ``test.local.*``; they exist only in this file.
"""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError, PolicyError, ProtocolError, TransportError
from atoll.contract.program import REGISTRY, Cohort, Handler, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Gather, Reply, Round, Steps, Stream, Sum, Task, count, real
from atoll.contract.wire import Message, decode, encode_bytes
from atoll.crypto.identity import Identity
from atoll.data.site_data import SiteData
from atoll.data.table import Table
from atoll.runtime.journal import Journal
from atoll.runtime.policy import Policy
from atoll.runtime.site import Site
from atoll.transport.base import Endpoint, Progress

CALLS: list[tuple[str, str, int]] = []
"""Every handler call: (handler, site, round)."""
HELD = threading.Event()
"""Set to let hanging handlers go on."""
COLUMNS = {"x": {"range": [0, 1000]}}
PATIENCE = {"deadline_s": 60}


class Died(BaseException):
    """Stands for the process being killed: nothing catches it."""


@program("test.local.sums", needs={"sum"}, offers={"bounded", "resolution"})
class Sums:
    """A few rounds of sums, each depending on the one before; sites keep state."""

    class Params(ProgramParams):
        rounds: int = 4

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Any = None) -> Steps:
        value, seen = 1.0, []
        for _ in range(self.params.rounds):
            fields = {"x": real(bound=1e9, step=1e-9), "n": count(bound=10**6), "calls": count(bound=100)}
            total = yield Round("step", Sum(), fields, {"value": value})
            value = float(total["x"]) / float(total["n"])
            seen.append({"value": value, "calls": int(total["calls"]), "sites": total.sites})
        return {"seen": seen}

    @handler("step")
    def step(self, site: SiteView, task: Task) -> Reply:
        CALLS.append(("step", site.name, task.id.round))
        calls = site.state.get("calls", np.zeros((), np.int64)) + 1
        site.state["calls"] = calls
        return {
            "x": (np.sqrt(site.table["x"]) * float(task.take("value", ()))).sum(),
            "n": len(site.table),
            "calls": calls,
        }


@program("test.local.gather", needs={"gather"})
class Gathering:
    """Everybody's own mean, and extras for single sites."""

    class Params(ProgramParams):
        pass

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Any = None) -> Steps:
        extras = {site: {"extra": float(i)} for i, site in enumerate(cohort.sites)}
        told = yield Round("own", Gather(), {"mean": real(), "extra": real()}, send_to=extras)
        some = yield Round("own", Gather(), {"mean": real(), "extra": real()}, send_to=extras, sites=cohort.sites[1:])
        return {"all": {s: {k: float(v) for k, v in told[s].items()} for s in told}, "some": some.sites}

    @handler("own", reduce="gather")
    def own(self, site: SiteView, task: Task) -> Reply:
        CALLS.append(("own", site.name, task.id.round))
        return {"mean": site.table["x"].mean(), "extra": task.take("extra", ())}


@program("test.local.stream", needs={"stream"})
class Streaming:
    """Asynchronous: whoever answers is asked again, until so many answers came; then all that is in flight is taken."""

    class Params(ProgramParams):
        answers: int = 9

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Any = None) -> Steps:
        value, order, busy = 1.0, [], set(cohort.sites)
        ask: tuple[str, ...] = cohort.sites
        while busy:
            arrived = yield Round("reply", Stream(), {"x": real()}, {"value": value}, sites=ask)
            order.append((arrived.site, arrived.asked_round))
            value = 0.5 * value + 0.5 * float(arrived.values["x"])
            more = len(order) + len(busy) <= self.params.answers
            ask = (arrived.site,) if more else ()
            if not more:
                busy.discard(arrived.site)
        return {"order": order, "value": value}

    @handler("reply", reduce="stream")
    def reply(self, site: SiteView, task: Task) -> Reply:
        CALLS.append(("reply", site.name, task.id.round))
        return {"x": site.table["x"].mean() / float(task.take("value", ()))}


@program("test.local.race", needs={"stream"})
class Race:
    """Five answers, from whoever gives them; the named sites run out of memory."""

    class Params(ProgramParams):
        broken: tuple[str, ...] = ()

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Any = None) -> Steps:
        order: list[str] = []
        ask: tuple[str, ...] = cohort.sites
        for _ in range(5):
            arrived = yield Round("lap", Stream(), {"n": count()}, sites=ask)
            order.append(arrived.site)
            ask = (arrived.site,)
        return {"order": order}

    @handler("lap", reduce="stream")
    def lap(self, site: SiteView, task: Task) -> Reply:
        if site.name in self.params.broken:
            raise MemoryError
        return {"n": 1}


@program("test.local.shy", needs={"gather"})
class Shy:
    """Sites that withhold a reply, or fail otherwise."""

    class Params(ProgramParams):
        optional: bool
        code: str

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Any = None) -> Steps:
        told = yield Round("tell", Gather(), {"n": count()}, optional=self.params.optional)
        return {"told": told.sites}

    @handler("tell", reduce="gather")
    def tell(self, site: SiteView, task: Task) -> Reply:
        if site.name == "s1":
            raise PolicyError(self.params.code, "not told", remedy="ask the site's operator")
        return {"n": 1}


@program("test.local.trouble", needs={"sum"})
class Trouble:
    """A round that goes well, then one in which the named sites are in trouble, then another."""

    class Params(ProgramParams):
        sites: tuple[str, ...]
        how: str

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Any = None) -> Steps:
        took = []
        for _ in range(3):
            total = yield Round("work", Sum(), {"n": count(bound=10**6)})
            took.append((total.sites, int(total["n"])))
        return {"took": took}

    @handler("work")
    def work(self, site: SiteView, task: Task) -> Reply:
        CALLS.append(("work", site.name, task.id.round))
        if task.id.round == 1 and site.name in self.params.sites:
            if self.params.how == "memory":
                raise MemoryError
            if self.params.how == "hang":
                HELD.wait(120)
            if self.params.how == "slow":
                for i in range(15):
                    time.sleep(0.2)
                    site.progress(i, 15)
        return {"n": len(site.table)}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    CALLS.clear()
    HELD.clear()
    yield
    HELD.set()


def tables_of(federation: Any, sizes: tuple[int, ...] = (20, 7, 33)) -> dict[str, Table]:
    random = np.random.default_rng(4)
    return {f"s{i}": federation.table({"x": random.uniform(0, 1000, n)}, COLUMNS) for i, n in enumerate(sizes)}


def plan_of(federation: Any, name: str, params: dict[str, Any] | None = None, **more: Any) -> Any:
    return federation.plan(
        f"test.local.{name}", params or {}, tables_of(federation), run=more.pop("run", PATIENCE), **more
    )


def die_when(test: Callable[[dict[str, Any]], bool]) -> Callable[[dict[str, Any]], None]:
    def listen(event: dict[str, Any]) -> None:
        if test(event):
            raise Died

    return listen


# ---------------------------------------------------------------- reductions


def test_sums_say_who_took_part_and_sites_keep_their_state(federation: Any) -> None:
    tables = tables_of(federation)
    outcome = federation.run(plan_of(federation, "sums"), tables)
    roots = np.concatenate([np.sqrt(t["x"]) for t in tables.values()])
    value = 1.0
    for number, seen in enumerate(outcome["result"]["seen"], 1):
        value *= roots.mean()
        assert seen["value"] == pytest.approx(value, rel=1e-12)
        assert seen["calls"] == 3 * number
        assert seen["sites"] == ("s0", "s1", "s2")
    stored = federation.store.rounds(federation.run_id)
    assert [row["name"] for row in stored] == ["test.local.sums/step"] * 4
    assert federation.transport.traffic[federation.run_id].from_sites_bytes > 0


def test_gather_is_in_cohort_order_and_sends_extras(federation: Any) -> None:
    def slow_first(name: str, endpoint: Endpoint) -> Endpoint:
        def answer(message: Message, progress: Progress) -> Message:
            time.sleep(0.03 if name == "s0" else 0)
            return endpoint(message, progress)

        return answer

    tables = tables_of(federation)
    result = federation.run(plan_of(federation, "gather"), tables, wrap=slow_first)["result"]
    assert list(result["all"]) == ["s0", "s1", "s2"]
    for i, (site, told) in enumerate(result["all"].items()):
        assert told == {"mean": pytest.approx(tables[site]["x"].mean()), "extra": float(i)}
    assert result["some"] == ("s1", "s2")
    assert {call for call in CALLS if call[2] == 1} == {("own", "s1", 1), ("own", "s2", 1)}


def in_turns() -> Callable[[str, Endpoint], Endpoint]:
    """s1 answers only once s2 is asked a second time, and s0 once s2 is asked a third time."""
    asked: set[str] = set()
    again = {"s0": threading.Event(), "s1": threading.Event(), "s2": threading.Event()}

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def answer(message: Message, progress: Progress) -> Message:
            if message.kind == "task" and name == "s2":
                asked.add(message.meta["id"])
                again["s2"].set()
                for number, site in ((2, "s1"), (3, "s0")):
                    if len(asked) >= number:
                        again[site].set()
            reply = endpoint(message, progress)
            if message.kind == "task":
                again[name].wait(60)
            return reply

        return answer

    return wrap


def test_stream_takes_replies_as_they_come_and_stores_their_order(federation: Any) -> None:
    result = federation.run(plan_of(federation, "stream"), tables_of(federation), wrap=in_turns(), threads=12)["result"]
    order = result["order"]
    assert len(order) == 9
    assert order[0] == ("s2", 0)
    assert order.index(("s1", 0)) >= 1
    assert order.index(("s0", 0)) >= 2
    stored = [federation.store.reduced(federation.run_id, number) for number in range(9)]
    assert [(message.meta["sites"][0], message.meta["asked_round"]) for message in stored] == order
    assert sorted(CALLS) == sorted(("reply", site, asked) for site, asked in order)
    for ledger in federation.ledgers().values():
        assert not ledger.unacknowledged


def test_a_stream_is_replayed_in_the_order_it_first_had(federation: Any) -> None:
    """A coordinator that dies in the middle: the stored arrivals come again, then the tasks still in flight."""
    for dies_at in (1, 4, 8):
        CALLS.clear()
        federation.build(tables_of(federation), wrap=in_turns(), threads=12)
        run = federation.submit(plan_of(federation, "stream"))
        with pytest.raises(Died):
            federation.drive(on_event=die_when(lambda event, at=dies_at: event.get("round") == at))
        before = [federation.store.reduced(run, number) for number in range(dies_at)]
        assert federation.store.reduced(run, dies_at) is None
        federation.start_coordinator()
        order = federation.drive(run)["result"]["order"]
        assert order[:dies_at] == [(m.meta["sites"][0], m.meta["asked_round"]) for m in before]
        assert len(order) == len(set(order)) == 9
        assert sorted(CALLS) == sorted(("reply", site, asked) for site, asked in order)  # nothing twice, nothing else
        for ledger in federation.ledgers().values():
            assert not ledger.unacknowledged


def test_what_a_site_withholds_from_an_optional_round_is_left_out(federation: Any) -> None:
    plan = plan_of(federation, "shy", {"optional": True, "code": "policy.withheld"})
    assert federation.run(plan, tables_of(federation))["result"]["told"] == ("s0", "s2")
    _settled(federation, "finished")


@pytest.mark.parametrize(("optional", "code"), [(False, "policy.withheld"), (True, "policy.other")])
def test_nothing_else_is_optional(federation: Any, optional: bool, code: str) -> None:
    with pytest.raises(PolicyError) as caught:
        federation.run(plan_of(federation, "shy", {"optional": optional, "code": code}), tables_of(federation))
    _named_at_both_ends(federation, caught.value, code, "s1", 0, "tell")


# ---------------------------------------------------------------- dropouts


def test_a_stream_goes_on_without_sites_that_drop_out(federation: Any) -> None:
    plan = plan_of(federation, "race", {"broken": ("s1", "s2")})
    assert federation.run(plan, tables_of(federation))["result"]["order"] == ["s0"] * 5
    assert sorted(event["dropout"] for event in federation.events if "dropout" in event) == ["s1", "s2"]
    alone = plan_of(federation, "race", {"broken": ("s0", "s1", "s2")})
    with pytest.raises(TransportError) as caught:
        federation.run(alone, tables_of(federation))
    assert caught.value.code == "cohort.too-few-left"


def trouble(federation: Any, how: str, rule: str, sites: tuple[str, ...] = ("s1",), **cohort: Any) -> Any:
    params = {"sites": sites, "how": how}
    settings = {"deadline_s": 2.5} if how in ("hang", "slow") else PATIENCE
    return plan_of(federation, "trouble", params, cohort={"min_sites": 2, "on_dropout": rule, **cohort}, run=settings)


@pytest.mark.parametrize("how", ["memory", "hang"])
def test_the_survivors_go_on_without_a_site_that_drops_out(federation: Any, how: str) -> None:
    outcome = federation.run(trouble(federation, how, "continue"), tables_of(federation))
    assert outcome["result"]["took"] == [(("s0", "s1", "s2"), 60), (("s0", "s2"), 53), (("s0", "s2"), 53)]
    told = [event for event in federation.events if "dropout" in event]
    assert [event["dropout"] for event in told] == ["s1"]
    assert "site s1" in told[0]["reason"]
    assert "round 1" in told[0]["reason"]
    HELD.set()
    assert ("work", "s1", 2) not in CALLS
    _settled(federation, "finished")
    if how == "memory":  # the site's own operator can read what went wrong, and where
        note = federation.journals["s1"].run(federation.run_id)[2]
        assert all(part in note for part in ("site s1", "round 1", "step work", "not enough memory"))


@pytest.mark.parametrize(("how", "code"), [("memory", "site.out-of-memory"), ("hang", "transport.deadline")])
def test_a_dropout_ends_the_run_if_the_plan_says_so(federation: Any, how: str, code: str) -> None:
    with pytest.raises(AtollError) as caught:
        federation.run(trouble(federation, how, "fail"), tables_of(federation))
    _named_at_both_ends(federation, caught.value, code, "s1", 1, "work")
    HELD.set()
    _settled(federation, "failed", unfinished_round=1)


def test_too_few_survivors_end_the_run(federation: Any) -> None:
    plan = trouble(federation, "memory", "continue", ("s1", "s2"))
    with pytest.raises(TransportError) as caught:
        federation.run(plan, tables_of(federation))
    assert caught.value.code == "cohort.too-few-left"
    assert caught.value.where["round"] == 1
    assert "more memory" in federation.store.run(federation.run_id)["note"]


def test_a_slow_site_that_says_it_goes_on_is_waited_for(federation: Any) -> None:
    """3 seconds of work under a deadline of 2.5 seconds without progress."""
    outcome = federation.run(trouble(federation, "slow", "fail"), tables_of(federation))
    assert [n for _, n in outcome["result"]["took"]] == [60, 60, 60]


def test_a_hanging_site_that_is_let_go_after_the_end_releases_nothing(federation: Any) -> None:
    federation.run(trouble(federation, "hang", "continue"), tables_of(federation))
    HELD.set()
    time.sleep(0.2)
    assert [(b["site"], b["round"]) for b in federation.releases() if b["site"] == "s1"] == [("s1", 0)]
    _settled(federation, "finished")


def _settled(federation: Any, status: str, unfinished_round: int | None = None) -> None:
    """Every party says how the run ended, and no release is without its receipt, but for those of the
    round that failed: what the coordinator never reduced, it does not acknowledge."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(
        journal.status(federation.run_id) == "running" for journal in federation.journals.values()
    ):
        time.sleep(0.01)
    for name, ledger in federation.ledgers().items():
        assert {ledger.entries[seq]["body"]["round"] for seq in ledger.unacknowledged} <= {unfinished_round}, name
        ends = [e["body"]["status"] for e in ledger.entries if e["kind"] == "closed"]
        assert ends == [status], name


# ---------------------------------------------------------------- failures are named, and show nothing


def _named_at_both_ends(federation: Any, error: AtollError, code: str, site: str, number: int, step: str) -> None:
    run = federation.run_id
    assert error.code == code
    assert error.remedy
    assert error.where["site"] == site
    assert error.where["round"] == number
    assert step in error.where["step"]
    assert error.where["trace"] == run
    record = federation.store.run(run)
    assert record["status"] == "failed"
    notes = {"coordinator": record["note"], **{n: journal.run(run)[2] for n, journal in federation.journals.items()}}
    assert all(journal.status(run) == "failed" for journal in federation.journals.values())
    for where, note in notes.items():
        for part in (f"site {site}", f"round {number}", step, error.remedy, run):
            assert part in note, f"{part!r} is not in the note at {where}: {note}"
        causes = {code, error.message or code, "not enough memory", "not told"}  # its own words, or those it may tell
        assert any(cause in note for cause in causes), f"no cause is in the note at {where}: {note}"


def test_an_unexpected_exception_is_named_everywhere_and_shows_nothing(federation: Any, caplog: Any) -> None:
    canary = "2718281.828canary"

    def work(self: Any, site: SiteView, task: Task) -> Reply:
        if site.name == "s2" and task.id.round == 1:
            raise ValueError(f"cannot digest {canary}")
        return {"n": len(site.table)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(REGISTRY["test.local.trouble"], "handlers", {"work": Handler(work, "sum", frozenset())})
        with pytest.raises(ProtocolError) as caught:
            federation.run(plan_of(federation, "trouble", {"sites": (), "how": ""}), tables_of(federation))
    _named_at_both_ends(federation, caught.value, "site.internal", "s2", 1, "work")
    assert "ValueError" in caplog.text and "in work" in caplog.text  # the site's own log says what and where …
    assert canary not in caplog.text and canary not in str(caught.value)  # … and nobody has the data value
    seen: BaseException | None = caught.value
    while seen is not None:
        assert canary not in repr(seen)
        seen = seen.__cause__ or seen.__context__
    assert all(canary.encode() not in message for _, _, message in federation.wire)
    assert canary not in str(federation.events)
    _in_no_file(federation, canary.encode(), journals=True)


def _in_no_file(federation: Any, needle: bytes, *, journals: bool) -> None:
    federation.ledgers()
    files = [f for f in federation.home.iterdir() if journals or f.name.startswith(("store", "coordinator"))]
    assert len(files) > 1
    for file in files:
        assert needle not in file.read_bytes(), file.name


def test_a_bug_in_the_coordinators_half_ends_the_run_everywhere(federation: Any) -> None:
    def coordinate(self: Any, cohort: Cohort, start: Any = None) -> Steps:
        yield from original(self, cohort, start)
        raise ZeroDivisionError("31415.9canary")

    original = REGISTRY["test.local.sums"].coordinate
    federation.build(tables_of(federation))
    federation.submit(plan_of(federation, "sums", {"rounds": 1}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(REGISTRY["test.local.sums"], "coordinate", coordinate)
        with pytest.raises(ProtocolError) as caught:
            federation.drive()
    assert caught.value.code == "coordinator.internal"
    assert "ZeroDivisionError" in str(caught.value)
    assert "31415.9canary" not in str(caught.value)
    _settled(federation, "failed")
    _in_no_file(federation, b"31415.9canary", journals=True)


def test_a_site_that_refuses_to_open_is_named_with_all_others_that_do(federation: Any) -> None:
    closed = Policy.sandbox().model_copy(update={"purposes": ("audit",)})
    with pytest.raises(AtollError) as caught:
        federation.run(plan_of(federation, "sums"), tables_of(federation), {"s0": closed, "s2": closed})
    assert caught.value.code == "cohort.refused"
    assert [(part.code, part.where["site"]) for part in caught.value.parts] == [
        ("policy.purpose", "s0"),
        ("policy.purpose", "s2"),
    ]
    assert CALLS == []
    assert federation.store.run(federation.run_id)["status"] == "failed"


# ---------------------------------------------------------------- cancelled, and stopped


def cancel_at(number: int, *reason: str) -> Callable[[dict[str, Any]], None]:
    def listen(event: dict[str, Any]) -> None:
        if event.get("round") == number:
            asyncio.current_task().cancel(*reason)

    return listen


def test_a_cancelled_run_ends_at_every_party(federation: Any) -> None:
    federation.build(tables_of(federation))
    run = federation.submit(plan_of(federation, "sums"))
    with pytest.raises(asyncio.CancelledError):
        federation.drive(on_event=cancel_at(2))
    assert federation.store.run(run)["status"] == "cancelled"
    _settled(federation, "cancelled", unfinished_round=2)
    assert {number for _, _, number in CALLS} <= {0, 1, 2}


def test_a_coordinator_that_is_stopped_resumes_with_the_same_bits(federation: Any) -> None:
    wanted = reference(federation)
    federation.build(tables_of(federation))
    run = federation.submit(plan_of(federation, "sums"))
    with pytest.raises(asyncio.CancelledError):
        federation.drive(on_event=cancel_at(2, "stopping"))
    assert [journal.status(run) for journal in federation.journals.values()] == ["running"] * 3
    federation.start_coordinator()
    assert federation.drive(run)["result"]["seen"] == wanted
    assert sorted(CALLS) == [("step", f"s{i}", number) for i in range(3) for number in range(4)]
    _settled(federation, "finished")


# ---------------------------------------------------------------- crashes: resume is replay


def reference(federation: Any) -> list[Any]:
    outcome = federation.run(plan_of(federation, "sums"), tables_of(federation))
    CALLS.clear()
    return outcome["result"]["seen"]


@pytest.mark.parametrize("dies_at", [0, 1, 2, 3])
def test_a_coordinator_that_dies_between_rounds_resumes_with_the_same_bits(federation: Any, dies_at: int) -> None:
    wanted = reference(federation)
    federation.build(tables_of(federation))
    run = federation.submit(plan_of(federation, "sums"))
    with pytest.raises(Died):
        federation.drive(on_event=die_when(lambda event: event.get("round") == dies_at))
    assert len(federation.store.rounds(run)) == dies_at
    federation.start_coordinator()
    assert federation.drive(run)["result"]["seen"] == wanted
    assert sorted(CALLS) == [("step", f"s{i}", number) for i in range(3) for number in range(4)]
    _settled(federation, "finished")


@pytest.mark.parametrize("dies_at", [0, 2])
def test_a_coordinator_that_dies_before_storing_a_round_asks_again_and_nothing_is_computed_twice(
    federation: Any, dies_at: int
) -> None:
    """The sites have released; their stored releases come again."""
    wanted = reference(federation)
    federation.build(tables_of(federation))
    run = federation.submit(plan_of(federation, "sums"))
    finish_round = federation.store.finish_round

    def dies(run_id: str, number: int, *rest: Any) -> None:
        if number == dies_at:
            raise Died
        finish_round(run_id, number, *rest)

    federation.store.finish_round = dies
    with pytest.raises(Died):
        federation.drive()
    released = federation.releases()
    assert [b["round"] for b in released].count(dies_at) == 3
    federation.start_coordinator()
    assert federation.drive(run)["result"]["seen"] == wanted
    assert sorted(CALLS) == [("step", f"s{i}", number) for i in range(3) for number in range(4)]
    assert len(federation.releases()) == 12
    _settled(federation, "finished")


def test_a_coordinator_may_die_many_times(federation: Any) -> None:
    wanted = reference(federation)
    federation.build(tables_of(federation))
    run = federation.submit(plan_of(federation, "sums"))
    for dies_at in (0, 0, 1, 2, 2, 3):
        with pytest.raises(Died):
            federation.drive(run, on_event=die_when(lambda event, at=dies_at: event.get("round") == at))
        federation.start_coordinator()
        federation.start_transport()
    assert federation.drive(run)["result"]["seen"] == wanted
    assert len(CALLS) == 12
    _settled(federation, "finished")


def test_a_learner_with_checkpoints_resumes_with_the_same_bits(federation: Any) -> None:
    """Died after a checkpoint, when the reductions before it are gone; in preparation; and in evaluation."""
    random = np.random.default_rng(8)
    columns = {"x": {"range": [-9, 9]}, "z": {"range": [-9, 9]}, "y": {"dtype": "integer", "values": [0, 1]}}
    tables = {}
    for i in range(3):
        x, z = random.normal(i, 1, 30), random.normal(0, 1, 30)
        z[random.random(30) < 0.2] = np.nan
        tables[f"s{i}"] = federation.table({"x": x, "z": z, "y": (x > random.normal(1, 1, 30)) * 1.0}, columns)
    params = {"family": "logistic", "target": "y", "features": ["x", "z"], "rounds": 7, "checkpoint_every": 3}
    plan = federation.plan(
        "horizontal.fedavg", params, tables, run={"holdout": 0.3, "seed": 1},
        recipe={"steps": [{"step": "impute", "columns": ["z"]}]},
    )  # fmt: skip
    wanted = federation.run(plan, tables)
    rounds = len(federation.store.rounds(federation.run_id))
    assert rounds == 1 + 7 + 2
    metrics = federation.store.metrics(federation.run_id)
    for dies_at in range(rounds):
        federation.build(tables)
        run = federation.submit(plan)
        with pytest.raises(Died):
            federation.drive(on_event=die_when(lambda event, at=dies_at: event.get("round") == at))
        federation.start_coordinator()
        outcome = federation.drive(run)
        assert outcome["result"]["model"].weights.tobytes() == wanted["result"]["model"].weights.tobytes()
        assert outcome["result"]["history"] == wanted["result"]["history"]
        assert outcome["fitted"] == wanted["fitted"]
        assert str(outcome["evaluation"]) == str(wanted["evaluation"])
        assert [{**row, "run": ""} for row in federation.store.metrics(run)] == [{**r, "run": ""} for r in metrics]
        assert len(federation.releases()) == 3 * rounds


def test_a_site_that_starts_again_between_rounds_is_where_it_was(federation: Any) -> None:
    """Its state comes from the journal, not from memory."""
    wanted = reference(federation)
    tables = tables_of(federation)
    keys: dict[str, Identity] = {}
    generate = Identity.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Identity, "generate", staticmethod(lambda name: keys.setdefault(name, generate(name))))
        federation.build(tables)
    run = federation.submit(plan_of(federation, "sums"))
    with pytest.raises(Died):
        federation.drive(on_event=die_when(lambda event: event.get("round") == 2))
    identity = keys["s1"]
    federation.journals["s1"].close()
    journal = Journal(federation.home / "s1.db", "s1", identity.public, identity.sign)
    federation.journals["s1"] = journal
    federation.sites["s1"] = Site(
        identity,
        journal,
        Policy.sandbox(),
        lambda plan: SiteData.of(tables["s1"], plan, "s1"),
        federation.coordinator.public,
    )
    federation.start_coordinator()
    federation.start_transport()
    assert federation.drive(run)["result"]["seen"] == wanted
    _settled(federation, "finished")


def test_a_task_that_is_delivered_twice_is_answered_by_the_stored_release(federation: Any) -> None:
    answers: list[tuple[bytes, bytes]] = []

    def twice(name: str, endpoint: Endpoint) -> Endpoint:
        def answer(message: Message, progress: Progress) -> Message:
            first, second = endpoint(message, progress), endpoint(message, progress)
            answers.append((encode_bytes(first), encode_bytes(second)))
            return second

        return answer

    outcome = federation.run(plan_of(federation, "sums"), tables_of(federation), wrap=twice)
    once = reference(federation)
    assert outcome["result"]["seen"] == once
    assert all(first == second for first, second in answers if decode(first).kind == "release")
    assert len([first for first, _ in answers if decode(first).kind == "release"]) == 12


def test_a_task_delivered_twice_runs_its_handler_once_and_is_charged_once(federation: Any) -> None:
    def twice(name: str, endpoint: Endpoint) -> Endpoint:
        def answer(message: Message, progress: Progress) -> Message:
            endpoint(message, progress)
            return endpoint(message, progress)

        return answer

    federation.run(plan_of(federation, "sums"), tables_of(federation), wrap=twice)
    assert sorted(CALLS) == [("step", f"s{i}", number) for i in range(3) for number in range(4)]
    assert len(federation.releases()) == 12
    _settled(federation, "finished")


# ---------------------------------------------------------------- ledgers


@pytest.mark.parametrize("receipts", ["round", "each"])
def test_every_release_is_in_its_sites_ledger_and_has_its_receipt(federation: Any, receipts: str) -> None:
    federation.build(tables_of(federation))
    run = federation.submit(plan_of(federation, "sums"))
    federation.drive(receipts=receipts)
    ledgers = federation.ledgers()
    for name, ledger in ledgers.items():
        kinds = [entry["kind"] for entry in ledger.entries]
        if name == "coordinator":
            received = 4 if receipts == "round" else 12
            assert kinds == ["genesis", "opened", *["received"] * received, "closed"]
            continue
        assert kinds[:2] == ["genesis", "joined"]
        assert kinds.count("release") == kinds.count("receipt") == 4
        assert kinds[-1] == "closed"
        assert not ledger.unacknowledged
        for body in (entry["body"] for entry in ledger.entries if entry["kind"] == "release"):
            assert (body["run"], body["site"], body["program"], body["handler"]) == (
                run,
                name,
                "test.local.sums",
                "step",
            )
            assert body["protection"] == "plain"
            assert body["plan"] == plan_of(federation, "sums").hash


# ---------------------------------------------------------------- canaries

CANARY = 123.456789012345678
PROGRAMS: list[tuple[str, dict[str, Any]]] = [
    ("statistics.describe", {}),
    ("horizontal.glm", {"family": "linear", "target": "v", "features": ["u"]}),
    ("horizontal.glm", {"family": "logistic", "target": "y", "features": ["u", "v"]}),
    ("horizontal.fedavg", {"family": "logistic", "target": "y", "features": ["u", "v"], "rounds": 3, "batch_size": 4}),
]


@pytest.mark.parametrize(("name", "params"), PROGRAMS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(PROGRAMS)])
def test_no_cell_ever_leaves_a_site(federation: Any, name: str, params: dict[str, Any]) -> None:
    """An unusual number in one cell is in no message, as text or as bytes, whole or scaled to [-1, 1]."""
    random = np.random.default_rng(9)
    columns = {"u": {"range": [0, 200]}, "v": {"range": [0, 200]}, "y": {"dtype": "integer", "values": [0, 1]}}
    tables = {}
    for i in range(3):
        u, v = random.uniform(0, 200, 25), random.uniform(0, 200, 25)
        u[7] = v[13] = CANARY if i == 1 else 50.0
        tables[f"s{i}"] = federation.table({"u": u, "v": v, "y": random.integers(0, 2, 25)}, columns)
    plan = federation.plan(name, params, tables, run={"holdout": 0.2, "seed": 2})
    federation.run(plan, tables)
    needles = [repr(CANARY)[:9].encode()]
    for value in (CANARY, CANARY - 100, (CANARY - 100) / 100, CANARY**2, ((CANARY - 100) / 100) ** 2):
        needles += [struct.pack("<d", value), struct.pack("<d", -value), struct.pack("<f", value)]
    sent = b"".join(message for _, _, message in federation.wire)
    assert len(sent) > 10_000
    for needle in needles:
        assert needle not in sent
        _in_no_file(federation, needle, journals=True)
    assert repr(CANARY)[:9] not in str(federation.events)


def test_the_canary_test_can_fail(federation: Any) -> None:
    """A program that releases a cell is caught by the same search."""
    table = federation.table({"x": [CANARY]}, COLUMNS)
    federation.run(plan_of(federation, "gather"), {"s0": table, "s1": table})
    assert struct.pack("<d", CANARY) in b"".join(message for _, _, message in federation.wire)
