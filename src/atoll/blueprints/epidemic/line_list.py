"""Case-level records of an outbreak: the variables x0 … x14 of cross-region epidemic control, with known truth.

Whoever an office tested has a row: its confirmed cases, and people tested in vain (contacts of cases, and patients
with another illness). What a column means for people infected follows Guan et al. 2020, NEJM 382:1708 (age, sex, health
workers 3.5%, coexisting disorders 24%, fever 89%, white cells 4.7, lymphocytes 1.0, abnormal imaging 86%, severe 16%);
samples' first tests Wang et al. 2020, JAMA 323:1843 (positive: bronchial 93%, throat 32%, blood 1%). Severity rises
with age and coexisting disorders (Verity et al. 2020, Lancet Infect Dis 20:669). Other illnesses are made up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.blueprints.epidemic.outbreak import NEVER, Floats, Ints, Outbreak

Columns = dict[str, NDArray[Any]]

NO_LINK, NEAR, ELSEWHERE, OUTSIDE = range(4)
"""Codes of x14: no known link; a case of the own region; a case of another region; came from outside."""
_WITHOUT, _SUSPECTED, _CLINICAL = range(3)
_CASE, _CONTACT, _OTHER_ILL = range(3)


def line_list(outbreak: Outbreak, seed: int, extra: int = 0) -> Columns:
    """One row for everybody tested and reported by the last day, in the order of reports, [rows] each.

    region and city: places in the scenario. person: the place in the outbreak, −1 of people tested in vain.
    report_date, x5 (onset): datetime64[D]. Numbers: NaN is missing. x0 (case id) and link_case (x0 of the known
    infector, "" for none): text. extra: further laboratory values x15 … that depend on infection, severity and age.
    """
    rng = np.random.default_rng([seed, 2])
    cases = np.flatnonzero(outbreak.reported < outbreak.scenario.days)
    rows = _people(outbreak, cases, rng)
    order = np.lexsort((rng.random(len(rows["report"])), rows["report"]))
    rows = {name: column[order] for name, column in rows.items()}
    columns = _variables(outbreak, rows, rng)
    return {**columns, **_laboratory(columns, extra, rng)}


def _people(outbreak: Outbreak, cases: Ints, rng: np.random.Generator) -> Columns:
    """Who has a row: region, city, person, kind, and the days of report and onset."""
    regions = outbreak.scenario.regions
    rate = np.array([r.negatives for r in regions])[outbreak.region()[cases]]
    around = np.repeat(cases, rng.poisson(rate))  # people tested in vain around those cases
    person = np.concatenate([cases, np.full(len(around), -1)])
    near = np.concatenate([cases, around])
    kind = np.where(person >= 0, _CASE, np.where(rng.random(len(near)) < 0.6, _CONTACT, _OTHER_ILL))
    report = outbreak.reported[near] + np.where(person >= 0, 0, rng.integers(0, 4, len(near)))
    ill = np.where(kind == _CASE, outbreak.symptomatic[near], (kind == _OTHER_ILL) | (rng.random(len(near)) < 0.1))
    onset = np.where(kind == _CASE, outbreak.onset[near], report - rng.poisson(3, len(near)))
    report = np.minimum(report, outbreak.scenario.days - 1)
    city = outbreak.city[near]
    return {
        "region": outbreak.scenario.region_of()[city], "city": city, "person": person, "near": near, "kind": kind,
        "report": report, "ill": ill, "onset": np.where(ill, np.minimum(onset, report), NEVER),
    }  # fmt: skip


def _variables(outbreak: Outbreak, rows: Columns, rng: np.random.Generator) -> Columns:
    scenario, kind, ill, size = outbreak.scenario, rows["kind"], rows["ill"], len(rows["kind"])
    case, contact = kind == _CASE, kind == _CONTACT
    sick = case & ill

    def chance(p: Any) -> NDArray[np.bool_]:
        return np.asarray(rng.random(size) < p)

    def spread(median: Any, sigma: Any) -> Floats:
        return np.asarray(median * np.exp(sigma * rng.normal(size=size)))

    mean_age = np.array([r.mean_age for r in scenario.regions])[rows["region"]]
    age = np.floor(np.clip(rng.normal(mean_age + np.where(case, 4, 0), 18), 0, 100))
    male = chance(np.where(case, 0.58, 0.5))
    worker = chance(np.where(case, 0.05, 0.04)) & (age >= 20) & (age < 65)
    history = chance(_logistic(-3.4 + 0.045 * age))
    grave = -4.9 + 0.045 * age + 0.9 * history + 0.4 * male
    severe = chance(np.where(sick, _logistic(grave), np.where(kind == _OTHER_ILL, 0.3 * _logistic(grave), 0)))

    warm = np.where(sick, 38.2 + 0.5 * severe, np.where(ill & ~contact, 38.0, np.where(ill, 37.3, 36.7)))
    temperature = np.clip(rng.normal(warm, np.where(ill, 0.75, 0.25)), 35.0, 42.0)
    cells = spread(
        np.where(sick, np.where(severe, 4.2, 4.9), np.where(ill & ~contact, 8.2, 6.4)), np.where(ill, 0.38, 0.25)
    )
    lymphocytes = spread(
        np.where(sick, np.where(severe, 0.8, 1.05), np.where(case, 1.5, np.where(ill, 1.5, 1.9))), 0.36
    )
    abnormal = np.where(sick, np.where(severe, 0.95, 0.84), np.where(case, 0.4, np.where(ill & ~contact, 0.45, 0.03)))
    imaging = np.where(chance(abnormal), np.where(chance(np.where(case, 0.62, 0.35)), 2.0, 1.0), 0.0)

    def sample(taken: Any, positive: float) -> Floats:
        found = chance(np.where(case, positive, 0.002))
        return np.where(chance(taken), np.where(found, 2.0, 1.0), 0.0)

    doubt = rng.random(size)
    status = np.where(ill, np.where(doubt < np.where(case, 0.27, 0.12), _CLINICAL, _SUSPECTED), _WITHOUT)
    status = np.where(contact & (doubt < 0.9), _WITHOUT, status)
    link, link_case, ids = _links(outbreak, rows, rng)
    start = np.datetime64(scenario.start, "D")
    untested = np.where(contact, 0.5, 0.06)  # without laboratory and imaging
    return {
        "region": rows["region"],
        "city": rows["city"],
        "person": rows["person"],
        "report_date": start + rows["report"].astype("timedelta64[D]"),
        "x0": ids,
        "x1": status.astype(float),
        "x2": worker.astype(float),
        "x3": male.astype(float),
        "x4": age,
        "x5": np.where(ill, start + np.where(ill, rows["onset"], 0).astype("timedelta64[D]"), np.datetime64("NaT")),
        "x6": np.round(np.where(chance(0.02), np.nan, temperature), 1),
        "x7": np.round(np.where(chance(untested), np.nan, np.clip(cells, 0.5, 40)), 2),
        "x8": np.round(np.where(chance(untested), np.nan, np.clip(lymphocytes, 0.05, 10)), 2),
        "x9": np.where(chance(untested), np.nan, imaging),
        "x10": history.astype(float),
        "x11": sample(np.where(ill, 0.5, 0.15), 0.01),
        "x12": sample(0.95, 0.32),
        "x13": sample(np.where(severe, 0.35, 0.01), 0.93),
        "x14": link,
        "link_case": link_case,
        "delay_days": np.where(ill, rows["report"] - np.where(ill, rows["onset"], 0), np.nan).clip(0, 60),
        "confirmed": case.astype(float),
        "severe": severe.astype(float),
    }


def _links(outbreak: Outbreak, rows: Columns, rng: np.random.Generator) -> tuple[Floats, NDArray[Any], NDArray[Any]]:
    """x14, the known infector's x0, and x0. A contact tested in vain is linked to the case it was found by."""
    size, person, near, region = len(rows["kind"]), rows["person"], rows["near"], rows["region"]
    place, number = np.arange(size), np.empty(size, np.int64)
    for r in np.unique(region):
        number[region == r] = np.arange(1, 1 + (region == r).sum())
    whole = [r.name.upper() for r in outbreak.scenario.regions]
    short = [name[:2] for name in whole]
    names = np.array(short if len(set(short)) == len(short) else whole, object)
    ids = np.array([f"{names[r]}{n:07d}" for r, n in zip(region, number, strict=True)], object)
    row_of = np.full(len(outbreak) + 1, -1)
    row_of[person[person >= 0]] = place[person >= 0]
    case = rows["kind"] == _CASE
    known = np.where(case & outbreak.traced[near], outbreak.infector[near], -1)
    known = np.where(rows["kind"] == _CONTACT, np.where(rng.random(size) < 0.85, near, -1), known)
    row = np.where(known >= 0, row_of[known], -1)  # an infector who is not yet reported is not known either
    link_case = np.where(row >= 0, ids[row], "")
    link = np.where(row >= 0, np.where(region[row] == region, NEAR, ELSEWHERE), NO_LINK)
    outside = np.where(case, (outbreak.infector[near] < 0) & (rng.random(size) < 0.9), rng.random(size) < 0.02)
    return np.where(outside & (row < 0), OUTSIDE, link).astype(float), link_case, ids


def _laboratory(columns: Columns, extra: int, rng: np.random.Generator) -> Columns:
    """Further values, standardised: a third of each is what infection, severity, age and a common factor explain."""
    size = len(columns["x4"])
    causes = np.stack([columns["confirmed"] - 0.5, columns["severe"], columns["x4"] / 20 - 2, rng.normal(size=size)])
    made = {}
    for n in range(extra):
        loads = rng.normal(0, 0.35, 4) * (rng.random(4) < 0.6)
        values = loads @ causes + rng.normal(0, 0.8, size)
        values[rng.random(size) < 0.03] = np.nan
        made[f"x{15 + n}"] = np.round(np.clip(values, -8, 8), 3)
    return made


def _logistic(x: Any) -> Floats:
    return np.asarray(1 / (1 + np.exp(-x)))
