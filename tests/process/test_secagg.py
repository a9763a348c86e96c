"""Secure rounds among real processes: whoever is killed with -9, at whatever step, the sum is exactly the survivors'.

Parties die by their own hand at a precise place: every process of this module's federation also runs ``HOOK``,
which sends the process SIGKILL just before or after it does what a file in a shared folder names. It also registers
the program of these tests, whose rounds can be held.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytestmark = pytest.mark.slow

SITES = ("alpha", "beta", "gamma", "delta", "epsilon")
STEPS = ("shares", "reply", "agree", "unmask")
STEP = 1e-6
PATIENCE_S = 15.0
"""After which a site that was killed has dropped out; long, because a busy machine is slow to answer, too."""
HOOK = '''
"""Test only: crashes to order, and a program whose rounds can be held (see tests/process/test_secagg.py)."""

import os
import signal
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["ATOLL_TEST_FOLDER"])


def crash(party, number, step, when):
    """Kill this process if a file named for the party says so: round, step, before or after."""
    order = FOLDER / f"{party}.crash"
    if order.exists() and order.read_text().split() == [str(number), step, when]:
        order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


if "atoll" in sys.orig_argv:
    from atoll.contract.program import ProgramParams, handler, program
    from atoll.contract.rounds import Round, Sum, count, real
    from atoll.runtime.courier import Courier
    from atoll.runtime.journal import Journal

    store, ask = Journal.store_release, Courier.ask

    def store_release(self, task, run, name, body, *rest, **more):
        crash(body["site"], body["round"], body["step"], "before")
        message = store(self, task, run, name, body, *rest, **more)
        crash(body["site"], body["round"], body["step"], "after")
        return message

    async def asked(self, about, number, exchange, site, *rest, **more):
        if site == exchange.sites[2]:
            crash("coordinator", number, exchange.step, "before")
        answer = await ask(self, about, number, exchange, site, *rest, **more)
        if site == exchange.sites[-1]:
            crash("coordinator", number, exchange.step, "after")
        return answer

    Journal.store_release, Courier.ask = store_release, asked

    @program("test.process.sums", needs={"sum"}, offers={"bounded", "resolution"})
    class Sums:
        """Rounds of sums; sites count their calls."""

        class Params(ProgramParams):
            rounds: int
            salt: int

        def __init__(self, params):
            self.params = params

        def coordinate(self, cohort, start=None):
            seen = []
            for number in range(self.params.rounds):
                fields = {"x": real(bound=1e6, step=1e-6), "n": count(bound=10**6), "calls": count(bound=100)}
                total = yield Round("step", Sum(), fields, {"number": float(number)})
                numbers = {name: float(total[name]) for name in fields}
                seen.append({**numbers, "sites": list(total.sites)})
            return {"seen": seen}

        @handler("step")
        def step(self, site, task):
            while (FOLDER / f"{site.name}.hold").exists() and task.id.round == HELD:
                site.progress(0, 1)
                time.sleep(0.02)
            site.state["calls"] = calls = site.state.get("calls", 0 * task.take("number", ())) + 1
            x = site.table["age"].sum() * (1 + float(task.take("number", ())))
            return {"x": x, "n": len(site.table), "calls": calls.astype("<i8")}


HELD = 3
'''


class Told:
    """What a test tells the federation to do, and what comes out."""

    def __init__(self, federation: Any, folder: Path, wait_until: Any) -> None:
        self.federation, self.folder, self.until, self.salt = federation, folder, wait_until, 0
        self.ages = {site: np.genfromtxt(federation.data(site), delimiter=",", names=True)["age"] for site in SITES}

    def crash(self, party: str, number: int, step: str, when: str) -> None:
        (self.folder / f"{party}.crash").write_text(f"{number} {step} {when}")

    def submit(self, deadline_s: float, rounds: int = 5) -> str:
        """A run of its own question: policies refuse the same one of nearly the same sites."""
        self.salt += 1
        columns = ("age", "dose", "score", "weight")
        schema: dict[str, Any] = {
            "name": "trial",
            "max_rows": 100_000,
            "columns": {n: {"range": [-10, 10]} for n in columns},
        }
        schema["columns"]["cured"] = {"dtype": "integer", "values": [0, 1]}
        plan = {
            "atoll": 1, "name": f"secure-{self.salt}", "dataset": "trial", "schema": schema,
            "program": "test.process.sums", "params": {"rounds": rounds, "salt": self.salt}, "protection": "secagg",
            "cohort": {"sites": list(SITES), "min_sites": 3}, "run": {"deadline_s": deadline_s},
        }  # fmt: skip
        path = self.folder / f"{self.salt}.plan.yaml"
        path.write_text(yaml.safe_dump(plan, sort_keys=False))
        return str(json.loads(self.federation.as_coordinator("submit", path, "--json").stdout)["run"])

    def died(self, party: str, run: str) -> None:
        """Wait until the process has killed itself."""
        process = self.federation.parties[party]

        def dead() -> bool:
            row = self.federation.row(run)
            assert row["status"] in ("submitted", "running"), f"{row['status']}: {row['note']}"
            return not process.running()

        self.until(dead, f"{party}'s death")
        assert process.wait() == -signal.SIGKILL

    def exact(self, run: str, expected: list[set[str]]) -> list[dict[str, Any]]:
        """The run finished; each round's sum is exactly that of the sites it should be of."""
        self.federation.await_status(run, "finished")
        seen: list[dict[str, Any]] = self.federation.store.result(run)[0]["output"]["seen"]
        for number, (told, sites) in enumerate(zip(seen, expected, strict=True)):
            assert set(told["sites"]) == sites, (number, told["sites"])
            wanted = sum(self.ages[site].sum() * (1 + number) for site in sites)
            assert abs(told["x"] - wanted) <= len(sites) * STEP / 2 + 1e-8, number
            assert told["n"] == sum(len(self.ages[site]) for site in sites)
        return seen

    def attempts(self, site: str, run: str) -> set[tuple[int, int]]:
        """(round, attempt) of a site's releases in a run, read beside the running site."""
        place = f"file:{self.federation.sites[site].home / 'journal.db'}?mode=ro"
        with contextlib.closing(sqlite3.connect(place, uri=True, timeout=30)) as journal:
            tasks = journal.execute("SELECT task FROM release WHERE run = ?", (run,)).fetchall()
        return {(int(task.split("/")[1]), int(task.split("/")[2])) for (task,) in tasks}


@pytest.fixture(scope="module")
def secure(wait_until: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """A federation of this module's own: five sites, whose policies want secagg, and the hook in every process."""
    folder = tmp_path_factory.mktemp("hook")
    (folder / "sitecustomize.py").write_text(HOOK)
    conftest: Any = sys.modules[wait_until.__module__]
    policy = {**conftest.POLICY, "programs": ["test.*"], "protections": ["secagg"], "min_sites": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conftest, "SITES", SITES)
        patch.setattr(conftest, "POLICY", policy)
        patch.setitem(conftest.ENVIRONMENT, "PYTHONPATH", str(folder))
        patch.setitem(conftest.ENVIRONMENT, "ATOLL_TEST_FOLDER", str(folder))
        federation = conftest.Federation(tmp_path_factory.mktemp("secure") / "f")
        try:
            yield Told(federation.set_up(), folder, wait_until)
        finally:
            federation.stop()


@pytest.fixture
def told(secure: Told) -> Told:
    """With everybody alive and connected, and no orders left."""
    federation = secure.federation
    for order in [*secure.folder.glob("*.crash"), *secure.folder.glob("*.hold")]:
        order.unlink()
    if not federation.coordinator.running():
        federation.start_coordinator()
    for site in SITES:
        if not federation.sites[site].running():
            federation.sites[site].start()
    federation.await_connected(*SITES)
    return secure


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_sites_killed_at_a_step_drop_out_and_come_back(told: Told, step: str, when: str) -> None:
    """Two of five die in round 1. Their vectors are in its sum if they had left; the next rounds are of three;
    started again, they take part in what comes."""
    everybody, left = set(SITES), {"alpha", "gamma", "epsilon"}
    (told.folder / "alpha.hold").touch()
    for site in ("beta", "delta"):
        told.crash(site, 1, step, when)
    run = told.submit(deadline_s=PATIENCE_S)
    for site in ("beta", "delta"):
        told.died(site, run)
    told.federation.await_rounds(run, 3)
    note = told.federation.row(run)["note"]
    assert "beta dropped out" in note and "delta dropped out" in note
    for site in ("beta", "delta"):
        told.federation.sites[site].start()
    told.federation.await_connected(*SITES)
    (told.folder / "alpha.hold").unlink()
    first = everybody if step in ("agree", "unmask") else left
    told.exact(run, [everybody, first, left, left, everybody])
    ledgers = told.federation.ledgers()
    for site in ("beta", "delta"):
        mine = [e["body"] for e in ledgers[site] if e["kind"] == "release" and e["body"]["run"] == run]
        done = STEPS[: STEPS.index(step) + (when == "after")]
        assert [body["step"] for body in mine if body["round"] == 1] == list(done)
        assert {body["round"] for body in mine} == {0, 4} | ({1} if done else set())


@pytest.mark.parametrize("step", STEPS)
def test_a_site_killed_at_a_step_and_started_again_in_time_is_where_it_was(told: Told, step: str) -> None:
    for when, number in (("before", 1), ("after", 2)):
        told.crash("gamma", number, step, when)
        run = told.submit(deadline_s=60)
        told.died("gamma", run)
        told.federation.sites["gamma"].start()
        seen = told.exact(run, [set(SITES)] * 5)
        assert [round_["calls"] for round_ in seen] == [5 * n for n in range(1, 6)]
        assert told.attempts("gamma", run) == {(n, 0) for n in range(5)}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_a_coordinator_killed_within_a_round_begins_it_anew(told: Told, step: str, when: str) -> None:
    told.crash("coordinator", 2, step, when)
    run = told.submit(deadline_s=60)
    told.died("coordinator", run)
    assert told.federation.row(run)["status"] == "running"
    told.federation.start_coordinator()
    seen = told.exact(run, [set(SITES)] * 5)
    assert [round_["calls"] for round_ in seen] == [5 * n for n in range(1, 6)]
    assert {(2, 1), (1, 0), (3, 0)} <= told.attempts("alpha", run)


def test_too_many_are_killed(told: Told) -> None:
    for site in ("alpha", "beta", "delta"):
        told.crash(site, 1, "agree", "before")
    run = told.submit(deadline_s=PATIENCE_S)
    for site in ("alpha", "beta", "delta"):
        told.died(site, run)
    row = told.federation.await_status(run, "failed")
    assert "are left" in row["note"] and told.federation.rounds(run) == 1
    ledgers = told.federation.ledgers()
    for site in SITES:
        bodies = [e["body"] for e in ledgers[site] if e["kind"] == "release" and e["body"]["run"] == run]
        assert (1, "unmask") not in [(body["round"], body["step"]) for body in bodies]
