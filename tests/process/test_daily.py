"""``atoll daily`` with a process for each party: sites killed, restarted or away, and the job itself killed."""

from __future__ import annotations

import datetime as dt
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests import forked

from atoll.runtime.home import CoordinatorHome

pytestmark = pytest.mark.slow
SITES = ("east", "north", "south", "west")
BEGIN, PARTIAL = dt.date(2020, 1, 1), 3
SCHEMA: dict[str, Any] = {
    "name": "series", "max_rows": 2000,
    "columns": {
        "date": {"dtype": "date", "role": "time", "grain": "1d", "missing": "forbid"},
        "city": {"dtype": "text", "missing": "forbid"},
        "cases": {"dtype": "integer", "range": [0, 500], "missing": "forbid"},
        "population": {"dtype": "integer", "range": [0, 100_000_000], "missing": "forbid"},
    },
}  # fmt: skip
PLAN: dict[str, Any] = {
    "atoll": 1, "name": "control", "dataset": "trial", "schema": SCHEMA, "program": "epidemic.daily",
    "params": {
        "series": {"date": "date", "city": "city", "cases": "cases", "population": "population"},
        "models": [{
            "days": 7, "weights": [1.0, 2.0],
            "model": {"kind": "linear", "family": "poisson", "features": ["cases"], "target": "cases"},
        }],
        "seir_days": 0,
    },
    "protection": "secagg", "cohort": {"sites": list(SITES), "min_sites": 3}, "run": {"seed": 1, "deadline_s": 60},
}  # fmt: skip
POLICY = {
    "programs": ["epidemic.*", "statistics.*"], "purposes": ["research"], "protections": ["secagg"], "min_sites": 3,
    "min_group_size": 5, "share": ["risk"], "approval": "manual", "roster": "automatic",
}  # fmt: skip


def table(site: str, days: int = 60) -> str:
    """A region's series of three cities."""
    generator = np.random.default_rng([*site.encode()])
    cases = generator.poisson(8 * np.exp(-(((np.arange(120) - 60) / 15) ** 2)) + 1, (3, 120))
    rows = [f"{BEGIN + dt.timedelta(d)},{c},{cases[c, d]},{10**7}" for d in range(days) for c in range(3)]
    return "\n".join(["date,city,cases,population", *rows, ""])


def plan_of(folder: Path, **run: Any) -> Path:
    path = folder / f"control{len(list(folder.glob('control*')))}.yaml"
    path.write_text(yaml.safe_dump({**PLAN, "run": {**PLAN["run"], **run}}, sort_keys=False))
    return path


@dataclass
class Job:
    """``atoll daily`` at work, and what it says."""

    process: forked.Process
    log: Path

    def told(self) -> str:
        return self.log.read_text()

    def ended(self, code: int = 0) -> str:
        """What it said, once it has ended with *code*."""
        assert self.process.wait(300) == code, self.told()
        return self.told()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """``start(…)``: ``atoll daily`` with arguments, going on by itself; ended with the test."""
    started: list[Job] = []

    def call(*arguments: str | Path) -> Job:
        log = tmp_path / f"job{len(started)}.log"
        with log.open("wb") as file:
            started.append(Job(forked.start("daily", *arguments, output=file), log))
        return started[-1]

    yield call
    for job in started:
        job.process.kill()
        job.process.wait()


def outcome(out: Path, day: str = "") -> dict[str, Any]:
    """What was told of a day (default: the only one)."""
    (entry,) = [e for e in json.loads((out / "history.json").read_text())["days"] if day in ("", e["day"])]
    return dict(json.loads((out / entry["day"] / "result.json").read_text())["output"]["epidemic"])


# ---------------------------------------------------------------- a live federation


@pytest.fixture(scope="module")
def regions(shared_federation: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Four regions' offices and their coordinator; operators approved the daily plan for good."""
    made = type(shared_federation)(tmp_path_factory.mktemp("regions") / "federation")
    made.folder.mkdir()
    port, enrol_port = made.ports
    made.as_coordinator("init", "--federation", "regions", "--port", str(port), "--enrol-port", str(enrol_port))
    made.start_coordinator()
    for site in SITES:
        made.data(site).write_text(table(site))
        party = made.join(site)
        party.stop()
        (party.home / "policy.yaml").write_text(yaml.safe_dump(POLICY))
        party.start()
    made.await_connected(*SITES)
    yield made
    made.stop()


def ledgers(regions: Any) -> dict[str, Counter[str]]:
    """How often each site released what; all ledgers are verified."""
    found = {}
    for site in SITES:
        path = regions.folder / f"{site}.jsonl"
        regions.atoll("ledger", "export", regions.sites[site].home, path)
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        bodies = [entry["body"] for entry in entries if entry["kind"] == "release"]
        found[site] = Counter(f"{b['run']} {b['round']} {b['attempt']} {b['step']}" for b in bodies)
    regions.atoll("ledger", "export", regions.coordinator.home, regions.folder / "coordinator.jsonl")
    regions.atoll("ledger", "verify", *(regions.folder / f"{name}.jsonl" for name in ("coordinator", *SITES)))
    return found


def approve(regions: Any, wait_until: Callable[..., Any], *options: str) -> str:
    """Every site's operator approves the one study that waits; returns its run."""
    for site in SITES:

        def waits(site: str = site) -> Any:
            return json.loads(regions.as_site(site, "pending", "--json").stdout)

        (study,) = wait_until(waits, f"a study waits at {site}")
        regions.as_site(site, "approve", study["run"], *options)
    return str(study["run"])


def test_days_of_a_federation(regions: Any, start: Any, wait_until: Any, tmp_path: Path) -> None:
    plan, out = plan_of(regions.folder), tmp_path / "out"
    call = (plan, "--home", regions.coordinator.home, "--out", out)
    first = start(*call)
    approve(regions, wait_until, "--standing")
    told = first.ended()
    assert str(BEGIN + dt.timedelta(59)) in told and (out / str(BEGIN + dt.timedelta(59)) / "report.html").is_file()
    undisturbed, before = outcome(out), ledgers(regions)
    assert not undisturbed["partial"] and set(before["west"].values()) == {1}

    assert "nobody was asked" in start(*call).ended()
    assert ledgers(regions) == before, "nothing is released a second time"

    west = regions.sites["west"]
    west.signal(signal.SIGSTOP)  # the run is open at the others, and waits for it
    third = start(*call, "--again")
    runs = {row["run"] for row in regions.store.runs()}
    run = wait_until(lambda: {row["run"] for row in regions.store.runs()} - runs, "the run is submitted").pop()
    wait_until(lambda: regions.site_row("east", run)[0] == "running", "the run is open at east, approved for good")
    west.kill()
    west.start()
    third.ended()
    assert outcome(out) == undisturbed
    assert all(set(released.values()) == {1} for released in ledgers(regions).values())

    west.kill()
    away = tmp_path / "away"
    earlier = str(
        BEGIN + dt.timedelta(50)
    )  # the same day once more, without west, would tell west's own: it is refused
    call = (plan_of(regions.folder, deadline_s=15), "--day", earlier, "--home", regions.coordinator.home, "--out", away)
    fourth = start(*call)
    try:
        for site in SITES[:3]:
            (study,) = wait_until(
                lambda site=site: json.loads(regions.as_site(site, "pending", "--json").stdout), f"it waits at {site}"
            )
            regions.as_site(site, "approve", study["run"])
        told = fourth.ended(PARTIAL)
    finally:
        west.start()
        regions.await_connected("west")
    assert "absent: west" in told
    found = outcome(away)
    assert found["partial"] and found["absent"] == ["west"] and found["joint"]["risk"] > 0


# ---------------------------------------------------------------- processes of the sandbox


@pytest.fixture
def sandbox(tmp_path: Path) -> tuple[str | Path, ...]:
    """The beginning of a call over gRPC on this machine."""
    for site in SITES:
        (tmp_path / f"{site}.csv").write_text(table(site))
    (tmp_path / "sites.yaml").write_text(yaml.safe_dump({site: {"path": f"{site}.csv"} for site in SITES}))
    return (plan_of(tmp_path), "--sites", tmp_path / "sites.yaml", "--data", tmp_path)


def process_of(home: Path) -> int:
    """The process that runs the party with this folder."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = place.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(home).encode() in words:
            return int(place.parent.name)
    raise AssertionError(f"nobody runs {home}")


def under_way(out: Path, job: Job) -> bool:
    """Are the sites connected, and is the run submitted or open?"""
    assert job.process.poll() is None, job.told()
    try:
        run = json.loads((out / "open.json").read_text())["run"]
    except FileNotFoundError:
        return False
    store = CoordinatorHome(out / "parties" / "coordinator").store()
    found = {row["run"]: row["status"] for row in store.runs()}.get(run, "held")
    store.close()
    return found != "held"


def check_ledgers(out: Path, runs: int = 1) -> None:
    """Each release once, in so many runs, in ledgers that hold together."""
    found: Counter[str] = Counter()
    for path in (out / "ledger").glob("*.jsonl"):
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        bodies = [entry["body"] for entry in entries if entry["kind"] == "release"]
        found += Counter(f"{path.stem} {b['run']} {b['round']} {b['attempt']} {b['step']}" for b in bodies)
    assert set(found.values()) == {1} and len({key.split()[1] for key in found}) == runs
    assert forked.run("ledger", "verify", *(out / "ledger").glob("*.jsonl")).returncode == 0


def test_a_killed_site_and_a_killed_job(sandbox: Any, start: Any, wait_until: Any, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    start(*sandbox, "--out", undisturbed).ended()

    site_killed = tmp_path / "site"
    job = start(*sandbox, "--transport", "grpc", "--out", site_killed)
    wait_until(lambda: under_way(site_killed, job), "the run is under way", 300)
    os.kill(process_of(site_killed / "parties" / "west"), signal.SIGKILL)
    job.ended()
    assert outcome(site_killed) == outcome(undisturbed)
    check_ledgers(site_killed)

    job_killed = tmp_path / "job"
    job = start(*sandbox, "--transport", "grpc", "--out", job_killed)
    wait_until(lambda: under_way(job_killed, job), "the run is under way", 300)
    job.process.kill()
    job.process.wait()
    begun = json.loads((job_killed / "open.json").read_text())["run"]
    start(*sandbox, "--transport", "grpc", "--out", job_killed).ended()
    assert outcome(job_killed) == outcome(undisturbed)
    assert json.loads((job_killed / "history.json").read_text())["days"][0]["run"] == begun
    check_ledgers(job_killed)
    store = CoordinatorHome(job_killed / "parties" / "coordinator").store()
    assert [row["run"] for row in store.runs()] == [begun]
    store.close()
