"""A real federation for tests: the command line, one process per party, TLS on loopback.

``federation`` is one that all tests share: three sites that approve everything, alive and connected
whenever a test begins. Further sites can join it. Parties can be killed, stopped and started again;
what is still running at the end is ended by its own process id.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests import forked
from tests.free_ports import free_ports

from atoll.runtime.home import CoordinatorHome, SiteHome
from atoll.runtime.store import RunStore

SITES = ("alpha", "beta", "gamma")
FEATURES = ("age", "dose", "score", "weight")
PATIENCE_S = 300.0
"""For a condition that must come true; long, because the machine may be busy with other things."""

SCHEMA: dict[str, Any] = {
    "name": "trial",
    "max_rows": 100_000,
    "columns": {
        **{name: {"dtype": "real", "range": [-10, 10], "missing": "forbid"} for name in FEATURES},
        "cured": {"dtype": "integer", "values": [0, 1], "role": "label", "missing": "forbid"},
    },
}
POLICY: dict[str, Any] = {
    "programs": ["statistics.*", "horizontal.*"],
    "purposes": ["research"],
    "protections": ["plain"],
    "min_sites": 1,
    "share": ["rows", "metrics"],
    "approval": "automatic",
    "roster": "automatic",
}
PLAN: dict[str, Any] = {
    "atoll": 1,
    "name": "trial",
    "dataset": "trial",
    "schema": SCHEMA,
    "program": "horizontal.fedavg",
    "params": {"family": "logistic", "target": "cured", "features": list(FEATURES), "rounds": 300, "batch_size": 256},
    "protection": "plain",
    "cohort": {"sites": list(SITES), "min_sites": 3, "on_dropout": "fail"},
    "run": {"seed": 11, "holdout": 0.25, "deadline_s": 120},
}
ENVIRONMENT = dict(forked.ENVIRONMENT)


def until(ready: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """Wait for *ready* to give something true, and return it; a test fails when it never does."""
    end = time.monotonic() + patience_s
    while not (found := ready()):
        if time.monotonic() > end:
            pytest.fail(f"{what} did not happen within {patience_s:g} s")
        time.sleep(0.02)
    return found


def table(site: str, rows: int = 2000) -> str:
    """A site's CSV table: features from a normal distribution of its own, labels from one logistic law."""
    generator = np.random.default_rng([7, *site.encode()])
    values = np.clip(generator.normal(generator.normal(0, 0.5), 1.5, (rows, len(FEATURES))), -10, 10)
    odds = values @ np.array([0.8, -0.5, 0.3, 0.0]) + 0.2
    labels = generator.random(rows) < 1 / (1 + np.exp(-odds))
    lines = [",".join([*(repr(float(v)) for v in row), str(int(y))]) for row, y in zip(values, labels, strict=True)]
    return "\n".join([",".join([*FEATURES, "cured"]), *lines, ""])


def open_releases(ledger: Sequence[Mapping[str, Any]], run: str) -> list[int]:
    """Releases of *run* in a site's ledger that have no receipt."""
    received = {entry["body"]["of"] for entry in ledger if entry["kind"] == "receipt"}
    released = [e["seq"] for e in ledger if e["kind"] == "release" and e["body"]["run"] == run]
    return [seq for seq in released if seq not in received]


class Party:
    """One party's process: ``atoll coordinator up`` or ``atoll site up``."""

    def __init__(self, name: str, home: Path) -> None:
        self.name, self.home, self.log = name, home, home.parent / f"{name}.log"
        self.process: subprocess.Popen[bytes] | forked.Process | None = None
        self._began = 0

    @property
    def kind(self) -> str:
        return "coordinator" if self.name == "coordinator" else "site"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self, before: Callable[[], None] | None = None) -> None:
        """Start the process; with *before*, which runs in it first, it is an interpreter of its own."""
        arguments = [self.kind, "up", "--verbose", "--home", str(self.home)]
        with self.log.open("ab") as log:
            self._began = log.tell()
            if before is None:
                self.process = forked.start(*arguments, output=log, environment=ENVIRONMENT)
                return
            self.process = subprocess.Popen(
                [sys.executable, "-m", "atoll", *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ENVIRONMENT, preexec_fn=before,
            )  # fmt: skip

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this very process."""
        assert self.process is not None and self.process.poll() is None, f"{self.name} ended: {self.text()[-2000:]}"
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it at once, without a chance to tidy up."""
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        assert self.process is not None
        return self.process.wait(PATIENCE_S)

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """End it whatever state it is in."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def text(self) -> str:
        """Everything it has printed and logged since it was last started."""
        return self.log.read_bytes()[self._began :].decode(errors="replace") if self.log.exists() else ""


class Federation:
    """A coordinator and sites, set up and operated by the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = free_ports(2)
        self.coordinator = Party("coordinator", folder / "coordinator")
        self.sites: dict[str, Party] = {}
        self.tokens: dict[str, str] = {}
        self.exports = 0
        self._store: RunStore | None = None

    @property
    def parties(self) -> dict[str, Party]:
        return {"coordinator": self.coordinator, **self.sites}

    # -- the command line

    def atoll(self, *arguments: str | Path, code: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """``python -m atoll`` with *arguments*; it must exit with *code*, and never with a traceback."""
        done = forked.run(*arguments, stdin=stdin, environment=ENVIRONMENT)
        told = f"atoll {' '.join(map(str, arguments))} → {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == code, told
        assert "Traceback" not in done.stderr, told
        return done

    def as_coordinator(self, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """``atoll coordinator …`` for this federation."""
        command, *rest = arguments
        return self.atoll("coordinator", command, *rest, "--home", self.coordinator.home, **options)

    def as_site(self, site: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """``atoll site …`` for one of its sites."""
        command, *rest = arguments
        return self.atoll("site", command, *rest, "--home", self.sites[site].home, **options)

    # -- setting up

    def set_up(self) -> Federation:
        """Init, up, invite, init and up of everybody; returns when all sites are connected."""
        self.folder.mkdir(parents=True, exist_ok=True)
        port, enrol_port = self.ports
        self.as_coordinator("init", "--federation", "tests", "--port", str(port), "--enrol-port", str(enrol_port))
        self.start_coordinator()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self.join, SITES))
        self.await_connected()
        return self

    def join(self, site: str, before: Callable[[], None] | None = None) -> Party:
        """Invite *site*, make its table, let it join by its token, and start it (*before* runs in it first)."""
        party = self.sites.setdefault(site, Party(site, self.folder / site))
        self.tokens[site] = json.loads(self.as_coordinator("invite", site, "--json").stdout)["token"]
        data = self.data(site)
        if not data.exists():
            data.write_text(table(site))
        party.home.mkdir(exist_ok=True)
        self.as_site(site, "init", "--token", "-", "--dataset", f"trial={data}", stdin=self.tokens[site])
        (party.home / "policy.yaml").write_text(yaml.safe_dump(POLICY))
        party.start(before)
        return party

    @contextlib.contextmanager
    def policy(self, site: str, **changes: Any) -> Iterator[None]:
        """Within the block, *site* runs under another policy; it is restarted before and after."""
        self._restart_under(site, {**POLICY, **changes})
        try:
            yield
        finally:
            self._restart_under(site, POLICY)

    def _restart_under(self, site: str, policy: Mapping[str, Any]) -> None:
        party = self.sites[site]
        party.stop()
        (party.home / "policy.yaml").write_text(yaml.safe_dump(dict(policy)))
        party.start()
        self.await_connected(site)

    def data(self, site: str) -> Path:
        """A site's table."""
        return self.folder / f"{site}.csv"

    def start_coordinator(self) -> None:
        """Start the coordinator and wait until it listens."""
        self.coordinator.start()
        place = self.coordinator.home / "listening.json"

        def listens() -> bool:
            assert self.coordinator.running(), self.coordinator.text()[-2000:]
            try:
                return bool(json.loads(place.read_text())["pid"] == self.coordinator.pid)
            except (OSError, ValueError):
                return False

        until(listens, "the coordinator's start")

    def await_connected(self, *sites: str) -> None:
        """Wait until the last thing that each site told is that it is connected."""

        def connected() -> bool:
            for name in sites or SITES:
                assert self.sites[name].running(), self.sites[name].text()[-2000:]
            return all(self._state(name) == "connected" for name in sites or SITES)

        until(connected, "the sites' connection")

    def _state(self, site: str) -> str:
        told = [line for line in self.sites[site].text().splitlines() if line.startswith(f"{site}: ")]
        return told[-1].removeprefix(f"{site}: ") if told else ""

    def stop(self) -> None:
        """End every process and give back what is open here."""
        for party in self.parties.values():
            party.stop()
        if self._store is not None:
            self._store.close()

    # -- operating

    def plan(self, name: str = "trial", **changes: Any) -> Path:
        """A plan file: PLAN with *changes*, key by key (mappings are merged)."""
        content = {**PLAN, "name": name}
        for key, value in changes.items():
            content[key] = {**content[key], **value} if isinstance(value, dict) and key in content else value
        path = self.folder / f"{name}.plan.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    def submit(self, name: str = "trial", **changes: Any) -> str:
        """Submit a plan (see :meth:`plan`); returns the run's id."""
        submitted = self.as_coordinator("submit", self.plan(name, **changes), "--json")
        return str(json.loads(submitted.stdout)["run"])

    @property
    def store(self) -> RunStore:
        """The coordinator's run store, read beside the running coordinator."""
        if self._store is None:
            self._store = CoordinatorHome(self.coordinator.home).store()
        return self._store

    def row(self, run: str) -> dict[str, Any]:
        """A run as the coordinator's store has it now (status, note …)."""
        return self.store.run(run)

    def rounds(self, run: str) -> int:
        """How many rounds of a run are finished."""
        return len(self.store.rounds(run))

    def await_rounds(self, run: str, number: int) -> None:
        """Wait until at least *number* rounds are finished, while the run goes on."""

        def there() -> bool:
            row = self.row(run)
            assert row["status"] in ("submitted", "running"), f"{row['status']}: {row['note']}"
            return self.rounds(run) >= number

        until(there, f"round {number}")

    def await_status(self, run: str, status: str) -> dict[str, Any]:
        """Wait until a run has *status* at the coordinator, or another end; returns its row."""

        def ended() -> bool:
            assert self.coordinator.running(), self.coordinator.text()[-3000:]
            return self.row(run)["status"] in {"finished", "failed", "cancelled", status}

        until(ended, f"the run's end ({status})")
        row = self.row(run)
        assert row["status"] == status, f"{row['status']}: {row['note']}\n{self.coordinator.text()[-3000:]}"
        return row

    def await_told(self, run: str) -> None:
        """Wait until every site has heard that a run is finished, and with it has its last receipts."""
        for site in SITES:
            until(lambda site=site: self.site_row(site, run)[0] == "finished", f"{site} hears the end")

    def revive(self) -> None:
        """Start whoever has ended, and wait until all are connected."""
        if not self.coordinator.running():
            self.start_coordinator()
        for name in SITES:
            if not self.sites[name].running():
                self.sites[name].start()
        self.await_connected(*SITES)

    def cancel_all(self) -> None:
        """Cancel what is still going, so that a test's failure stays its own."""
        for row in self.store.runs():
            if row["status"] in ("submitted", "running"):
                self.as_coordinator("cancel", row["run"])
                self.await_status(row["run"], "cancelled")

    def status(self, run: str) -> dict[str, Any]:
        """The run in ``atoll coordinator status --json``."""
        shown = json.loads(self.as_coordinator("status", "--json").stdout)
        (row,) = [row for row in shown["runs"] if row["run"] == run]
        return dict(row)

    def site_row(self, site: str, run: str) -> tuple[str, str]:
        """(status, note) of a run in a site's journal, read beside the running site; ("", "") if it knows of none."""
        place = f"file:{self.sites[site].home / 'journal.db'}?mode=ro"
        with contextlib.closing(sqlite3.connect(place, uri=True, timeout=30)) as journal:
            return journal.execute("SELECT status, note FROM run WHERE run = ?", (run,)).fetchone() or ("", "")

    def site_status(self, site: str, run: str) -> dict[str, Any]:
        """The run in ``atoll site status --json`` of a site."""
        (row,) = [row for row in json.loads(self.as_site(site, "status", "--json").stdout) if row["run"] == run]
        return dict(row)

    # -- results and ledgers

    def ledgers(self) -> dict[str, list[dict[str, Any]]]:
        """Every party's entries, exported, after `atoll ledger verify` found them all intact."""
        self.exports += 1
        folder = self.folder / f"ledger-{self.exports}"
        folder.mkdir()
        files = {name: folder / f"{name}.jsonl" for name in self.parties}
        self.store.export_ledger(files["coordinator"])
        for name, party in self.sites.items():
            with contextlib.closing(SiteHome(party.home).journal()) as journal:
                journal.export(files[name])
        assert "intact" in self.atoll("ledger", "verify", *files.values()).stdout
        return {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in files.items()}

    def check_once(self, run: str, rounds: int, ledgers: Mapping[str, list[dict[str, Any]]] | None = None) -> None:
        """Ledgers hold together, and every site released every round's reply exactly once, and has its receipt."""
        self.await_told(run)
        ledgers = ledgers or self.ledgers()
        acknowledged = Counter(
            (leaf["site"], entry["body"]["round"])
            for entry in ledgers["coordinator"]
            if entry["kind"] == "received" and entry["body"]["run"] == run
            for leaf in entry["leaves"]
        )
        for site in SITES:
            released = Counter(
                (entry["body"]["round"], entry["body"]["step"])
                for entry in ledgers[site]
                if entry["kind"] == "release" and entry["body"]["run"] == run
            )
            assert released == Counter({(number, "reply"): 1 for number in range(rounds)}), site
            assert {n: acknowledged[site, n] for n in range(rounds)} == dict.fromkeys(range(rounds), 1), site
            assert open_releases(ledgers[site], run) == [], site


@pytest.fixture(scope="session")
def shared_federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A coordinator and three sites, ended with the session."""
    made = Federation(tmp_path_factory.mktemp("federation") / "f")
    try:
        yield made.set_up()
    finally:
        made.stop()


@pytest.fixture
def federation(shared_federation: Federation) -> Federation:
    """The shared federation, alive whatever the test before left of it."""
    shared_federation.revive()
    shared_federation.cancel_all()
    return shared_federation


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    """``wait_until(ready, what)``: poll until *ready* gives something true."""
    return until
