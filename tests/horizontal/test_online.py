"""Online learning: prequential errors and training written a second time; drift where it was planted, only there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError, PlanError
from atoll.contract.program import Cohort, build
from atoll.contract.schema import Column
from atoll.data.table import Table
from atoll.runtime.policy import Policy

COLUMNS: dict[str, Any] = {
    "u": {"range": [-1, 1]},
    "v": {"range": [-1, 1]},
    "day": {"range": [0, 100]},
    "y": {"dtype": "integer", "values": [0, 1], "role": "label"},
    "z": {"range": [-4, 4], "role": "label"},
}
PARAMS: dict[str, Any] = {
    "family": "logistic", "target": "y", "features": ["u", "v"], "time": "day", "start": 0, "every": 5,
    "rounds": 20, "learning_rate": 0.5, "local_epochs": 3,
}  # fmt: skip


def streams(federation: Any, turn: float = 1000, num: int = 3, rows: int = 1000, seed: int = 0) -> dict[str, Table]:
    """Sites whose labels follow u until day *turn*, and −u afterwards."""
    random, tables = np.random.default_rng(seed), {}
    for i in range(num):
        u, v, day = random.uniform(-1, 1, rows), random.uniform(-1, 1, rows), random.uniform(0, 100, rows)
        slope = np.where(day < turn, 6.0, -6.0)
        y = (random.random(rows) < 1 / (1 + np.exp(-slope * u))).astype(float)
        z = slope / 3 * u + random.normal(0, 0.2, rows)
        tables[f"s{i}"] = federation.table({"u": u, "v": v, "day": day, "y": y, "z": z.clip(-4, 4)}, COLUMNS)
    return tables


def run(drive: Any, tables: dict[str, Table], state: Any = None, **more: Any) -> Any:
    names = ("absent", "first_round", "kept", "rule")
    options = {name: more.pop(name) for name in names if name in more}
    cohort = Cohort(tuple(tables), next(iter(tables.values())).schema, min_group_size=more.pop("smallest", 1))
    made = build("horizontal.online", {**PARAMS, **more})
    return drive(made.coordinate(cohort, state), tables, **options)


@pytest.mark.parametrize(("family", "target"), [("logistic", "y"), ("linear", "z")])
def test_each_period_is_tested_and_then_learned(federation: Any, drive: Any, family: str, target: str) -> None:
    """Full batches: w ← w − η · mean gradient over the period's rows of all sites; errors are those before the step."""
    tables = streams(federation, rows=200)
    more = {"family": family, "target": target, "rounds": 8, "start": 10, "local_epochs": 1, "batch_size": 1000}
    found = run(drive, tables, **more).result
    rows = {name: np.concatenate([t[name] for t in tables.values()]) for name in COLUMNS}
    w = np.zeros(3)
    for period in found["periods"]:
        inside = (rows["day"] >= 10 + 5 * period["period"]) & (rows["day"] < 15 + 5 * period["period"])
        x = np.column_stack([np.ones(inside.sum()), rows["u"][inside], rows["v"][inside]])
        labels, eta = rows[target][inside], x @ w
        mean = 1 / (1 + np.exp(-eta)) if family == "logistic" else eta
        error = (mean >= 0.5) != labels if family == "logistic" else np.abs(mean.clip(-4, 4) - labels) / 4
        assert period["rows"] == inside.sum()
        assert period["error"] == pytest.approx(error.mean(), abs=1e-9)
        w = w - 0.5 * x.T @ (mean - labels) / len(labels)
    assert np.allclose(found["model"].weights, w, rtol=0, atol=1e-9)


def test_periods_are_closed_and_disjoint(federation: Any, drive: Any) -> None:
    """Every row inside is used once, those at a border in the later period; others never."""
    day = np.array([0.0, 4.999, 5.0, 9.0, 10.0, 14.0, 15.0, 99.0, np.nan])
    data = {name: day if name == "day" else np.zeros(9) for name in COLUMNS}
    tables = {name: federation.table(data, COLUMNS) for name in "ab"}
    driven = run(drive, tables, rounds=3)
    weights = [[float(reply["weight"]) for reply in replies.values()] for replies in driven.replies]
    assert weights == [[2, 2], [2, 2], [2, 2]]
    assert [period["rows"] for period in driven.result["periods"]] == [4, 4, 4]
    assert [float(asked.send["period"]) for asked in driven.rounds] == [0, 1, 2]


@pytest.mark.parametrize("detector", ["adwin", "page-hinkley"])
def test_planted_drift_is_found_within_a_period_and_nothing_else_is(federation: Any, drive: Any, detector: str) -> None:
    """At day 50 the labels turn round: period 10 shows it first. Each site sees it on its own rows too."""
    for seed in range(3):
        steady = run(drive, streams(federation, seed=seed), detector=detector).result["periods"]
        assert not [p["period"] for p in steady if p["drift"]]
        turned = run(drive, streams(federation, turn=50, seed=seed), detector=detector).result["periods"]
        assert next(p["period"] for p in turned if p["drift"]) in (10, 11)
        assert all(p["sites_drifting"] == 0 for p in turned[:10])
        assert sum(p["sites_drifting"] for p in turned[10:13]) >= 3
        assert turned[10]["error"] > 0.8 > 0.3 > turned[9]["error"]


def test_sites_that_share_their_metrics_tell_when_they_saw_drift(federation: Any, drive: Any) -> None:
    tables = streams(federation, turn=50)
    found = run(drive, tables, alarms=True).result
    assert set(found["alarms"]) == {"s0", "s1", "s2"}
    counts = np.bincount([period for own in found["alarms"].values() for period in own], minlength=20)
    assert counts.tolist() == [p["sites_drifting"] for p in found["periods"]]
    assert counts.sum() >= 3
    assert "alarms" not in run(drive, tables).result
    params = {**PARAMS, "alarms": True}
    plan = federation.plan("horizontal.online", params, tables, protection="secagg", cohort={"min_sites": 3})
    policies = {f"s{i}": Policy.sandbox().model_copy(update={"share": ("metrics",) if i else ()}) for i in range(3)}
    shared = federation.run(plan, tables, policies)["result"]["alarms"]
    assert shared == {site: found["alarms"][site] for site in ("s1", "s2")}


def test_a_site_tells_its_alarms_once_and_by_plan(federation: Any, drive: Any) -> None:
    from atoll.contract.errors import PolicyError
    from atoll.contract.program import handler_of
    from atoll.contract.rounds import Task, TaskId

    desks = run(drive, streams(federation, rows=50), rounds=2, alarms=True).desks
    task = Task(TaskId("0" * 32, 9, 0, "reply", "s0"), {}, (0,))
    for asked, state in ((True, desks["s0"].state), (False, {})):
        made, desks["s0"].state = build("horizontal.online", {**PARAMS, "alarms": asked}), state
        with pytest.raises(PolicyError) as caught:
            handler_of(made, "alarms").answer(made, desks["s0"], task)
        assert caught.value.code == "policy.not-in-plan"


def test_after_drift_a_reset_begins_anew_and_a_boost_hurries(federation: Any, drive: Any) -> None:
    tables = streams(federation, turn=50)
    each = {what: run(drive, tables, on_drift=what, boost=4, learning_rate=0.2) for what in ("note", "reset", "boost")}
    found = next(p["period"] for p in each["note"].result["periods"] if p["drift"])
    assert not each["reset"].rounds[found + 1].send["weights"].any()
    rates = [float(asked.send["rate"]) for asked in each["boost"].rounds]
    assert rates[found + 1] == 4
    assert [n for n, rate in enumerate(rates) if rate != 1] == [
        p["period"] + 1 for p in each["boost"].result["periods"] if p["drift"]
    ]
    late = {what: np.mean([p["error"] for p in r.result["periods"][found + 1 :]]) for what, r in each.items()}
    assert late["reset"] < late["note"]
    assert late["boost"] < late["note"]


def test_without_a_stream_it_is_fedavg(federation: Any, drive: Any) -> None:
    """One period that holds everything."""
    tables = streams(federation, rows=60)
    more = {"rounds": 1, "every": 101, "batch_size": 8}
    online = run(drive, tables, **more).result
    kept = {name: v for name, v in {**PARAMS, **more}.items() if name not in ("time", "start", "every")}
    cohort = Cohort(tuple(tables), tables["s0"].schema)
    plain = drive(build("horizontal.fedavg", kept).coordinate(cohort), tables).result
    assert online["model"].weights.tobytes() == plain["model"].weights.tobytes()


def test_a_period_without_rows_changes_nothing(federation: Any, drive: Any) -> None:
    tables = {n: t.rows((t["day"] < 20) | (t["day"] > 30)) for n, t in streams(federation, rows=200).items()}
    driven = run(drive, tables)
    gap = [p for p in driven.result["periods"] if p["rows"] is None]
    assert [p["period"] for p in gap] == [4, 5]
    assert all((p["error"], p["drift"], p["sites_drifting"]) == (None, False, 0) for p in gap)
    assert np.array_equal(driven.rounds[4].send["weights"], driven.rounds[6].send["weights"])
    shown = [metrics.values.get("error") for metrics in driven.metrics]
    assert shown == [p["error"] for p in driven.result["periods"]]


def test_a_site_with_too_few_rows_sits_a_period_out(federation: Any, drive: Any) -> None:
    from atoll.contract.disclosure import Rule

    tables = streams(federation, rows=200)
    few = {**tables, "s1": tables["s1"].rows((tables["s1"]["day"] > 5) | (tables["s1"]["day"] < 0.5))}
    driven = run(drive, few, rule=Rule(min_group_size=5), smallest=5)
    assert 0 < (few["s1"]["day"] < 5).sum() < 5
    assert float(driven.replies[0]["s1"]["weight"]) == 0
    assert all(float(replies["s1"]["weight"]) >= 5 for replies in driven.replies[1:])


def test_resuming_gives_the_same_bits(federation: Any, drive: Any) -> None:
    tables = streams(federation, turn=30, rows=300)
    more = {"rounds": 10, "on_drift": "reset", "checkpoint_every": 4}
    whole = run(drive, tables, **more)
    for (done, checkpoint), kept in zip(whole.checkpoints, whole.kept, strict=True):
        again = run(drive, tables, dict(checkpoint.state), first_round=done, kept=kept, **more)
        assert again.result["model"].weights.tobytes() == whole.result["model"].weights.tobytes()
        assert again.result["periods"] == whole.result["periods"]


def test_dates_are_cut_by_durations_and_hidden_sums_give_the_same(federation: Any) -> None:
    began = np.datetime64("2024-01-31T00:00", "us")
    tables = {}
    for name, table in streams(federation, turn=50, rows=400).items():
        at = began + (table["day"] * 86_400e6).astype("timedelta64[us]")
        schema = table.schema.with_columns({"at": Column(dtype="datetime", role="time")})
        tables[name] = Table(schema, {**table.columns, "at": at})
    params = {**PARAMS, "time": "at", "start": "2024-01-31", "every": "5d"}
    plan = federation.plan("horizontal.online", params, tables)
    told = federation.run(plan, tables)["result"]["periods"]
    by_number = federation.run(federation.plan("horizontal.online", PARAMS, tables), tables)["result"]["periods"]
    begins = [p.pop("begins") for p in told]
    assert begins[:3] == ["2024-01-31", "2024-02-05", "2024-02-10"]
    assert [p.pop("begins") for p in by_number] == [5.0 * i for i in range(20)]
    assert told == by_number
    assert next(p["period"] for p in told if p["drift"]) in (10, 11)
    hidden = federation.plan("horizontal.online", params, tables, protection="secagg", cohort={"min_sites": 3})
    for one, other in zip(told, federation.run(hidden, tables)["result"]["periods"], strict=True):
        assert {"begins": begins[one["period"]], **one} == {**other, "error": pytest.approx(other["error"], abs=1e-6)}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"time": "nothing"}, "plan.bad-column"),
        ({"every": "5d"}, "online.bad-period"),
        ({"every": 0}, "online.bad-period"),
        ({"start": "2024-01-31"}, "online.bad-period"),
    ],
)
def test_periods_must_suit_the_column(federation: Any, drive: Any, change: dict[str, Any], code: str) -> None:
    tables = streams(federation, rows=10)
    with pytest.raises(PlanError) as caught:
        made = build("horizontal.online", {**PARAMS, **change})
        next(made.coordinate(Cohort(tuple(tables), tables["s0"].schema)))
    assert caught.value.code == code


def test_a_coordinator_cannot_boost_beyond_the_plan(federation: Any, drive: Any) -> None:
    """A site takes the learning rate's factor from the task, within what the plan allows."""
    from atoll.contract.program import handler_of
    from atoll.contract.rounds import Task, TaskId

    tables = streams(federation, rows=100)
    desks = run(drive, tables, rounds=1).desks
    made = build("horizontal.online", {**PARAMS, "boost": 2})

    def change(rate: float) -> np.ndarray:
        sent = {"weights": np.zeros(3), "period": np.array(0.0), "rate": np.array(float(rate))}
        task = Task(TaskId("0" * 32, 0, 0, "reply", "s0"), sent, (0,))
        desks["s0"].state.clear()
        return np.asarray(handler_of(made, "train").answer(made, desks["s0"], task)["weights"])

    assert np.array_equal(change(2), change(1e9))
    with pytest.raises(AtollError):
        change(np.nan)


@pytest.mark.parametrize("period", [20.0, 0.5, 1e300])
def test_a_period_that_the_plan_has_not_is_not_answered(federation: Any, drive: Any, period: float) -> None:
    from atoll.contract.errors import ProtocolError
    from atoll.contract.program import handler_of
    from atoll.contract.rounds import Task, TaskId

    desks = run(drive, streams(federation, rows=100), rounds=1).desks
    made = build("horizontal.online", PARAMS)
    sent = {"weights": np.zeros(3), "period": np.array(period), "rate": np.array(1.0)}
    with pytest.raises(ProtocolError) as caught:
        handler_of(made, "train").answer(made, desks["s0"], Task(TaskId("0" * 32, 9, 0, "reply", "s0"), sent, (0,)))
    assert (caught.value.code, caught.value.field) == ("task.array", "period")


def test_a_period_is_answered_once_and_none_before_it(federation: Any, drive: Any) -> None:
    from atoll.contract.errors import ProtocolError
    from atoll.contract.program import handler_of
    from atoll.contract.rounds import Task, TaskId

    tables = streams(federation, rows=100)
    desks = run(drive, tables, rounds=2).desks
    made = build("horizontal.online", PARAMS)
    for period in (0.0, 1.0):
        sent = {"weights": np.zeros(3), "period": np.array(period), "rate": np.array(1.0)}
        with pytest.raises(ProtocolError) as caught:
            task = Task(TaskId("0" * 32, 9, 0, "reply", "s0"), sent, (0,))
            handler_of(made, "train").answer(made, desks["s0"], task)
        assert caught.value.code == "online.period-again"
