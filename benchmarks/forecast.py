"""Forecasts across sites: traffic speed at four districts, and PM2.5 at twelve stations, from ``examples``.

Of each example the same network, batches, and number of steps a site: ``local`` each site alone, ``fedavg`` all of
them, ``finetune`` an epoch of each site's own after FedAvg, ``fedper`` a head at each site, ``pooled`` all rows in one
place, with as many steps as the sites take together. ``persistence`` says that all stays as it is. Errors are over all
held-out rows, the latest fifth of the time. ``online`` goes through all four years week by week, each first foretold
and then learned from. Of air quality, labels of the last training day are of the first held-out one (24 of 27,000 rows;
likewise from one week to the next); of traffic there is an hour between. Sums are made without masks, which do not
change them.

Learning rate and decay are chosen without held-out rows, on the latest fifth of the training time, for each method by
itself: ``--tune`` tries ``GRID`` in short runs, 15 rounds of 40 steps, of air quality at every third station. The best
turned out to be the same for fedavg, local and pooled, and is in the plans. Those of ``online`` are by the second
year's errors, after the first. Rounds and batches were not chosen so: they are what a few minutes allow.
Data: $ATOLL_DATA or ../shared/data.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.plan import Plan
from atoll.contract.schema import Column
from atoll.data.site_data import SiteData
from atoll.data.table import Table, concatenate
from atoll.models.model import Goal, Model
from atoll.runtime.catalogue import load_installed
from atoll.runtime.sandbox import read_sites
from atoll.statistics.scores import binary_metrics
from benchmarks.learning import driven, driving
from benchmarks.table import Row, main

SEED = 7
GRID = ((0.01, 4), (0.03, 4), (0.1, 4), (0.1, 1))
"""Learning rate, and decay · rounds: how far it falls to the end."""
EXAMPLES = Path(__file__).parents[1] / "examples"
AIR = EXAMPLES / "air-quality"
DATA = Path(os.environ.get("ATOLL_DATA", Path(__file__).parents[2] / "shared" / "data"))
HEAVY = 150
"""µg/m³ of PM2.5: above it is heavy pollution."""
Tables = dict[str, Table]
Models = Mapping[str, Model]


def read(plan: Plan, sites: Path, folder: Path, most: int | None = None) -> Tables:
    """The prepared rows of all sites, or the first *most*, with those marked that are held out."""
    load_installed()
    chosen = list(read_sites(sites).items())[:most]
    return {name: SiteData.read(spec, plan, folder, name).base() for name, spec in chosen}


def traffic(plan: Plan) -> Tables:
    """Four districts."""
    with tempfile.TemporaryDirectory() as folder:
        made = [sys.executable, str(EXAMPLES / "traffic" / "prepare.py"), folder, "--data", str(DATA)]
        subprocess.run(made, check=True)
        found = read(plan, Path(folder) / "sites.yaml", Path(folder))
        return {name: Table(t.schema, {n: t[n] for n in t.columns}, t.held_out) for name, t in found.items()}


def learned(plan: Plan, tables: Tables, methods: tuple[str, ...]) -> Iterator[tuple[str, Models]]:
    """(method, each site's model)."""
    params = dict(plan.params)
    alone: dict[str, Model] = {}
    for name, table in tables.items():
        alone |= driven("horizontal.fedavg", params, {name: table}, SEED)[1]
    yield "local", alone
    for method in methods:
        model, own = driven(f"horizontal.{method}", params, tables, SEED)
        if method == "finetune":  # what it tunes is FedAvg's
            yield "fedavg", dict.fromkeys(tables, model)
        yield method, own
    everything = {**params, "local_steps": params["local_steps"] * len(tables)}
    pooled, _ = driven("horizontal.fedavg", everything, {"pooled": concatenate(list(tables.values()))}, SEED)
    yield "pooled", dict.fromkeys(tables, pooled)


def told(
    study: str, tables: Tables, found: Iterator[tuple[str, Models]], horizons: Mapping[str, str], anchor: str,
    published: Mapping[str, float],
) -> list[Row]:  # fmt: skip
    """One row for each method and horizon: the MAE, with persistence's as peer; RMSE, and MAE by site, beside it."""
    tests, rows = {name: table.parts()[1] for name, table in tables.items()}, list[Row]()
    truth = {name: np.column_stack([test[target] for target in horizons]) for name, test in tests.items()}
    off = {"persistence": {name: newest(test, anchor)[:, None] - truth[name] for name, test in tests.items()}}
    for method, models in found:
        off[method] = {name: models[name].predict(test) - truth[name] for name, test in tests.items()}
        print(study, method, np.abs(np.concatenate([*off[method].values()])).mean(0), file=sys.stderr, flush=True)
    for place, (target, ahead) in enumerate(horizons.items()):
        peer = published[target]
        for method, by_site in off.items():
            whole = np.concatenate([site[:, place] for site in by_site.values()])
            own = {name: float(np.abs(site[:, place]).mean()) for name, site in by_site.items()}
            shown = own if len(own) < 5 else {"best site": min(own.values()), "worst": max(own.values())}
            note = f"RMSE {np.sqrt((whole**2).mean()):.2f}; " + ", ".join(f"{n} {v:.2f}" for n, v in shown.items())
            rows.append(Row(f"{study}, {ahead}, {method}", float(np.abs(whole).mean()), "MAE", peer, note=note))
            if method == "persistence":
                peer = rows[-1].value
    return rows


def newest(table: Table, series: str) -> NDArray[np.float64]:
    """The newest value of a series that each row's window has, [num_rows]; 0 where it has none."""
    found = np.asarray(table[series], np.float64)
    for n in range(1, 12):
        found = np.where(np.isnan(found), table[f"{series}_lag{n}"], found)
    return np.nan_to_num(found)


def alarmed(tables: Tables) -> Tables:
    """With the column "alarm": will the air be heavily polluted in a day?"""
    found = {}
    for name, table in tables.items():
        alarm = (table["PM2.5_ahead24"] > HEAVY).astype(np.float64)
        schema = table.schema.with_columns({"alarm": Column(dtype="integer", values=(0, 1), role="label")})
        found[name] = replace(table, schema=schema, columns={**table.columns, "alarm": alarm})
    return found


def alarms(plan: Plan, tables: Tables) -> list[Row]:
    """AUC of each method's alarm, with persistence's as peer, over all stations' held-out rows; F1 beside it."""
    tests, rows = {name: table.parts()[1] for name, table in tables.items()}, list[Row]()
    truth = np.concatenate([test["alarm"] for test in tests.values()])
    level = np.concatenate([newest(test, "PM2.5") for test in tests.values()])
    scores = {"persistence": 0.5 + (level - HEAVY - 1e-9) / 2000}
    for method, models in learned(plan, tables, ("fedavg",)):
        scores[method] = np.concatenate([models[name].predict(test) for name, test in tests.items()])
    for method, score in scores.items():
        found = binary_metrics(truth, score)
        note = f"F1 {found['f1']:.3f}, {truth.mean():.1%} of the hours ahead are heavily polluted"
        peer = rows[0].value if rows else None
        rows.append(Row(f"PM2.5 > {HEAVY} in 24 h, {method}", found["auc"], "AUC", peer, note=note))
    return rows


def weekly(plan: Plan, tables: Tables) -> NDArray[np.float64]:
    """Of each week: rows, mean error before learning, drift, and sites that saw it, [weeks, 4]."""
    whole = {name: replace(table, held_out=None) for name, table in tables.items()}
    params = {**plan.params, "checkpoint_every": plan.params["rounds"]}
    (last,) = driving("horizontal.online", params, whole, SEED)
    return np.asarray(last["periods"], np.float64)


def online(plan: Plan, tables: Tables, still: Model) -> list[Row]:
    """The mean of both MAEs over the last fifth of the weeks: going on to learn every week, and standing *still*."""
    weeks = plan.params["rounds"]
    start, week = np.datetime64(plan.params["start"]), np.timedelta64(7, "D")
    begin, end = start + round(0.8 * weeks) * week, start + weeks * week
    late = {name: table.rows((table["time"] >= begin) & (table["time"] < end)) for name, table in tables.items()}
    rows = concatenate(list(late.values()))
    truth = np.column_stack([rows[target] for target in still.targets])
    found = weekly(plan, tables)
    told = found[round(0.8 * weeks) :]
    peer = float(np.abs(newest(rows, "PM2.5")[:, None] - truth).mean())
    most = 2 * float(Goal.of(rows.schema, still.targets).half[0])  # of its errors; both targets have one range
    error = most * float(np.average(told[:, 1], weights=told[:, 0]))
    return [
        Row("PM2.5, 1 h and 24 h, last weeks, fedavg", float(np.abs(still.predict(rows) - truth).mean()), "MAE", peer),
        Row("PM2.5, 1 h and 24 h, last weeks, online", error, "MAE", peer,
            note=f"{weeks} weeks, drift in {found[:, 2].sum():.0f} of them"),
    ]  # fmt: skip


def shortened(plan: Plan, quick: bool, **params: Any) -> Plan:
    """*plan* with other parameters; a *quick* one has a few rounds."""
    few = {"rounds": 4} if quick else {}
    return plan.model_copy(update={"params": {**plan.params, **params, **few}})


def roads(quick: bool) -> list[Row]:
    """Speed in 15, 30 and 60 minutes."""
    plan = Plan.load(EXAMPLES / "traffic" / "plan.yaml")
    tables = traffic(plan)
    found = learned(shortened(plan, quick), tables, ("finetune",))
    horizons = {"speed_15": "15 min", "speed_30": "30 min", "speed_60": "60 min"}
    return told("speed (mph)", tables, found, horizons, "speed", {"speed_15": 3.54, "speed_30": 4.34, "speed_60": 5.77})


def stations(quick: bool) -> Tables:
    """Twelve stations."""
    plan = Plan.load(AIR / "forecast.yaml")
    return read(plan, AIR / "sites.yaml", DATA / "beijing-air-quality", 3 if quick else None)


def air(quick: bool) -> list[Row]:
    """PM2.5 in an hour and in a day, and online."""
    forecast, stream = (Plan.load(AIR / f"{name}.yaml") for name in ("forecast", "online"))
    tables = stations(quick)
    horizons = {"PM2.5_ahead1": "1 h", "PM2.5_ahead24": "24 h"}
    models = dict(learned(shortened(forecast, quick), tables, ("finetune", "fedper")))
    published = {"PM2.5_ahead1": 9.99, "PM2.5_ahead24": 57.1}
    rows = told("PM2.5 (µg/m³)", tables, iter(models.items()), horizons, "PM2.5", published)
    return [*rows, *online(shortened(stream, quick), tables, next(iter(models["fedavg"].values())))]


def alarm(quick: bool) -> list[Row]:
    """Heavy pollution in a day."""
    return alarms(shortened(Plan.load(AIR / "alarm.yaml"), quick), alarmed(stations(quick)))


def validated(table: Table, gap: np.timedelta64) -> Table:
    """What settings are chosen on: the training rows, of which the latest fifth are held out; those whose values to
    come are in it, *gap* before, are left out."""
    train = table.parts()[0]
    border = np.sort(train["time"])[round(0.8 * len(train))]
    kept = train.rows((train["time"] + gap < border) | (train["time"] >= border))
    return replace(kept, held_out=kept["time"] >= border)


def tune() -> None:
    """Print, for each study, each of ``GRID`` and each method, the MAE in units of persistence's, the mean of targets;
    of the alarm 1 - AUC."""
    forecast = stations(False)
    some = {name: forecast[name] for name in list(forecast)[::3]}
    hour, day = np.timedelta64(1, "h"), np.timedelta64(24, "h")
    roads_plan, air_plan, alarm_plan = (
        Plan.load(path) for path in (EXAMPLES / "traffic" / "plan.yaml", AIR / "forecast.yaml", AIR / "alarm.yaml")
    )
    for study, plan, tables, gap, anchor in (
        ("traffic", roads_plan, traffic(roads_plan), hour, "speed"),
        ("air", air_plan, some, day, "PM2.5"),
        ("alarm", alarm_plan, alarmed(some), day, ""),
    ):
        chosen = {name: validated(table, gap) for name, table in tables.items()}
        tests = {name: table.parts()[1] for name, table in chosen.items()}
        for rate, fall in GRID:
            short = {"rounds": 15, "local_steps": 40, "learning_rate": rate, "decay": fall / 15}
            for method, models in learned(shortened(plan, False, **short), chosen, ("fedavg",)):
                score = validation(tests, models, anchor)
                print(f"{study}: rate {rate}, decay·rounds {fall}, {method} {score:.4f}")


def validation(tests: Tables, models: Models, anchor: str) -> float:
    """See :func:`tune`."""
    targets = next(iter(models.values())).targets
    told = np.concatenate([models[name].predict(test) for name, test in tests.items()])
    truth = np.concatenate([np.column_stack([test[target] for target in targets]) for test in tests.values()])
    if not anchor:
        return 1 - binary_metrics(truth[:, 0], told)["auc"]
    now = np.concatenate([newest(test, anchor) for test in tests.values()])[:, None]
    return float((np.abs(told - truth).mean(0) / np.abs(now - truth).mean(0)).mean())


def measure(quick: bool) -> list[Row]:
    """The three studies, two at a time."""
    with ProcessPoolExecutor(2) as pool:
        running = [pool.submit(study, quick) for study in (air, roads, alarm)]
        return [row for study in running for row in study.result()]


if __name__ == "__main__":
    if sys.argv[1:] == ["--tune"]:
        tune()
    else:
        main("forecast", ("numpy", "torch", "duckdb"), measure, SEED)
