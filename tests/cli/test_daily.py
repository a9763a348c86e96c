"""``atoll daily``: made once, told again, finished when it was broken off, partial without a site."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from atoll.cli.daily import PARTIAL
from atoll.cli.main import app
from atoll.contract.errors import AtollError
from atoll.contract.plan import Plan
from atoll.contract.schema import TableSchema
from atoll.models import stored
from atoll.models.model import make
from atoll.runtime.daily import OnThisMachine, for_day, locked, make_day
from atoll.runtime.home import CoordinatorHome
from atoll.runtime.sandbox import read_sites

SITES = ("east", "north", "south", "west")
BEGIN = dt.date(2020, 1, 1)
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
    "atoll": 1, "name": "control", "dataset": "series", "schema": SCHEMA, "program": "epidemic.daily",
    "params": {
        "series": {"date": "date", "city": "city", "cases": "cases", "population": "population"},
        "models": [{
            "days": 7, "weights": [1.0, 2.0],
            "model": {"kind": "linear", "family": "poisson", "features": ["cases"], "target": "cases"},
        }],
        "seir_days": 0,
    },
    "protection": "secagg", "cohort": {"min_sites": 3}, "run": {"seed": 1, "deadline_s": 20},
}  # fmt: skip


def write(folder: Path, days: int, *, late: Sequence[str] = ()) -> Path:
    """Four regions' tables until so many days after the beginning (of *late* ones: one less), and sites.yaml."""
    folder.mkdir(exist_ok=True)
    for number, site in enumerate(SITES):
        generator = np.random.default_rng(number)
        cases = generator.poisson(8 * np.exp(-(((np.arange(120) - 60) / 15) ** 2)) + 1, (3, 120))
        lines = ["date,city,cases,population"]
        for day in range(days - (site in late)):
            lines += [f"{BEGIN + dt.timedelta(day)},{c},{cases[c, day]},{(number + 1) * 10**7}" for c in range(3)]
        (folder / f"{site}.csv").write_text("\n".join([*lines, ""]))
    (folder / "sites.yaml").write_text(yaml.safe_dump({site: {"path": f"{site}.csv"} for site in SITES}))
    plan = folder / "plan.yaml"
    plan.write_text(yaml.safe_dump(PLAN, sort_keys=False))
    return plan


class Job:
    """``atoll daily`` in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.plan = folder, folder / "out", write(folder, 60)

    def call(self, *options: str | Path, code: int = 0) -> str:
        """What it prints; it must exit with *code*."""
        named = ["daily", self.plan, "--sites", self.folder / "sites.yaml", "--data", self.folder, "--out", self.out]
        done = CliRunner().invoke(app, [*map(str, [*named, *options])], env={"COLUMNS": "400"})
        assert done.exit_code == code, (done.output, done.exception)
        return done.output

    def fails(self, *options: str | Path) -> AtollError:
        named = ["daily", self.plan, "--sites", self.folder / "sites.yaml", "--data", self.folder, "--out", self.out]
        done = CliRunner().invoke(app, [*map(str, [*named, *options])])
        assert isinstance(done.exception, AtollError), done.output
        return done.exception

    def history(self) -> list[dict[str, Any]]:
        return list(json.loads((self.out / "history.json").read_text())["days"])

    def released(self) -> Counter[str]:
        """How often each site released what, in all runs."""
        found: Counter[str] = Counter()
        for path in (self.out / "ledger").glob("*.jsonl"):
            for line in path.read_text().splitlines():
                if (entry := json.loads(line))["kind"] == "release":
                    body = entry["body"]
                    found[f"{path.stem} {body['run']} {body['round']} {body['attempt']} {body['step']}"] += 1
        return found

    def verify(self) -> None:
        done = CliRunner().invoke(app, ["ledger", "verify", *map(str, (self.out / "ledger").glob("*.jsonl"))])
        assert done.exit_code == 0, done.output


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "job")


def day(number: int) -> str:
    """The last day of tables of so many days."""
    return str(BEGIN + dt.timedelta(number - 1))


def test_a_day_is_made_once_and_the_next_day_follows(job: Job) -> None:
    told = job.call()
    assert day(60) in told and "joint risk" in told
    made = job.out / day(60)
    assert (made / "report.html").read_text().startswith("<!doctype html>")
    result, released = json.loads((made / "result.json").read_text()), job.released()
    assert result["output"]["epidemic"]["day"] == day(60) and not result["output"]["epidemic"]["partial"]
    assert released and set(released.values()) == {1}
    again = job.call()
    assert "nobody was asked" in again and day(60) in again
    assert job.released() == released and len(job.history()) == 1
    write(job.folder, 61)
    job.call()
    assert [entry["day"] for entry in job.history()] == [day(60), day(61)]
    assert len({entry["plan_hash"] for entry in job.history()}) == 1, "one approved plan serves every day"
    assert job.released() > released, "the ledgers go on"
    job.verify()


def test_an_absent_region_makes_the_day_partial(job: Job) -> None:
    (job.folder / "west.csv").unlink()
    told = job.call(code=PARTIAL)
    assert "absent: west" in told and "there is no readable file" in told and "--again" in told
    assert job.history()[0]["partial"] and list(job.history()[0]["absent"]) == ["west"]
    assert "absent: west" in job.call(code=PARTIAL)
    write(job.folder, 60)
    job.call("--again")
    (entry,) = job.history()
    assert not entry["partial"] and entry["absent"] == {}
    job.verify()


def broken_off(job: Job, at: int) -> None:
    """A call that ends, as if it were killed, when it asks its round number *at*."""

    def tell(event: Mapping[str, Any]) -> None:
        if event.get("round") == at:
            raise KeyboardInterrupt

    plan = for_day(Plan.load(job.plan), None)
    with locked(job.out), contextlib.ExitStack() as open_:
        parties = OnThisMachine(plan, read_sites(job.folder / "sites.yaml"), job.folder, job.out, "local")
        open_.callback(parties.close)
        with pytest.raises(KeyboardInterrupt):
            make_day(plan, parties, job.out, day=None, again=False, page=lambda *_: None, tell=tell)


@pytest.mark.parametrize("at", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_day_that_was_broken_off_is_the_same_run(job: Job, at: int) -> None:
    broken_off(job, at)
    begun = json.loads((job.out / "open.json").read_text())
    assert not (job.out / "history.json").exists() and not (job.out / day(60)).exists()
    job.call()
    (entry,) = job.history()
    assert entry["run"] == begun["run"] and not (job.out / "open.json").exists()
    assert set(job.released().values()) == {1} and {key.split()[1] for key in job.released()} == {entry["run"]}
    job.verify()
    other = Job(job.folder / "undisturbed")
    other.call()
    results = [json.loads((one.out / day(60) / "result.json").read_text())["output"] for one in (job, other)]
    assert results[0] == results[1]


def test_yesterdays_run_is_finished_before_today(job: Job) -> None:
    broken_off(job, 2)
    write(job.folder, 61)
    assert day(61) in job.call()
    assert [entry["day"] for entry in job.history()][-1] == day(61)
    assert set(job.released().values()) == {1}
    job.verify()


@pytest.mark.slow
def test_a_run_of_another_plan_is_given_up(job: Job) -> None:
    broken_off(job, 2)
    before = json.loads((job.out / "open.json").read_text())["run"]
    changed = {**PLAN, "params": {**PLAN["params"], "ceiling_per_100k": 0.5}}
    job.plan.write_text(yaml.safe_dump(changed))
    job.call()
    (entry,) = job.history()
    assert entry["run"] != before
    store = CoordinatorHome(job.out / "parties" / "coordinator").store()
    assert store.run(before)["status"] == "cancelled"
    assert not any(store.owed_closes(site) for site in SITES), "the sites were told"
    store.close()
    job.verify()


def test_an_earlier_day_by_another_plan(job: Job) -> None:
    job.call()
    job.call("--day", day(50))
    first, second = job.history()
    assert (first["day"], second["day"]) == (day(50), day(60)) and first["plan_hash"] != second["plan_hash"]
    assert "nobody was asked" in job.call("--day", day(50))


def test_one_late_region_does_not_move_the_day(job: Job) -> None:
    write(job.folder, 60, late=["west"])
    told = job.call()
    assert day(60) in told and "late: west" in told


def test_two_at_once(job: Job) -> None:
    with locked(job.out):
        error = job.fails()
    assert error.code == "daily.busy" and error.remedy


def test_the_processes_of_a_call_that_was_killed_are_waited_for(tmp_path: Path) -> None:
    with locked(tmp_path) as held:
        left = os.dup(held)  # as a process of a party has it, which outlives the call
    entered = threading.Event()

    def call() -> None:
        with locked(tmp_path):
            entered.set()

    calling = threading.Thread(target=call)
    calling.start()
    assert not entered.wait(0.3)
    os.close(left)
    calling.join(60)
    assert entered.is_set()


@pytest.mark.parametrize(
    ("change", "options", "code"),
    [
        ({"program": "statistics.describe", "params": {}}, (), "daily.no-days"),
        ({}, ("--day", "yesterday"), "daily.bad-day"),
        ({}, ("--day", "20200201"), "daily.bad-day"),
        ({"cohort": {"min_sites": 5}}, (), "cohort.too-small"),
    ],
)
def test_what_goes_wrong_is_told(job: Job, change: dict[str, Any], options: tuple[str, ...], code: str) -> None:
    job.plan.write_text(yaml.safe_dump({**PLAN, **change}))
    error = job.fails(*options)
    assert error.code == code and error.remedy
    assert not (job.out / "open.json").exists() and not (job.out / "history.json").exists()


def test_a_broken_table_is_told_with_its_site(job: Job) -> None:
    text = (job.folder / "south.csv").read_text()
    (job.folder / "south.csv").write_text(text.replace(f"{day(60)},0", f"{day(60)},", 1))
    assert job.fails().where["site"] == "south"


# ---------------------------------------------------------------- installed models


def test_a_model_is_installed_and_named_by_a_plan(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*arguments: str | Path, code: int = 0) -> Any:
        done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "400"})
        assert done.exit_code == code, (done.output, done.exception)
        return done

    spec = {"kind": "linear", "family": "poisson", "features": ["cases"], "target": "cases"}
    model = make(spec, TableSchema.model_validate(SCHEMA)).with_weights(np.array([1.0, 2.0]))
    stored.save(tmp_path / "model", {"model": {"spec": spec, "layers": ["weights"]}, "schema": SCHEMA}, model.arrays())
    template = {**PLAN, "params": {**PLAN["params"], "models": [{"days": 7, "model": {"base": {"name": "weekly"}}}]}}
    job.plan.write_text(yaml.safe_dump(template))
    named = ("--name", "weekly", "--models", tmp_path / "models", "--plan", job.plan)
    assert call("install", tmp_path / "model", *named, code=1).exception.code == "install.plan"
    call("install", tmp_path / "model", *named, "--out", tmp_path / "filled.yaml")
    filled = Plan.load(tmp_path / "filled.yaml")
    digest = hashlib.sha256((tmp_path / "models" / "weekly.safetensors").read_bytes()).hexdigest()
    assert filled.params["models"][0]["model"] == {**spec, "base": {"name": "weekly", "sha256": digest}}
    assert filled.table == Plan.load(job.plan).table
    other = call("install", tmp_path / "model", "--name", "yearly", *named[2:], "--out", tmp_path / "o.yaml", code=1)
    assert other.exception.code == "install.no-place" and not (tmp_path / "models" / "yearly.safetensors").exists()

    job.plan = tmp_path / "filled.yaml"
    monkeypatch.setenv("ATOLL_MODELS", str(tmp_path / "models"))
    assert "joint risk" in job.call()
    inline = Job(tmp_path / "inline")
    inline.call()
    results = [json.loads((one.out / day(60) / "result.json").read_text())["output"] for one in (job, inline)]
    assert results[0]["epidemic"]["joint"] == results[1]["epidemic"]["joint"]


def test_a_region_whose_table_has_no_rows_is_absent(job: Job) -> None:
    table = job.folder / "west.csv"
    table.write_text(table.read_text().splitlines()[0] + "\n")
    told = job.call(code=PARTIAL)
    assert "absent: west (the table has no rows" in told and "check the site's source" in told


def test_a_site_without_a_column_is_named_with_the_remedy(job: Job) -> None:
    recipe = {"version": "1", "clean": [{"step": "numbers", "columns": ["population"]}]}
    job.plan.write_text(yaml.safe_dump({**PLAN, "recipe": recipe}, sort_keys=False))
    table = job.folder / "north.csv"
    table.write_text(table.read_text().replace("population", "residents", 1))
    error = job.fails()
    assert (error.code, error.field, error.where["site"]) == ("recipe.no-column", "population", "north")
    assert "rename" in error.remedy
