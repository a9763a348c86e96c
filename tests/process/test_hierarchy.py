"""Sites → cities → a province → the nation, a process each, over gRPC: whoever is killed in the middle comes back.

nation ── north ┬─ harbour ── ann, bob
       │        └─ hill ───── cid, dan
       └─ south
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests.free_ports import free_ports

from atoll.crypto.identity import verify
from atoll.data.sources import SourceSpec
from atoll.ledger.verify import verify_file, verify_together
from atoll.runtime.budget import Budget
from atoll.runtime.home import CoordinatorConfig, CoordinatorHome, SiteHome
from atoll.runtime.policy import Policy
from atoll.runtime.store import RunStore

from .conftest import PLAN, POLICY, Federation, Party, table, until

BELOW = {"nation": ("north", "south"), "north": ("harbour", "hill"), "harbour": ("ann", "bob"), "hill": ("cid", "dan")}
PROTECTION = {"nation": "secagg", "north": "plain", "harbour": "secagg", "hill": "plain"}
LEAST = {"north": "1", "harbour": "2", "hill": "2"}
PARENT = {name: above for above, names in BELOW.items() for name in names}
REGIONS = tuple(name for name in BELOW if name != "nation")
SITES = tuple(name for name in PARENT if name not in BELOW)
ROUNDS = 40 + 1
"""fedavg's, and the evaluation's; what single sites score is withheld by regions."""
HELD_S = 3.0
"""So long, and not longer, a region may take to answer: then the next round is tried."""

pytestmark = pytest.mark.slow


class Node(Party):
    """A coordinator, a region or a site of the tree."""

    @property
    def kind(self) -> str:
        return "coordinator" if self.name == "nation" else "region" if self.name in BELOW else "site"

    @property
    def site_home(self) -> Path:
        """Its folder as a site of the level above."""
        return self.home / "site" if self.name in BELOW else self.home

    @property
    def coordinator_home(self) -> Path:
        """Its folder as the coordinator of its own."""
        return self.home if self.name == "nation" else self.home / "coordinator"

    def listens(self) -> bool:
        assert self.running(), self.text()[-3000:]
        try:
            return bool(json.loads((self.coordinator_home / "listening.json").read_text())["pid"] == self.pid)
        except (OSError, ValueError):
            return False

    def connected(self) -> bool:
        assert self.running(), self.text()[-3000:]
        told = [line for line in self.text().splitlines() if line.startswith(f"{self.name}: ")]
        return bool(told) and told[-1] == f"{self.name}: connected"

    def status(self, run: str) -> str:
        """A run's status in its journal as a site, read beside the running process."""
        place = f"file:{self.site_home / 'journal.db'}?mode=ro"
        with contextlib.closing(sqlite3.connect(place, uri=True, timeout=30)) as journal:
            return str(journal.execute("SELECT status FROM run WHERE run = ?", (run,)).fetchone()[0])

    def released(self, run: str) -> int:
        """How many rounds it has released its reply for, read beside the running process."""
        place = f"file:{self.site_home / 'journal.db'}?mode=ro"
        with contextlib.closing(sqlite3.connect(place, uri=True, timeout=30)) as journal:
            rows = journal.execute("SELECT task FROM release WHERE run = ?", (run,)).fetchall()
        return len({task.split("/")[1] for (task,) in rows if task.split("/")[3] == "reply"})


class Nation:
    """All of them, run by the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.atoll = folder, Federation(folder).atoll
        self.nodes = {name: Node(name, folder / name) for name in ("nation", *PARENT)}
        self.stores: dict[str, RunStore] = {}
        self.exports = 0

    def set_up(self) -> Nation:
        """From the top to the sites: everybody's coordinator first, then joining it by its token."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ports = iter(free_ports(2 * len(BELOW)))
        for name in BELOW:
            config = CoordinatorConfig(port=next(ports), enrol_port=next(ports))
            CoordinatorHome.create(self.nodes[name].coordinator_home, config)
        self.start("nation")
        for level in (("north", "south"), ("harbour", "hill"), ("ann", "bob", "cid", "dan")):
            for name in level:
                self.join(name)
            for name in level:
                self.await_up(name)
        self.await_connected()
        return self

    def join(self, name: str) -> None:
        """Invite and enrol it, and start it; a region is put together of its two sides first."""
        node, above = self.nodes[name], self.nodes[PARENT[name]].coordinator_home
        data = {}
        if name in SITES:
            (self.folder / f"{name}.csv").write_text(table(name, 400))
            data = {"trial": SourceSpec(path=str(self.folder / f"{name}.csv"))}
        token = CoordinatorHome(above).invite(self.store(PARENT[name]), name, dt.timedelta(hours=1))
        asyncio.run(SiteHome.create(node.site_home, token.encode(), data, Policy(**POLICY | {"protections": ["*"]})))
        if name in REGIONS:
            options = ["--protection", PROTECTION[name], "--min-sites", LEAST[name], "--members", "2"]
            sides = ["--site", node.site_home, "--coordinator", node.coordinator_home]
            self.atoll("region", "init", "--home", node.home, *sides, *options)
        node.start()

    def await_up(self, name: str) -> None:
        """Wait until it listens, if it is to."""
        if name in BELOW:
            until(self.nodes[name].listens, f"{name} listens")

    def start(self, name: str) -> None:
        """Start it; a coordinator listens then."""
        self.nodes[name].start()
        self.await_up(name)

    def await_connected(self, *names: str) -> None:
        for name in names or PARENT:
            until(self.nodes[name].connected, f"{name}'s connection")

    def submit(self, name: str = "trial", **changes: Any) -> str:
        """Submit fedavg over the nation; returns the run's id."""
        cohort = {"sites": list(BELOW["nation"]), "min_sites": 2, "on_dropout": "fail", "members": 4}
        params = {**PLAN["params"], "rounds": changes.pop("rounds", ROUNDS - 1)}
        content = {**PLAN, "name": name, "params": params, "protection": "secagg"}
        content |= {"cohort": {**cohort, **changes.pop("cohort", {})}, "run": {**PLAN["run"], **changes.pop("run", {})}}
        content |= changes
        path = self.folder / f"{name}.plan.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        submitted = self.atoll("coordinator", "submit", path, "--home", self.nodes["nation"].home, "--json")
        return str(json.loads(submitted.stdout)["run"])

    def store(self, name: str) -> RunStore:
        """A level's run store, read beside its running coordinator."""
        if name not in self.stores:
            self.stores[name] = CoordinatorHome(self.nodes[name].coordinator_home).store()
        return self.stores[name]

    def rounds(self, name: str, run: str) -> int:
        return len(self.store(name).rounds(run))

    def await_rounds(self, run: str, number: int) -> None:
        def there() -> bool:
            row = self.store("nation").run(run)
            assert row["status"] in ("submitted", "running"), f"{row['status']}: {row['note']}"
            return self.rounds("nation", run) >= number

        until(there, f"round {number}")

    def await_end(self, run: str, level: str = "nation") -> dict[str, Any]:
        """Wait until a run has finished at a level; returns its row."""

        def ended() -> bool:
            return self.store(level).run(run)["status"] in ("finished", "failed", "cancelled")

        until(ended, f"the run's end at {level}")
        row = self.store(level).run(run)
        assert row["status"] == "finished", f"{row['note']}\n{self.nodes[level].text()[-3000:]}"
        return row

    def killed(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Kill it at once, or end it by another signal, and start it again."""
        self.nodes[name].signal(number)
        assert self.nodes[name].wait() == (0 if number == signal.SIGTERM else -number)
        self.start(name)

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Within the block, a process stands still."""
        self.nodes[name].signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.nodes[name].signal(signal.SIGCONT)

    def check_ledgers(self, run: str, *, away: tuple[str, ...] = (), told: bool = False) -> None:
        """At every level the ledgers hold together (*told*: `atoll ledger verify` says so too), and nobody released a
        round twice, or missed one, but those who were *away*."""
        self.exports += 1
        for level, names in BELOW.items():
            folder = self.folder / f"ledgers-{self.exports}-{level}"
            folder.mkdir()
            files = {name: folder / f"{name}.jsonl" for name in ("coordinator", *names)}
            self.store(level).export_ledger(files["coordinator"])
            for name in names:
                with contextlib.closing(SiteHome(self.nodes[name].site_home).journal()) as journal:
                    journal.export(files[name])
            ledgers = {name: verify_file(path, verify) for name, path in files.items()}
            verify_together(list(ledgers.values()), verify)
            if told:
                assert "intact" in self.atoll("ledger", "verify", *files.values()).stdout
            for name in names:
                bodies = [entry["body"] for entry in ledgers[name].entries if entry["kind"] == "release"]
                mine = [body for body in bodies if body["run"] == run and body["step"] == "reply"]
                rounds = [(body["round"], body["attempt"]) for body in mine]
                assert len(set(rounds)) == len(rounds), name
                if not {name, level} & set(away):
                    assert {number for number, _ in rounds} >= set(range(ROUNDS)), name

    def stop(self) -> None:
        for node in self.nodes.values():
            node.stop()
        for store in self.stores.values():
            store.close()


@pytest.fixture(scope="module")
def nation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nation]:
    """Nine processes, ended with the module."""
    made = Nation(tmp_path_factory.mktemp("nation") / "n")
    try:
        yield made.set_up()
    finally:
        made.stop()


@pytest.fixture(scope="module")
def uninterrupted(nation: Nation) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the plan gives when nothing happens."""
    run = nation.submit()
    nation.await_end(run)
    for level in REGIONS:
        nation.await_end(run, level)
    nation.check_ledgers(run, told=True)
    return nation.store("nation").result(run)


def check_same(nation: Nation, run: str, uninterrupted: Any) -> None:
    """The model and the metrics have the same bits, and the ledgers hold together at every level."""
    nation.await_end(run)
    for level in REGIONS:
        nation.await_end(run, level)
    (result, model), (expected, expected_model) = nation.store("nation").result(run), uninterrupted
    assert model.keys() == expected_model.keys()
    for name, array in expected_model.items():
        assert model[name].tobytes() == array.tobytes(), name
    for key in ("rounds", "sites", "metrics", "model"):
        assert result[key] == expected[key], key
    nation.check_ledgers(run)


@pytest.mark.parametrize("name", ["north", "harbour"])
def test_killed_before_its_answer(nation: Nation, uninterrupted: Any, name: str) -> None:
    run = nation.submit()
    nation.await_rounds(run, 10)
    with nation.held("ann"):  # so that harbour cannot answer, nor north
        until(lambda: nation.nodes["bob"].released(run) >= nation.rounds("nation", run), "the others wait for ann")
        nation.killed(name)
    check_same(nation, run, uninterrupted)


def test_killed_in_the_middle_of_a_merge(nation: Nation, uninterrupted: Any) -> None:
    run = nation.submit()
    nation.await_rounds(run, 10)
    with nation.held("dan"):
        merging = lambda: nation.nodes["cid"].released(run) > nation.rounds("hill", run)  # noqa: E731
        until(merging, "cid has answered hill, and dan has not")
        nation.killed("hill")
    nation.await_rounds(run, 20)
    with nation.held("hill"):
        merging = lambda: nation.nodes["harbour"].released(run) > nation.rounds("north", run)  # noqa: E731
        until(merging, "harbour has answered north, and hill has not")
        nation.killed("north")
    check_same(nation, run, uninterrupted)


@pytest.mark.parametrize("name", ["north", "hill"])
def test_killed_after_its_release_was_written(nation: Nation, uninterrupted: Any, name: str) -> None:
    above, node = PARENT[name], nation.nodes[name]
    run = nation.submit()
    nation.await_rounds(run, 5)

    def killed() -> bool:
        """Hold the level above for a while: was a release made, and not yet received?"""
        with nation.held(above):
            end, known = time.monotonic() + HELD_S, nation.rounds(above, run)
            while node.released(run) <= known:
                if time.monotonic() > end:  # nothing was asked of it when the level above was held
                    return False
                time.sleep(0.02)
            node.kill()
            return True

    while not killed():
        nation.await_rounds(run, nation.rounds("nation", run) + 1)
    nation.start(name)
    check_same(nation, run, uninterrupted)


def test_everybody_in_the_middle_ends_now_and_then(nation: Nation, uninterrupted: Any) -> None:
    run = nation.submit()
    names = ["north", "hill", "harbour", "nation", "north", "harbour"]
    for place, name in enumerate(names):
        nation.await_rounds(run, 3 + 4 * place)
        nation.killed(name, signal.SIGTERM if place % 2 else signal.SIGKILL)
    check_same(nation, run, uninterrupted)


def test_under_noise_a_region_comes_back_and_nobody_is_charged_twice(nation: Nation) -> None:
    run = nation.submit("noised", privacy={"unit": "site", "epsilon": 5.0, "delta": 1e-6})
    for name, number in (("harbour", 5), ("north", 12), ("hill", 20)):
        nation.await_rounds(run, number)
        nation.killed(name, signal.SIGKILL)
    nation.await_end(run)
    for level in REGIONS:
        nation.await_end(run, level)
    nation.check_ledgers(run)
    told = nation.store("nation").result(run)[0]["privacy"]
    assert told["noised"] and 4.9 < told["spent"] <= 5
    for name in PARENT:
        until(lambda name=name: nation.nodes[name].status(run) == "finished", f"the end at {name}")
        with contextlib.closing(SiteHome(nation.nodes[name].site_home).journal()) as journal:
            assert journal.spent("trial", Budget()).epsilon == pytest.approx(told["spent"]), name


def test_a_city_that_is_away_for_good(nation: Nation, uninterrupted: Any) -> None:
    run = nation.submit("away", run={"deadline_s": 12, "seed": 12})  # or it is a near repeat of the other, and refused
    nation.await_rounds(run, 10)
    nation.nodes["hill"].kill()
    try:
        nation.await_end(run)
        nation.await_end(run, "north")
        note = nation.store("north").run(run)["note"]
        assert "hill dropped out" in note and nation.store("nation").run(run)["note"] == ""
        shown = json.loads(nation.atoll("region", "status", "--home", nation.nodes["north"].home, "--json").stdout)
        (below,) = [row for row in shown["below"]["runs"] if row["run"] == run]
        (above,) = [row for row in shown["above"] if row["run"] == run]
        assert (below["status"], above["status"], below["rounds"]) == ("finished", "finished", ROUNDS)
        model, expected = nation.store("nation").result(run)[1], uninterrupted[1]
        assert any(model[name].tobytes() != array.tobytes() for name, array in expected.items())
    finally:
        nation.start("hill")
        nation.await_connected("hill")
    nation.await_end(run, "hill")
    nation.check_ledgers(run, away=("hill",))


def test_a_city_that_lost_its_sites_comes_back_with_them(nation: Nation) -> None:
    """And when the nation cancels the run, everybody below hears of it."""
    run = nation.submit("back", run={"deadline_s": 12}, rounds=100_000)
    nation.await_rounds(run, 5)
    nation.nodes["ann"].kill()
    until(lambda: "harbour dropped out" in nation.store("north").run(run)["note"], "harbour's dropout")
    left = nation.rounds("harbour", run)
    nation.start("ann")
    until(lambda: nation.rounds("harbour", run) > left, "harbour is asked again")
    refused = nation.atoll("coordinator", "cancel", run, "--home", nation.nodes["hill"].coordinator_home, code=1)
    assert "asked from above" in refused.stderr
    nation.atoll("coordinator", "cancel", run, "--home", nation.nodes["nation"].home)
    for level in BELOW:
        until(lambda level=level: nation.store(level).run(run)["status"] == "cancelled", f"the end at {level}")
    for site in SITES:
        until(lambda site=site: nation.nodes[site].status(run) == "cancelled", f"the end at {site}")
    nation.check_ledgers(run, away=tuple(PARENT))
