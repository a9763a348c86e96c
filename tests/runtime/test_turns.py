"""Several runs at one site: nobody starves, nobody is forgotten, and who waits says so."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest

from atoll.contract.program import ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, count
from atoll.data.table import Table
from atoll.runtime import turns
from atoll.runtime.coordinator import Coordinator
from atoll.runtime.turns import Turns

PATIENCE_S = 120.0
DONE: list[tuple[str, str]] = []
"""(run, site) of every handler's end, in order."""


@program("test.turns.work", needs={"sum"}, offers={"bounded", "resolution"})
class Work:
    """Rounds in which sites are busy for so long."""

    class Params(ProgramParams):
        rounds: int
        seconds: float

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Any, start: Any = None) -> Steps:
        for _ in range(self.params.rounds):
            yield Round("work", Sum(), {"n": count(bound=10**6)})
        return {"rounds": self.params.rounds}

    @handler("work")
    def work(self, site: SiteView, task: Task) -> Reply:
        end = time.monotonic() + self.params.seconds
        while time.monotonic() < end:
            sum(range(100))
        DONE.append((task.id.run, site.name))
        return {"n": len(site.table)}


def tables_of(federation: Any) -> dict[str, Table]:
    return {f"s{i}": federation.table({"x": np.arange(9.0)}, {"x": {"range": [0, 10]}}) for i in range(3)}


# ---------------------------------------------------------------- turns alone


class Worker(threading.Thread):
    """Takes a turn, and holds it until it is let go."""

    def __init__(self, place: Turns, run: str, order: list[str]) -> None:
        super().__init__(daemon=True)
        self.place, self.run_id, self.order = place, run, order
        self.has, self.let_go, self.pings = threading.Event(), threading.Event(), 0
        self.start()

    def run(self) -> None:
        with self.place.taken(self.run_id, self.ping):
            self.order.append(self.run_id)
            self.has.set()
            assert self.let_go.wait(PATIENCE_S)

    def ping(self) -> None:
        self.pings += 1


def all_wait(place: Turns, number: int) -> None:
    while len(place._waiting) < number:
        time.sleep(0.001)


def test_who_had_least_goes_next_and_of_those_who_came_first() -> None:
    place, order = Turns(1), list[str]()
    place._spent_s = {"long": 9.0, "short": 0.5, "middle": 4.0}
    first = Worker(place, "long", order)
    assert first.has.wait(PATIENCE_S)
    others = []
    for number, run in enumerate(("long", "middle", "short", "new", "new")):
        others.append(Worker(place, run, order))
        all_wait(place, number + 1)
    for worker in (first, *others):
        worker.let_go.set()
    for worker in (first, *others):
        worker.join(PATIENCE_S)
    assert order == ["long", "new", "new", "short", "middle", "long"]


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_only_so_many_are_at_it_at_the_same_time(at_once: int) -> None:
    place, now, most, guard = Turns(at_once), [0], [0], threading.Lock()
    full = threading.Event()

    def work(run: str) -> None:
        for _ in range(6):
            with place.taken(run, lambda: None):
                with guard:
                    now[0] += 1
                    most[0] = max(most[0], now[0])
                    if now[0] == at_once:
                        full.set()
                assert full.wait(PATIENCE_S)
                with guard:
                    now[0] -= 1

    workers = [threading.Thread(target=work, args=(f"r{i}",)) for i in range(2 * at_once)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE_S)
    assert most[0] == at_once
    assert not place._waiting and place._free == at_once


def test_who_waits_says_so_and_can_be_called_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PING_S", 0.02)
    place, order = Turns(1), list[str]()
    first = Worker(place, "a", order)
    assert first.has.wait(PATIENCE_S)
    patient = Worker(place, "b", order)
    while patient.pings < 3:
        time.sleep(0.001)

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError), place.taken("c", stop):
        order.append("never")
    first.let_go.set()
    patient.let_go.set()
    patient.join(PATIENCE_S)
    assert order == ["a", "b"]
    assert place._free == 1


def test_a_handler_that_fails_gives_its_turn_back() -> None:
    place = Turns(1)
    with pytest.raises(ValueError, match="no"), place.taken("a", lambda: None):
        raise ValueError("no")
    with place.taken("b", lambda: None):
        assert place.spent_s("a") > 0
    place.forget("a")
    assert place.spent_s("a") == 0


# ---------------------------------------------------------------- at sites


def test_a_short_run_ends_long_before_the_long_ones_that_were_there_first(federation: Any) -> None:
    """Three long runs of heavy rounds, and a short one, on one federation whose sites compute one at a time."""
    DONE.clear()
    federation.build(tables_of(federation), threads=16)
    for site in federation.sites.values():
        site.turns = Turns(1)
    long = {"rounds": 40, "seconds": 0.01}
    runs = [federation.submit(federation.plan("test.turns.work", long, tables_of(federation))) for _ in range(3)]
    coordinator = Coordinator(federation.transport, federation.store, federation.ledger)
    finished: list[tuple[str, dict[str, int]]] = []

    async def drive(run: str, after: int) -> None:
        while len(DONE) < after:
            await asyncio.sleep(0.001)
        await coordinator.run(run)
        finished.append((run, {one: len(federation.store.rounds(one)) for one in runs}))

    short = federation.submit(
        federation.plan("test.turns.work", {"rounds": 4, "seconds": 0.001}, tables_of(federation))
    )

    async def both() -> None:
        await asyncio.gather(*(drive(run, 0) for run in runs), drive(short, 9))

    asyncio.run(both())
    assert finished[0][0] == short
    assert max(finished[0][1].values()) < 32, "of 40"
    assert {run for run, _ in finished} == {short, *runs}
    assert len(DONE) == 3 * (3 * 40 + 4)


def test_who_waits_for_a_turn_does_not_drop_out(federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its site's deadline is shorter than the turn of the other run takes."""
    monkeypatch.setattr(turns, "PING_S", 0.1)
    federation.build(tables_of(federation), threads=16)
    place = Turns(1)
    federation.sites["s1"].turns = place
    plan = federation.plan(
        "test.turns.work", {"rounds": 1, "seconds": 0.0}, tables_of(federation), run={"deadline_s": 3}
    )
    run = federation.submit(plan)
    other = Worker(place, "another", [])
    assert other.has.wait(PATIENCE_S)

    def release() -> None:
        all_wait(place, 1)
        ended = time.monotonic() + 4  # beyond the deadline
        while time.monotonic() < ended:
            assert len(place._waiting) == 1
            time.sleep(0.01)
        other.let_go.set()

    watcher = threading.Thread(target=release)
    watcher.start()
    federation.drive(run)
    watcher.join()
    assert not [event for event in federation.events if "dropout" in event]
