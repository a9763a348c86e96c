"""A simulated run from files to files: what ``atoll run`` does, for as many sites as there is memory for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atoll.contract.errors import PlanError
from atoll.contract.plan import Plan
from atoll.data.sources import SourceSpec
from atoll.models.allowed import allow, asked_in
from atoll.runtime.catalogue import load_installed
from atoll.runtime.fleet import Fleet
from atoll.runtime.forecast import Speed, measured
from atoll.runtime.results import details, to_plain, write_json, write_model
from atoll.runtime.serve import settle
from atoll.runtime.simulated import Event, Simulation
from atoll.runtime.study import check_plan, settled
from atoll.runtime.timeline import Simulated
from atoll.runtime.virtual_time import Immediate, Virtual
from atoll.runtime.work import Work
from atoll.runtime.workers import Data, Dealt, Workers


def dealt(sources: Mapping[str, SourceSpec], number: int) -> Data:
    """*number* sites among whom the rows of the one source are dealt. Raises PlanError."""
    if len(sources) != 1 or number < 1:
        raise PlanError(
            "simulate.one-source", "rows are dealt from one source to at least one site", field="split",
            remedy="name one site in SITES.yaml, or leave --split out",
        )  # fmt: skip
    [(name, spec)] = sources.items()
    digits = len(str(number))
    return {f"{name}-{place + 1:0{digits}d}": Dealt(spec, place, number) for place in range(number)}


def run_simulated(
    plan: Plan, data: Data, base: Path, out: Path, *, fleet: Fleet | None = None, speed: Speed | None = None,
    workers: int = 1, batch: bool = True, on_event: Event | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Run *plan* on simulated sites; returns (result, details for the report), and writes result.json and model/.

    fleet: learn in its virtual time. speed: of a step there (default: measured here). workers: processes.
    Raises the AtollError that ended it.
    """
    load_installed()
    allow(asked_in(plan.params))  # it is one's own
    settle()
    check_plan(plan)
    plan, sites = settled(plan), tuple(data)
    if fleet is not None:
        fleet = fleet.of(sites)
        speed = speed or measured(plan, float(np.median(fleet["rows"])))
    answers = Workers(plan, min(workers, len(data)))
    try:
        answers.open(data, base=base, batch=batch)
        known = answers.rows()
        rows = np.array([known[site] for site in sites], float)
        work = Work(np.floor(rows * (1 - plan.run.holdout)))
        clock: Immediate | Virtual = Immediate()
        if fleet is not None and speed is not None:
            work.step_s, work.row_s = speed.step_s, speed.row_s
            clock = Virtual(fleet, plan.run.deadline_s, speed.step_s)
        run = Simulation(plan, sites, answers, work=work, clock=clock, on_event=on_event)
        done = run.run()
        result, arrays = run.result("simulated" if fleet is None else "virtual")
    finally:
        answers.close()
    if fleet is not None:
        result["virtual_time"] = _virtual(done, speed)
    rounds = [{"number": one.number, "name": one.name, "seconds": one.seconds} for one in done.rounds]
    shown = details(plan, done.metrics, rounds, {})
    shown["curves"] = result.pop("curves", {})
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "result.json", result)
    write_model(out / "model", plan, result, arrays)
    return result, shown


def _virtual(done: Simulated, speed: Speed | None) -> dict[str, Any]:
    """How the run went in virtual time."""
    told: dict[str, Any] = to_plain(
        {
            "seconds": done.seconds,
            "dropouts": len(done.dropouts),
            "late": sum(one.late for one in done.rounds),
            "step_s": None if speed is None else speed.step_s,
        }
    )
    return told
