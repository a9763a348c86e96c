"""The daily job: every number against a closed form, and what becomes of regions that are late, absent or wrong."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from atoll.blueprints.epidemic.alarms import AlarmRule, alarms, multi_point
from atoll.blueprints.epidemic.outcome import followed
from atoll.blueprints.epidemic.series import WRONG
from atoll.contract.errors import AtollError, DisclosureError, PlanError, PolicyError, ProtocolError
from atoll.contract.program import Cohort, build
from atoll.contract.rounds import Gather, Sum
from atoll.data.table import Table
from atoll.runtime.estimate import costs
from atoll.runtime.policy import Policy

FIRST = np.datetime64("2020-01-01")
MOST = 100
COLUMNS: dict[str, dict[str, Any]] = {
    "date": {"dtype": "date", "role": "time"},
    "city": {"dtype": "text"},
    "cases": {"dtype": "integer", "range": [-MOST, MOST]},
    "population": {"dtype": "integer", "range": [0, 200_000_000]},
    "next7": {"dtype": "integer", "range": [0, 7 * MOST], "role": "label"},
}
SAVED = {"kind": "linear", "family": "linear", "features": ["cases"], "target": "next7"}
PEOPLE = {"shanghai": 25_000_000, "jiangsu": 85_000_000, "zhejiang": 65_000_000}


def saved(factor: float) -> list[float]:
    """Weights of the linear model that predicts *factor* · cases; its scale maps the feature's range to [−1, 1]."""
    return [0.0, factor * MOST]


PARAMS: dict[str, Any] = {
    "series": {"date": "date", "city": "city", "cases": "cases", "population": "population"},
    "models": [
        {"days": 1, "model": SAVED, "weights": saved(1.0)},
        {"days": 7, "model": SAVED, "weights": saved(7.0)},
    ],
    "ceiling_per_100k": 0.1, "history_days": 28, "risk_days": 10, "seir_days": 0,
}  # fmt: skip


def cases_of(region: str, days: int = 40, cities: int = 6) -> np.ndarray:
    """[days, cities]."""
    random = np.random.default_rng([7, *region.encode()])
    return random.poisson(np.linspace(1, 8, days)[:, None] * random.uniform(0.3, 2, cities))


def table(federation: Any, grid: np.ndarray, population: Any = 1_000_000, first: np.datetime64 = FIRST) -> Table:
    days, cities = grid.shape
    cells = {
        "date": np.repeat(first + np.arange(days), cities),
        "city": [f"c{j}" for _ in range(days) for j in range(cities)],
        "cases": grid.ravel(),
        "population": np.broadcast_to(population, days * cities),
        "next7": np.zeros(days * cities),
    }
    return federation.table(cells, COLUMNS, max_rows=10_000)


def tables(federation: Any, days: int = 40, cities: int = 6) -> dict[str, Table]:
    """Each region's rows up to that day of the same series."""
    return {name: table(federation, cases_of(name, cities=cities)[:days], PEOPLE[name]) for name in PEOPLE}


def found(driven: Any) -> dict[str, Any]:
    outcome: dict[str, Any] = driven.result["epidemic"]
    json.dumps(outcome, allow_nan=False)
    return outcome


def run(drive: Any, data: dict[str, Table], cohort: tuple[str, ...] = (), least: int = 1, **params: Any) -> Any:
    schema = next(iter(data.values())).schema
    asked = Cohort(cohort or tuple(data), schema, min_group_size=params.pop("min_group_size", least))
    return drive(build("epidemic.daily", {**PARAMS, **params}).coordinate(asked), data)


def windowed(daily: np.ndarray, people: float, window: int = 7) -> np.ndarray:
    """The risk of each day, by its formula; ceiling 0.1."""
    means = [daily[max(0, t + 1 - window) : t + 1].mean() for t in range(len(daily))]
    return np.minimum(np.array(means) / people * 100_000 / 0.1, 1.0)


def day(number: int) -> str:
    return str(FIRST + number)


# ---------------------------------------------------------------- closed forms


def test_every_number_is_that_of_the_formulas(federation: Any, drive: Any) -> None:
    data = tables(federation)
    driven = run(drive, data)
    told = found(driven)
    daily = {name: cases_of(name).sum(axis=1).astype(float) for name in PEOPLE}
    risk = {name: windowed(daily[name], PEOPLE[name])[-10:] for name in PEOPLE}
    people = sum(PEOPLE.values())
    joint = sum(risk[name] * PEOPLE[name] for name in PEOPLE) / people
    assert (told["day"], told["partial"], told["absent"], told["late"], told["problems"]) == (
        day(39),
        False,
        [],
        [],
        [],
    )
    assert told["joint"]["risk"] == pytest.approx(joint[-1])
    assert told["joint"]["sum"] == pytest.approx(sum(risk[name][-1] for name in PEOPLE))
    assert [one["risk"] for one in told["joint"]["by_day"]] == pytest.approx(joint.tolist())
    assert [one["day"] for one in told["joint"]["by_day"]] == [day(n) for n in range(30, 40)]
    assert told["joint"]["population"] == people
    total = sum(daily.values())
    assert [one["cases"] for one in told["incidence"]] == total[-28:].tolist()
    for name in PEOPLE:
        own = told["regions"][name]
        assert own["risk"] == pytest.approx(risk[name][-1])
        assert [one["risk"] for one in own["by_day"]] == pytest.approx(risk[name].tolist())
        assert [one["mean"] for one in own["forecast"]] == pytest.approx([daily[name][-1], 7 * daily[name][-1]])
        flags = multi_point(alarms(daily[name]), alarms(cases_of(name).astype(float)))  # [days]
        assert own["alarm"] == flags[-1]
    assert [one["mean"] for one in told["forecast"]["learned"]] == pytest.approx([total[-1], 7 * total[-1]])
    gaps = [np.abs(cases_of(n)[-1] - cases_of(n)[-7:].mean()).sum() for n in PEOPLE]
    assert told["drivers"] == [{"feature": "cases", "importance": pytest.approx(7 * sum(gaps))}]
    assert told["alarms"]["regions"] == sum(one["alarm"] for one in told["regions"].values())
    assert told["alarms"]["cities"] == sum(alarms(cases_of(n).astype(float))[-1].sum() for n in PEOPLE)
    assert told["links"]["shared"] is None and told["links"]["note"]


def test_intervals_hold_the_errors_of_the_days_before(federation: Any, drive: Any) -> None:
    """A model that always predicts half of what came has its truth inside, near twice its forecast."""
    grid = np.full((40, 6), 10)
    data = {name: table(federation, grid, PEOPLE[name]) for name in PEOPLE}
    half = [{"days": 7, "model": SAVED, "weights": saved(3.5)}]
    (one,) = found(run(drive, data, models=half))["forecast"]["learned"]
    truth = 7 * 60 * 3
    assert one["mean"] == pytest.approx(truth / 2)
    assert one["low"] == pytest.approx(truth / 2) and one["high"] == pytest.approx(truth, rel=0.01)


def test_residents_of_cities_are_added(federation: Any, drive: Any) -> None:
    grid = cases_of("shanghai")
    each = np.tile(np.arange(1, 7) * 1_000_000, len(grid))
    data = {name: table(federation, grid, each) for name in PEOPLE}
    series = {**PARAMS["series"], "population_of": "city"}
    assert found(run(drive, data, series=series))["joint"]["population"] == 3 * 21_000_000


def test_the_joint_series_is_seen_by_mechanism(federation: Any, drive: Any) -> None:
    told = found(run(drive, tables(federation), seir_days=7, interventions=[{"name": "closing", "contact": 0.5}]))
    assert [one["day"] for one in told["forecast"]["seir"]] == [day(n) for n in range(40, 47)]
    assert told["reproduction"][-1]["day"] == day(39) and told["reproduction"][-1]["mean"] > 0.5
    none, closing = told["interventions"]
    assert (none["name"], closing["name"], told["interventions_days"]) == ("none", "closing", 7)
    assert closing["averted"] > 0 == none["averted"]


def test_a_series_of_zeros_is_calm(federation: Any, drive: Any) -> None:
    data = {name: table(federation, np.zeros((40, 6), int), PEOPLE[name]) for name in PEOPLE}
    told = found(run(drive, data, seir_days=7, least=5))
    assert (told["joint"]["risk"], told["joint"]["level"]) == (0.0, "green")
    assert told["alarms"] == {"regions": 0, "joint": False, "cities": 0, "of_cities": 18}
    assert {one["cases"] for one in told["incidence"]} == {0}
    assert told["reproduction"] == told["forecast"]["seir"] == [] and told["seir_note"]
    assert all(one["mean"] == one["low"] == 0 for one in told["forecast"]["learned"])


@pytest.mark.parametrize(
    ("cases", "known"),
    [
        ([0.0, 0, 3, 1, 0, 2, 0], 3),  # what followed is known of the days 2, 3 and 4
        ([0.0, 0, 3, math.nan, 0, 2, 0], 2), ([0.0, 0, 0, 0, 0, 0, 3], 0), ([0.0] * 7, None), ([1.0] * 7, None),
    ],
)  # fmt: skip
def test_of_how_many_days_it_is_known_what_followed(cases: list[float], known: int | None) -> None:
    assert followed(np.array(cases), 2) == known


@pytest.mark.parametrize(("quiet", "doubtful"), [(26, True), (18, False), (40, False)])
def test_a_model_of_a_wave_that_is_too_young_is_not_relied_on(
    federation: Any, drive: Any, quiet: int, doubtful: bool
) -> None:
    grid = np.where(np.arange(40)[:, None] < quiet, 0, 5) * np.ones((40, 6), int)
    told = found(run(drive, {name: table(federation, grid, PEOPLE[name]) for name in PEOPLE}))
    note = told["forecast"]["note"]
    assert ("the 7-day forecast: what followed is known of only 7 days" in note) == doubtful == bool(note)


# ---------------------------------------------------------------- regions that are late, absent or wrong


def test_a_late_region_counts_with_its_newest_day(federation: Any, drive: Any) -> None:
    data = tables(federation)
    data["jiangsu"] = table(federation, cases_of("jiangsu")[:38], PEOPLE["jiangsu"])
    told = found(run(drive, data))
    assert (told["day"], told["late"], told["partial"]) == (day(39), ["jiangsu"], False)
    daily = cases_of("jiangsu").sum(axis=1).astype(float)[:38]
    expected = windowed(np.append(daily, [daily[-1]] * 2), PEOPLE["jiangsu"])[-1]
    assert told["regions"]["jiangsu"]["risk"] == pytest.approx(expected)
    # new cases are told up to the day that all have: the late region's are else the difference of two days' sums
    assert (told["incidence"][-1]["day"], {one["regions"] for one in told["incidence"]}) == (day(37), {3})


def test_a_region_that_is_too_late_is_absent(federation: Any, drive: Any) -> None:
    data = tables(federation)
    data["jiangsu"] = table(federation, cases_of("jiangsu")[:37], PEOPLE["jiangsu"])
    told = found(run(drive, data, min_regions=2))
    assert (told["late"], told["absent"], told["partial"]) == ([], ["jiangsu"], True)
    (problem,) = told["problems"]
    assert (problem["site"], problem["code"]) == ("jiangsu", "epidemic.too-late") and day(36) in problem["message"]
    people = PEOPLE["shanghai"] + PEOPLE["zhejiang"]
    risk = {n: windowed(cases_of(n).sum(axis=1).astype(float), PEOPLE[n])[-1] for n in ("shanghai", "zhejiang")}
    assert told["joint"]["population"] == people
    assert told["joint"]["risk"] == pytest.approx(sum(risk[n] * PEOPLE[n] for n in risk) / people)
    assert "jiangsu" not in told["regions"]


def test_the_day_is_that_of_most_regions(federation: Any, drive: Any) -> None:
    data = {name: table(federation, cases_of(name)[:n], PEOPLE[name]) for name, n in zip(PEOPLE, (40, 36, 36))}  # noqa: B905
    told = found(run(drive, data))
    assert (told["day"], told["late"]) == (day(35), [])
    assert told["incidence"][-1]["cases"] == sum(cases_of(name)[35].sum() for name in PEOPLE)
    assert found(run(drive, data, day=day(20)))["day"] == day(20)


def test_a_day_on_which_few_cities_reported_is_not_there_yet(federation: Any, drive: Any) -> None:
    data = tables(federation)
    short = data["shanghai"]
    data["shanghai"] = short.rows(np.arange(len(short)) < len(short) - 3)  # half of the last day's cities
    assert found(run(drive, data))["late"] == ["shanghai"]


WRONGS = {
    "epidemic.no-population": {"population": 0},
    "epidemic.negative-cases": {"cases": -1},
    "epidemic.reported-twice": {"city": "c1"},
}


@pytest.mark.parametrize("code", WRONGS)
def test_a_region_whose_table_is_wrong_is_absent_and_told_why(federation: Any, drive: Any, code: str) -> None:
    data = tables(federation)
    for name, value in WRONGS[code].items():
        data["zhejiang"].columns[name][-6] = value
    told = found(run(drive, data, min_regions=2))
    assert (told["absent"], told["partial"]) == (["zhejiang"], True)
    (problem,) = told["problems"]
    assert (problem["site"], problem["code"]) == ("zhejiang", code) and problem["message"] and problem["remedy"]
    assert 0 < told["joint"]["risk"] < 1


@pytest.mark.parametrize("population", [math.nan, [1, 2, 3, 4, 5, 6], 65_000, 130_000_001])
def test_a_population_that_is_missing_or_not_one_is_told(federation: Any, drive: Any, population: Any) -> None:
    data = tables(federation)
    data["zhejiang"].columns["population"][-6:] = population
    assert found(run(drive, data, min_regions=2))["problems"][0]["code"] == "epidemic.no-population"


def test_missing_cases_are_a_row_that_was_not_reported(federation: Any, drive: Any) -> None:
    data = tables(federation)
    data["zhejiang"].columns["cases"][-6:] = math.nan
    assert found(run(drive, data))["late"] == ["zhejiang"]


def test_missing_features_are_told(federation: Any, drive: Any) -> None:
    data = tables(federation)
    models = [{"days": 7, "model": {**SAVED, "features": ["cases", "next7"]}, "weights": [0.0, 1.0, 1.0]}]
    data["shanghai"].columns["next7"][-1] = math.nan
    told = found(run(drive, data, models=models, min_regions=2))
    assert [one["code"] for one in told["problems"]] == ["epidemic.no-features"]


def test_an_empty_table_is_told(federation: Any, drive: Any) -> None:
    data = tables(federation)
    data["shanghai"] = data["shanghai"].rows(np.zeros(240, bool))
    assert found(run(drive, data, min_regions=2))["problems"][0]["code"] == "epidemic.no-rows"


def test_a_site_that_drops_out_is_absent(federation: Any, drive: Any) -> None:
    data = tables(federation)
    schema = data["jiangsu"].schema
    for gone in (0, 1):  # before it tells its day, or after
        program = build("epidemic.daily", {**PARAMS, "min_regions": 2})
        driven = drive(
            program.coordinate(Cohort(tuple(data), schema)), data,
            absent=lambda number, gone=gone: ["jiangsu"] if number >= gone else [],
        )  # fmt: skip
        told = found(driven)
        assert (told["absent"], told["partial"], set(told["regions"])) == (["jiangsu"], True, {"shanghai", "zhejiang"})
        assert [one["code"] for one in told["problems"]] == ["epidemic.dropped-out"] * gone


def test_of_too_few_regions_no_number_is_asked(federation: Any, drive: Any) -> None:
    data = tables(federation)
    data["shanghai"].columns["population"][:] = 0
    steps = build("epidemic.daily", PARAMS).coordinate(Cohort(tuple(data), data["jiangsu"].schema))
    driven: list[str] = []

    def watched() -> Any:
        value = None
        while True:
            item = steps.send(value)
            driven.append(getattr(item, "name", ""))
            value = yield item

    with pytest.raises(ProtocolError) as caught:
        drive(watched(), data)
    assert caught.value.code == "epidemic.too-few-regions" and driven == ["status"]
    assert "shanghai: the region's population is missing or zero" in caught.value.message


def test_wrong_codes_have_a_message_each() -> None:
    assert all(code.startswith("epidemic.") and message and remedy for code, message, remedy in WRONG.values())


# ---------------------------------------------------------------- what is not told


def test_small_counts_are_not_reported_and_not_fitted(federation: Any, drive: Any) -> None:
    grid = np.zeros((40, 6), int)
    grid[-14:, 0] = 1  # three regions: 3 cases a day
    data = {name: table(federation, grid, PEOPLE[name]) for name in PEOPLE}
    told = found(run(drive, data, least=5))
    assert [one["cases"] for one in told["incidence"]] == [0] * 14 + [None] * 14
    assert told["joint"]["risk"] > 0  # which sites make of their own counts
    first = found(run(drive, data, least=5, seir_days=3))
    data["shanghai"].columns["cases"][-6] = 2  # 4 instead of 3: nothing of the series may differ
    other = found(run(drive, data, least=5, seir_days=3))
    for part in ("incidence", "reproduction"):
        assert first[part] == other[part]
    assert first["forecast"]["seir"] == other["forecast"]["seir"]


def test_only_regions_whose_policy_shares_their_risk_are_shown(federation: Any) -> None:
    data = tables(federation)
    own = {"jiangsu": Policy.sandbox()}
    policies = {name: Policy.sandbox().model_copy(update={"share": ()}) for name in PEOPLE} | own
    plan = federation.plan("epidemic.daily", PARAMS, data, protection="secagg")
    told = federation.run(plan, data, policies)["result"]["epidemic"]
    assert told["regions"]["shanghai"] is told["regions"]["zhejiang"] is None
    assert told["regions"]["jiangsu"]["risk"] > 0 and not told["partial"]


POLICY = Policy(programs=("epidemic.*",), approval="automatic", roster="automatic")
"""As a site has it by default, but that nobody need be asked."""
EXACT = ("day", "joint", "incidence", "alarms", "drivers", "forecast", "reproduction", "absent")


@pytest.mark.parametrize("protection", ["secagg", pytest.param("paillier", marks=pytest.mark.slow)])
def test_under_a_protection_the_answer_is_the_same_and_no_region_is_seen(
    federation: Any, drive: Any, protection: str
) -> None:
    data = tables(federation)
    plan = federation.plan("epidemic.daily", PARAMS, data, protection=protection)
    told = federation.run(plan, data, dict.fromkeys(data, POLICY))["result"]["epidemic"]
    plain = found(run(drive, data, least=5))
    for part in EXACT:
        assert flat(told[part]) == pytest.approx(flat(plain[part]), rel=1e-6, abs=1e-6), part
    assert set(told["regions"].values()) == {None}
    canaries = [cases_of(name).sum(axis=1)[-28:].astype("<i8").tobytes() for name in PEOPLE]
    assert not any(canary in body for canary in canaries for _, _, body in federation.wire)


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [one for key in sorted(value) for one in flat(value[key])]
    if isinstance(value, list):
        return [one for part in value for one in flat(part)]
    return [hash(value)] if isinstance(value, str) else [value]


def test_plain_would_show_a_regions_own_risk(federation: Any) -> None:
    data = tables(federation)
    plan = federation.plan("epidemic.daily", PARAMS, data)
    policy = POLICY.model_copy(update={"protections": ("plain",)})
    with pytest.raises(PolicyError) as caught:
        federation.run(plan, data, dict.fromkeys(data, policy))
    assert caught.value.code == "epidemic.own-risk"
    assert {body["handler"] for body in federation.releases()} == {"status"}
    shared = policy.model_copy(update={"share": ("risk",)})
    told = federation.run(plan, data, dict.fromkeys(data, shared))["result"]["epidemic"]
    assert told["regions"]["shanghai"]["risk"] > 0


# ---------------------------------------------------------------- day after day, under real policies


def next_day(federation: Any, data: dict[str, Table], plan: Any) -> dict[str, Any]:
    for name, site in federation.sites.items():
        site._data = federation._reader(name, data[name], federation.home)
    federation.submit(plan)
    told: dict[str, Any] = federation.drive()["result"]["epidemic"]
    return told


@pytest.mark.parametrize("cities", [pytest.param(6, marks=pytest.mark.slow), 1])
def test_the_job_works_day_after_day_under_a_sites_usual_policy(federation: Any, cities: int) -> None:
    days = {n: tables(federation, n, cities) for n in (37, 38, 39, 40)}
    plan = federation.plan("epidemic.daily", PARAMS, days[37], protection="secagg")
    first = federation.run(plan, days[37], dict.fromkeys(PEOPLE, POLICY))["result"]["epidemic"]
    assert first["day"] == day(36)
    for n in (38, 39):
        assert next_day(federation, days[n], plan)["day"] == day(n - 1)
    late = {**days[40], "shanghai": days[39]["shanghai"]}
    told = next_day(federation, late, plan)
    assert (told["day"], told["late"]) == (day(39), ["shanghai"])
    again = next_day(federation, late, plan)  # the very same rows and cohort: nothing new is told
    assert again["joint"] == told["joint"]


@pytest.mark.parametrize("cities", [pytest.param(6, marks=pytest.mark.slow), 1])
def test_so_it_does_where_regions_show_their_own(federation: Any, cities: int) -> None:
    shown = POLICY.model_copy(update={"protections": ("plain",), "share": ("risk",)})
    days = {n: tables(federation, n, cities) for n in (39, 40)}
    plan = federation.plan("epidemic.daily", PARAMS, days[39])
    federation.run(plan, days[39], dict.fromkeys(PEOPLE, shown))
    told = next_day(federation, days[40], plan)
    assert told["day"] == day(39) and told["regions"]["jiangsu"]["risk"] > 0


@pytest.mark.parametrize("cities", [pytest.param(6, marks=pytest.mark.slow), 1])
def test_a_corrected_row_and_the_same_day_again_are_refused(federation: Any, cities: int) -> None:
    data = tables(federation, 40, cities)
    plan = federation.plan("epidemic.daily", PARAMS, data, protection="secagg")
    federation.run(plan, data, dict.fromkeys(PEOPLE, POLICY))
    corrected = tables(federation, 40, cities)
    corrected["jiangsu"].columns["cases"][-8] += 1
    with pytest.raises(DisclosureError) as caught:
        next_day(federation, corrected, plan)
    assert caught.value.code == "disclosure.closed-period"


@pytest.mark.parametrize("days", [38, pytest.param(30, marks=pytest.mark.slow)])
def test_what_comes_late_does_not_change_a_day_that_was_told(federation: Any, days: int) -> None:
    """Counted by its newest day or with nothing: the difference would be the late region's own."""
    four = {**tables(federation), "anhui": table(federation, cases_of("anhui"), 61_000_000)}
    late = {**four, "jiangsu": table(federation, cases_of("jiangsu")[:days], PEOPLE["jiangsu"])}
    plan = federation.plan("epidemic.daily", PARAMS, four, protection="secagg")
    told = federation.run(plan, late, dict.fromkeys(four, POLICY))["result"]["epidemic"]
    assert told["absent"] + told["late"] == ["jiangsu"]
    assert next_day(federation, late, plan)["joint"] == told["joint"]
    with pytest.raises(DisclosureError) as caught:
        next_day(federation, four, plan)
    assert (caught.value.code, caught.value.where["site"]) == ("disclosure.closed-period", "jiangsu")


@pytest.mark.parametrize("protection", ["secagg", "plain"])
def test_a_day_is_asked_again_of_the_same_regions_only(federation: Any, protection: str) -> None:
    """The difference of two sums would tell a region's own; where each shows its own, there is none to tell."""
    four = {**tables(federation), "anhui": table(federation, cases_of("anhui"), 61_000_000)}
    three = dict(list(four.items())[1:])
    policy = POLICY.model_copy(update={"protections": (protection,), "share": ("risk",)})
    plan = federation.plan("epidemic.daily", PARAMS, four, protection=protection)
    federation.build(four, dict.fromkeys(four, policy))
    federation.submit(plan.model_copy(update={"cohort": plan.cohort.model_copy(update={"sites": tuple(three)})}))
    assert federation.drive()["result"]["epidemic"]["absent"] == []
    if protection == "plain":
        assert next_day(federation, four, plan)["joint"]["risk"] > 0
        return
    with pytest.raises(DisclosureError) as caught:
        next_day(federation, four, plan)
    assert caught.value.code == "disclosure.cohort-differencing"


def test_a_day_is_the_same_day_in_whatever_dtype_it_is_sent(federation: Any, monkeypatch: Any) -> None:
    from atoll.blueprints.epidemic import daily

    data, corrected = tables(federation), tables(federation)
    plan = federation.plan("epidemic.daily", PARAMS, data, protection="secagg")
    federation.run(plan, data, dict.fromkeys(PEOPLE, POLICY))
    corrected["jiangsu"].columns["cases"][-8] += 1
    monkeypatch.setattr(daily, "sent", lambda number: {"day": np.array(number, np.float32)})
    with pytest.raises(DisclosureError) as caught:
        next_day(federation, corrected, plan)
    assert caught.value.code == "disclosure.closed-period"


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("sent", [math.nan, -1.0, 1e9, 18_000.5, 18_000.0])
def test_a_site_takes_no_day_that_the_plan_does_not_allow(federation: Any, drive: Any, sent: float) -> None:
    data = tables(federation)
    steps = build("epidemic.daily", {**PARAMS, "day": day(39)}).coordinate(Cohort(tuple(data), data["jiangsu"].schema))

    def lying() -> Any:
        value = None
        while True:
            item = steps.send(value)
            if getattr(item, "name", "") == "score":
                item = type(item)(**{**vars_of(item), "send": {**item.send, "day": np.array(sent)}})
            value = yield item

    with pytest.raises(ProtocolError):
        drive(lying(), data)


def vars_of(item: Any) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__dataclass_fields__}


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({"series": {**PARAMS["series"], "cases": "city"}}, "plan.bad-column"),
        ({"series": {**PARAMS["series"], "date": "nothing"}}, "plan.bad-column"),
        ({"series": {**PARAMS["series"], "city": "nothing"}}, "plan.bad-column"),
        ({"risk_horizon": 3}, "epidemic.no-horizon"),
        ({"models": [{"days": 7, "model": {**SAVED, "features": ["city"]}, "weights": [1, 1]}]}, "plan.bad-column"),
        ({"models": [{"days": 7, "model": SAVED, "weights": [1, 1], "level": "city"}]}, "plan.bad-column"),
        (
            {"models": [{"days": 7, "model": {**SAVED, "family": "poisson"}, "weights": [1, 1], "level": "cases"}]},
            "epidemic.no-counts",
        ),
    ],
)
def test_a_plan_that_does_not_fit_the_table_is_refused(federation: Any, params: dict[str, Any], code: str) -> None:
    schema = tables(federation, 20)["jiangsu"].schema
    with pytest.raises(PlanError) as caught:
        next(build("epidemic.daily", {**PARAMS, **params}).coordinate(Cohort(("a",), schema)))
    assert caught.value.code == code


@pytest.mark.parametrize(
    "params",
    [
        {"day": "yesterday"}, {"models": []}, {"ceiling_per_100k": 0},
        {"models": [{"days": 7, "model": SAVED}]},
        {"models": [{"days": 7, "model": {**SAVED, "base": {"name": "x", "sha256": "0" * 64}}, "weights": [1.0]}]},
        {"models": PARAMS["models"] * 2}, {"levels": [{"level": "high", "at": 2}]}, {"window": 7},
    ],
)  # fmt: skip
def test_params_that_cannot_be(params: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        build("epidemic.daily", {**PARAMS, **params})


def test_under_privacy_the_day_must_be_given(federation: Any) -> None:
    data = tables(federation, 20)
    privacy = {"unit": "site", "epsilon": 20.0, "delta": 1e-5}
    for more, code in (({}, "privacy.rounds"), ({"day": day(19)}, "")):
        plan = federation.plan("epidemic.daily", {**PARAMS, **more}, data, privacy=privacy)
        if not code:
            assert federation.run(plan, data)["result"]["epidemic"]["day"] == day(19)
            continue
        with pytest.raises(PlanError) as caught:
            federation.run(plan, data)
        assert caught.value.code == code and not federation.releases()


def test_what_it_costs_is_known_before(federation: Any) -> None:
    plan = federation.plan("epidemic.daily", PARAMS, tables(federation, 20), protection="secagg")
    (plain,) = [one for one in costs(plan, 4) if one.protection == "plain"]
    assert plain.bytes > 8 * PARAMS["history_days"] * 6


def test_the_rounds_are_sums_and_optional_gathers(federation: Any, drive: Any) -> None:
    rounds = run(drive, tables(federation)).rounds
    told = [(one.name, type(one.reduce), one.optional) for one in rounds]
    assert told == [("status", Gather, True), ("score", Sum, False), ("own", Gather, True)]
    assert set(rounds[0].reply) == {"newest", "wrong"}


# ---------------------------------------------------------------- saved models


def test_an_installed_model_scores_as_one_that_is_written_out(
    federation: Any, drive: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    import hashlib

    content = save({"weights": np.array(saved(7.0))})
    (tmp_path / "weekly.safetensors").write_bytes(content)
    monkeypatch.setenv("ATOLL_MODELS", str(tmp_path))
    base = {"name": "weekly", "sha256": hashlib.sha256(content).hexdigest()}
    data = tables(federation)
    written = found(run(drive, data, models=PARAMS["models"][1:]))
    installed = found(run(drive, data, models=[{"days": 7, "model": {**SAVED, "base": base}}]))
    assert installed == written
    with pytest.raises(AtollError, match="not the one that the plan names"):
        run(drive, data, models=[{"days": 7, "model": {**SAVED, "base": {**base, "sha256": "0" * 64}}}])


def test_a_saved_model_of_trees_scores_and_says_what_drives_it(
    federation: Any, drive: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    """One tree of depth 1: 7 below 5 cases, 70 from 5 on, of covers 3 and 1."""
    import hashlib

    words = [0, 5.0, 1, 1.0, 4, -1, 7.0, 0, 0, 3, -1, 70.0, 0, 0, 1]
    content = save({"weights": np.array([0.0, *words])})
    (tmp_path / "stump.safetensors").write_bytes(content)
    monkeypatch.setenv("ATOLL_MODELS", str(tmp_path))
    spec = {
        "kind": "trees",
        "features": ["cases"],
        "target": "next7",
        "link": "identity",
        "num_trees": 1,
        "max_depth": 1,
    }
    base = {"name": "stump", "sha256": hashlib.sha256(content).hexdigest()}
    data = tables(federation)
    data["shanghai"].columns["cases"][:6] = math.nan  # trees need not know every cell
    told = found(run(drive, data, models=[{"days": 7, "model": {**spec, "base": base}}]))
    weekly = {n: np.where(cases_of(n) < 5, 7.0, 70.0).sum(axis=1) for n in PEOPLE}
    risk = {n: windowed(weekly[n] / 7, PEOPLE[n])[-1] for n in PEOPLE}
    assert told["joint"]["sum"] == pytest.approx(sum(risk.values()))
    assert told["forecast"]["learned"][0]["mean"] == pytest.approx(sum(values[-1] for values in weekly.values()))
    expected = 7 * 0.75 + 70 * 0.25  # of a row of which nothing is known
    shap = sum(np.abs(np.where(cases_of(n)[-1] < 5, 7.0, 70.0) - expected).sum() for n in PEOPLE)
    assert told["drivers"] == [{"feature": "cases", "importance": pytest.approx(shap)}]


@pytest.mark.parametrize("plus", [0.0, 0.5])
def test_a_model_of_growth_foretells_a_level_times_its_exponential(federation: Any, drive: Any, plus: float) -> None:
    """Twice as many as now, of cases and *plus*; and no fewer than none, however far they are to fall."""
    data = tables(federation)
    growth = {"model": SAVED, "level": "cases", "plus": plus}
    models = [
        {"days": 7, "weights": [math.log(2), 0.0], **growth}, {"days": 1, "weights": [-9.0, 0.0], **growth},
    ]  # fmt: skip
    told = found(run(drive, data, models=models))
    weekly = {n: (7 * (2 * (cases_of(n) + plus) - plus)).sum(axis=1) for n in PEOPLE}
    fewer = sum(np.maximum((cases_of(n)[-1] + plus) * math.exp(-9) - plus, 0).sum() for n in PEOPLE)
    assert [one["mean"] for one in told["forecast"]["learned"]] == [
        pytest.approx(sum(values[-1] for values in weekly.values()), rel=1e-6), pytest.approx(fewer, abs=1e-6),
    ]  # fmt: skip
    assert told["joint"]["sum"] == pytest.approx(sum(windowed(weekly[n] / 7, PEOPLE[n])[-1] for n in PEOPLE))


def test_growth_from_a_level_that_is_missing_is_told(federation: Any, drive: Any) -> None:
    data = tables(federation)
    columns = {**COLUMNS, "lately": {"range": [0, MOST]}}
    made = {n: {**one.columns, "lately": one["cases"].astype(float)} for n, one in data.items()}
    made["shanghai"]["lately"][-1] = math.nan
    given = {n: federation.table(cells, columns, max_rows=10_000) for n, cells in made.items()}
    models = [{"days": 7, "model": SAVED, "weights": [0.0, 0.0], "level": "lately"}]
    told = found(run(drive, given, least=2, models=models, min_regions=2))
    assert [one["code"] for one in told["problems"]] == ["epidemic.no-features"] and told["absent"] == ["shanghai"]


def test_the_coordinator_needs_no_installed_model(federation: Any) -> None:
    base = {"name": "nowhere", "sha256": "0" * 64}
    schema = tables(federation, 20)["jiangsu"].schema
    made = build("epidemic.daily", {**PARAMS, "models": [{"days": 7, "model": {**SAVED, "base": base}}]})
    assert next(made.coordinate(Cohort(("a", "b", "c"), schema))).name == "status"


def test_an_alarm_rule_is_the_plans(federation: Any, drive: Any) -> None:
    grid = np.zeros((40, 6), int)
    grid[-1, :2] = 2
    data = {name: table(federation, grid, PEOPLE[name]) for name in PEOPLE}
    told = [
        found(run(drive, data, alarm={"cities": cities, "threshold": threshold}))["alarms"]
        for cities, threshold in ((3, 3.0), (2, 3.0), (2, 100.0))
    ]
    assert [one["regions"] for one in told] == [3, 3, 0]
    assert AlarmRule().regions == 2 and told[0]["joint"] and not told[2]["joint"]
