"""Virtual time against closed forms: who answers when, who is waited for, who is lost; fleets and forecasts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.contract.errors import PlanError
from atoll.contract.plan import Plan
from atoll.data.table import Table
from atoll.runtime.fleet import Fleet, Trace, quantity
from atoll.runtime.forecast import Forecast, Speed, forecast, made_up, measured, told
from atoll.runtime.simulated import Simulation
from atoll.runtime.simulation import Engine
from atoll.runtime.sizes import Load
from atoll.runtime.study import settled
from atoll.runtime.virtual_time import Virtual
from atoll.runtime.work import TASK_S, Work
from atoll.runtime.workers import opened

COLUMNS = {"a": {"range": [-10, 10]}, "y": {"dtype": "integer", "values": [0, 1], "role": "label"}}
LOGISTIC = {"family": "logistic", "target": "y", "features": ["a"], "local_steps": 10}
QUICK = {"down": "8 Gbit/s", "up": "8 Gbit/s", "latency": "0 ms"}
STEP = Speed(0.1, 0.0, "as told")


@pytest.fixture
def table(federation: Any) -> Table:
    """Rows of a site."""
    random = np.random.default_rng(0)
    a = np.clip(random.normal(size=30), -9, 9)
    return federation.table({"a": a, "y": (a + random.normal(size=30) > 0).astype(float)}, COLUMNS)


@pytest.fixture
def plan(federation: Any, table: Table) -> Any:
    """A plan by its program's name and keys."""

    def make(name: str = "horizontal.fedavg", params: Any = None, **more: Any) -> Plan:
        return federation.plan(name, {**LOGISTIC, **(params or {})}, {"s": table}, **more)

    return make


def fleet(sites: dict[str, Any], **more: Any) -> Fleet:
    return Fleet.from_json({"sites": {name: {**QUICK, **kind} for name, kind in sites.items()}, **more})


def clock(sites: dict[str, Any], deadline_s: float = 60.0, **more: Any) -> Virtual:
    return Virtual(fleet(sites, **more), deadline_s)


# ---------------------------------------------------------------- one request


def test_a_task_takes_its_way_there_its_computing_and_its_way_back() -> None:
    of = {"a": {"down": "64 kbit/s", "up": "16 kbit/s", "latency": "250 ms", "speed": 0.5}}
    sent = clock(of).ask(("a",), Load(8000, 4000), np.array([3.0]))
    assert sent.at.tolist() == [0.25 + 1.0 + 6.0 + 0.25 + 2.0] and not sent.lost.any()


def test_a_site_does_one_thing_after_the_other() -> None:
    watch = clock({"a": {}, "b": {}})
    first = watch.ask(("a", "b"), Load(0, 0), np.array([5.0, 1.0]))
    again = watch.ask(("a", "b"), Load(0, 0), np.array([2.0, 2.0]))
    assert first.at.tolist() == [5.0, 1.0] and again.at.tolist() == [7.0, 3.0]


def test_exchanges_of_a_protection_wait_for_the_farthest() -> None:
    watch = clock({"a": {"latency": "10 ms"}, "b": {"latency": "500 ms"}})
    sent = watch.ask(("a", "b"), Load(0, 0, trips=4, seconds=2.0), np.zeros(2))
    assert sent.at == pytest.approx([0.02 + 2 + 3 * 1.0, 1.0 + 2 + 3 * 1.0])


def test_replies_queue_at_the_coordinators_own_link() -> None:
    watch = clock({"a": {"count": 4}}, coordinator={"down": "8 kbit/s", "up": "4 kB/s"})
    sent = watch.ask(watch._fleet.names, Load(1000, 500), np.array([0.0, 0.0, 0.0, 9.0]))
    assert sent.at == pytest.approx([1.5, 2.0, 2.5, 10.5], abs=1e-3)  # 4 kB go out together; 0.5 s each come in


def test_a_site_is_waited_for_until_it_is_there_or_the_deadline_is_over() -> None:
    night = {"night": {"period": "100 s", "there": [["60 s", "90 s"]]}}
    watch = clock({"a": {"trace": "night"}, "b": {"trace": "night", "phase": "60 s"}}, traces=night)
    sent = watch.ask(("a", "b"), Load(0, 0), np.array([10.0, 35.0]))
    assert sent.at.tolist() == [70.0, 90.0]  # b is away from 30 to 100, ten seconds longer than it is waited for
    assert sent.lost.tolist() == [False, True]
    soon = clock({"a": {"trace": "night"}}, deadline_s=20.0, traces=night)
    gone = soon.ask(("a",), Load(0, 0), np.array([10.0]))
    assert gone.lost.all() and gone.at.tolist() == [20.0] and soon.back_s("a") == 60.0


def test_work_pauses_while_a_site_is_away() -> None:
    """30 s there, 30 s away: 70 s of work end 130 s after they began."""
    half = {"half": {"period": "60 s", "there": [["0 s", "30 s"]]}}
    sent = clock({"a": {"trace": "half"}}, traces=half).ask(("a",), Load(0, 0), np.array([70.0]))
    assert sent.at.tolist() == [130.0]


@given(
    spans=st.lists(st.tuples(st.integers(0, 900), st.integers(1, 90)), min_size=1, max_size=6),
    period=st.sampled_from([1000.0, math.inf]), at=st.floats(0, 5000),
)  # fmt: skip
def test_a_trace_says_the_same_as_looking_at_every_span(spans: list[tuple[int, int]], period: float, at: float) -> None:
    edges, flat = 0, []
    for start, length in sorted(spans):
        begin = max(start, edges)
        if begin + length <= 1000:
            flat.append((float(begin), float(begin + length)))
            edges = begin + length + 1
    trace = Trace(*np.array(flat or [(0.0, 1.0)]).T, period)
    turns = range(7) if period < math.inf else range(1)
    all_spans = [(a + 1000 * t, b + 1000 * t) for t in turns for a, b in zip(trace.starts, trace.ends, strict=True)]
    expected = min((max(at, a) for a, b in all_spans if b > at), default=math.inf)
    assert trace.next(at) == pytest.approx(expected)
    if expected < math.inf:
        assert trace.until(expected) > expected


@given(
    compute=st.lists(st.floats(0, 100), min_size=1, max_size=12), chance=st.floats(0, 1),
    away=st.floats(0, 200), seed=st.integers(0, 9),
)  # fmt: skip
def test_nothing_arrives_before_it_was_sent_and_the_same_seed_gives_the_same_times(
    compute: list[float], chance: float, away: float, seed: int
) -> None:
    of = {"a": {"count": len(compute), "dropout": chance, "away": f"{away} s"}}
    first, second = (clock(of, seed=seed) for _ in range(2))
    for _ in range(3):
        sent, same = (one.ask(one._fleet.names, Load(100, 100), np.array(compute)) for one in (first, second))
        assert (sent.at >= first.now).all() and sent.at.tolist() == same.at.tolist()
        assert sent.lost.tolist() == same.lost.tolist() and (not sent.lost.any() or away > 60)
        for one in (first, second):
            one.to(float(sent.at.max()))


# ---------------------------------------------------------------- whole runs


def run(plan: Plan, of: Fleet, speed: Speed = STEP) -> Forecast:
    return forecast(plan, of, speed)


def test_a_synchronous_round_takes_as_long_as_the_slowest_site(plan: Any) -> None:
    """Ten steps of 0.1 s at speeds 1, 2 and 0.1: ten seconds a round, of which the others wait nine."""
    of = fleet({"a": {"speed": 1}, "b": {"speed": 2}, "slow": {"speed": 0.1}})
    found = run(plan(params={"rounds": 5}), of).to_json()
    assert found["seconds"] == pytest.approx(5 * (10 * 0.1 + TASK_S) / 0.1, rel=1e-3)
    assert found["complete"] and found["rounds"] == 5
    slowest = found["waiting"][0]
    assert slowest["site"] == "slow" and slowest["last_in_rounds"] == 5
    assert slowest["others_waited_s"] == pytest.approx(5 * 9.0, rel=0.01)


def test_asynchronous_throughput_is_the_sum_of_the_sites_rates(plan: Any) -> None:
    """Of sites that take 1, 2 and 10 s, 1 + 0.5 + 0.1 changes come a second."""
    of = fleet({"a": {"speed": 1}, "b": {"speed": 0.5}, "slow": {"speed": 0.1}})
    rounds = 400
    found = run(plan("horizontal.fedasync", {"rounds": rounds}), of).to_json()
    assert found["seconds"] == pytest.approx(rounds / (1.6 / (1 + TASK_S)), rel=0.02)


def test_a_late_site_is_left_out_once_enough_have_answered(plan: Any) -> None:
    of = fleet({"a": {}, "b": {}, "slow": {"speed": 0.1}})
    quick = run(plan(params={"rounds": 4}, schedule={"within_s": 2.0}, cohort={"min_sites": 2}), of)
    assert quick.done.seconds == pytest.approx(4 * 2.0, rel=1e-3)
    assert [one.late for one in quick.done.rounds] == [1] * 4 and [one.answered for one in quick.done.rounds] == [2] * 4
    needed = run(plan(params={"rounds": 1}, schedule={"within_s": 2.0}, cohort={"min_sites": 3}), of)
    assert needed.done.seconds == pytest.approx(10.0, rel=0.01)


def test_slow_sites_that_do_less_end_with_the_others(plan: Any) -> None:
    """Semi-synchronous: at a tenth of the speed, a tenth of the steps; known from the second round on."""
    of = fleet({"a": {}, "b": {}, "slow": {"speed": 0.1}})
    found = run(plan(params={"rounds": 5}, schedule={"effort_min": 0.05}), of)
    seconds = [one.seconds for one in found.done.rounds]
    assert seconds[0] == pytest.approx(10, rel=0.01) and seconds[-1] == pytest.approx(1.0, rel=0.1)


def test_a_run_ends_when_its_virtual_time_is_used_up(plan: Any) -> None:
    found = run(plan(params={"rounds": 50}, schedule={"stop_after_s": 7.5}), fleet({"a": {}, "b": {}, "c": {}}))
    assert len(found.done.rounds) == 8


def test_a_vanished_site_is_given_up_and_asked_again_when_it_is_back(plan: Any) -> None:
    short = plan(params={"rounds": 60}, run={"deadline_s": 5}, cohort={"min_sites": 2})
    of = fleet({"s": {"count": 5, "dropout": 0.05, "away": "8 s"}})
    found = run(short, of)
    assert found.complete and found.done.dropouts
    assert {one.asked for one in found.done.rounds} >= {4, 5} and found.done.rounds[-1].asked >= 3
    again = run(short, of)
    assert again.done.dropouts == found.done.dropouts and again.done.seconds == found.done.seconds
    buffered = run(plan("horizontal.fedbuff", {"rounds": 30}, run={"deadline_s": 5}), of)
    assert buffered.complete and buffered.done.dropouts


def test_a_run_that_loses_too_many_sites_is_foretold(plan: Any) -> None:
    of = fleet({"s": {"count": 3, "dropout": 0.5, "away": "1 d"}})
    found = run(plan(params={"rounds": 60}, cohort={"min_sites": 3}), of).to_json()
    assert not found["complete"] and "plan demands 3" in found["failed"]


def test_a_protection_costs_its_bytes_and_its_trips(plan: Any) -> None:
    of = fleet({"s": {"count": 4, "latency": "100 ms"}})
    plain, masked = (run(plan(params={"rounds": 5}, protection=name), of).done for name in ("plain", "secagg"))
    assert masked.from_bytes.sum() > 1.5 * plain.from_bytes.sum()
    assert masked.seconds > plain.seconds + 5 * 3 * 0.2


def test_a_fit_of_unknown_length_is_taken_for_the_longest(plan: Any, federation: Any, table: Table) -> None:
    params = {"family": "logistic", "target": "y", "features": ["a"], "max_iterations": 12}
    fit = federation.plan("horizontal.glm", params, {"s": table})
    found = forecast(fit, fleet({"s": {"count": 3}}), Speed(0.0, 1e-6, "as told"))
    assert found.done.num_rounds == 1 + 12  # it looks at the labels first


def test_ten_thousand_sites_are_forecast_at_once(plan: Any) -> None:
    of = fleet({"s": {"count": 10_000, "rows": {"median": 500, "spread": 1.0}, "speed": {"median": 1, "spread": 0.7}}})
    found = run(plan(params={"rounds": 3}), of).done
    assert [one.answered for one in found.rounds] == [10_000] * 3


def test_learning_in_virtual_time_equals_learning(federation: Any, plan: Any, table: Table) -> None:
    """Where nobody is late, only the clock is another."""
    tables = dict.fromkeys(("a", "b", "slow"), table)
    made = settled(plan(params={"rounds": 4}))
    found = []
    for watch in (None, Virtual(fleet({"a": {}, "b": {}, "slow": {"speed": 0.1}}), 60.0, 0.1)):
        engine = Engine(made, opened(made, tables, Path()), batch=False)
        one = Simulation(made, tuple(tables), engine, work=Work(np.full(3, 30.0), 0.1), clock=watch)
        one.run()
        found.append((one.done.seconds, one.result()[1]["weights"].tobytes()))
    assert found[0][1] == found[1][1] and found[1][0] == pytest.approx(40, rel=0.01)


# ---------------------------------------------------------------- how long a step takes


def test_a_step_is_measured_on_made_up_rows(plan: Any, table: Table) -> None:
    rows = made_up(table.schema, 50)
    assert len(rows) == 50 and set(np.unique(rows["y"])) == {0, 1} and np.abs(rows["a"]).max() <= 10
    assert 0 < measured(plan(params={"rounds": 3})).step_s < 1
    assert told(plan(), 0.25).step_s == 0.25
    with pytest.raises(PlanError) as error:
        told(plan(), -1.0)
    assert error.value.code == "forecast.step"


# ---------------------------------------------------------------- fleets


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ({}, "fleet.empty"),
        ({"sites": {"a": {"down": 64}}}, "fleet.unit"),
        ({"sites": {"a": {"down": "64 kb/s"}}}, "fleet.unit"),
        ({"sites": {"a": {"latency": "20"}}}, "fleet.unit"),
        ({"sites": {"a": {"rows": "many"}}}, "fleet.unit"),
        ({"sites": {"a": {"up": "0 kbit/s"}}}, "fleet.range"),
        ({"sites": {"a": {"speed": 0}}}, "fleet.range"),
        ({"sites": {"a": {"dropout": 1.5}}}, "fleet.range"),
        ({"sites": {"a": {"rows": {"low": 1}}}}, "fleet.draw"),
        ({"sites": {"a": {"rows": [1, 2]}}}, "fleet.draw"),
        ({"sites": {"a": {"count": 0}}}, "plan.bad-value"),
        ({"sites": {"a": {"sped": 1}}}, "plan.unknown-key"),
        ({"sites": {"a": {"trace": "day"}}}, "fleet.unknown-trace"),
        ({"sites": {"a": {"trace": "t"}}, "traces": {"t": {"there": []}}}, "fleet.never-there"),
        ({"sites": {"a": {}}, "traces": {"t": {"there": [["5 s", "2 s"]]}}}, "fleet.trace"),
        ({"sites": {"a": {}}, "traces": {"t": {"period": "3 s", "there": [["1 s", "4 s"]]}}}, "fleet.trace"),
        ({"sites": {"a": {}}, "traces": {"t": "gone.csv"}}, "plan.missing-file"),
        ({"sites": {"a": {}}, "traces": {"t": 5}}, "fleet.trace"),
    ],
)
def test_a_malformed_fleet_is_refused_with_its_place(content: Any, code: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as error:
        Fleet.from_json(content, tmp_path)
    assert error.value.code == code and (error.value.field or code == "plan.bad-value")


def test_all_that_is_wrong_with_a_fleet_is_told_at_once() -> None:
    with pytest.raises(PlanError) as error:
        Fleet.from_json({"sites": {"a": {"down": 5, "latency": "1 year"}, "b": {"trace": "x"}}})
    assert [part.code for part in error.value.parts] == ["fleet.unit", "fleet.unit", "fleet.unknown-trace"]


def test_quantities_have_units() -> None:
    assert quantity("64 kbit/s", "rate", "x") == 8000 and quantity("1.5 MB/s", "rate", "x") == 1.5e6
    assert quantity("250 ms", "time", "x") == 0.25 and quantity("2 h", "time", "x") == 7200


def test_a_fleet_is_drawn_by_its_seed_and_shared_out(tmp_path: Path) -> None:
    content = {
        "sites": {"h": {"count": 30, "rows": {"low": 5, "high": 9}}, "p": {"count": 60, "up": {"one_of": ["1 MB/s"]}}}
    }
    one, same, other = (Fleet.from_json({**content, "seed": seed}) for seed in (1, 1, 2))
    assert one["rows"].tolist() == same["rows"].tolist() != other["rows"].tolist()
    assert one.names[0] == "h-1" and len(one) == 90
    few = Fleet.from_json(content, count=10)
    assert sum(name.startswith("h") for name in few.names) == 3 and len(few) == 10
    (tmp_path / "f.csv").write_text("site,rows,down,speed\nnorth,100,1 MB/s,\nsouth,50,,2\n")
    read = Fleet.load(tmp_path / "f.csv")
    assert read.names == ("north", "south") and read["speed"].tolist() == [1, 2] and read["down"][0] == 1e6
    (tmp_path / "t.csv").write_text("start_s,end_s\n0,10\n20,30\n")
    traced = Fleet.from_json({"sites": {"a": {"trace": "t"}}, "traces": {"t": "t.csv"}}, tmp_path)
    assert traced.traces[0].next(15) == 20 and traced.traces[0].next(31) == math.inf


def test_a_fleet_must_have_the_plans_sites(plan: Any) -> None:
    of = fleet({"a": {}, "b": {}, "c": {}})
    with pytest.raises(PlanError) as error:
        run(plan(cohort={"sites": ["a", "z"], "min_sites": 1}), of)
    assert error.value.code == "fleet.other-sites"
    with pytest.raises(PlanError) as few:
        run(plan(cohort={"min_sites": 4}), of)
    assert few.value.code == "cohort.too-small"
