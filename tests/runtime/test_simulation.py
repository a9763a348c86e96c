"""Simulated sites: the same results as real ones to the last bit, dropouts, disclosure, noise, processes, thousands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import DisclosureError, PlanError, ProtocolError, TransportError
from atoll.contract.plan import Plan
from atoll.contract.program import REGISTRY, ProgramParams, handler, program
from atoll.contract.rounds import Ready, Round, Sum, real
from atoll.data.site_data import SiteData
from atoll.data.sources import SourceSpec
from atoll.data.table import Table
from atoll.runtime.policy import Policy
from atoll.runtime.simulated import Simulation
from atoll.runtime.simulated_run import dealt, run_simulated
from atoll.runtime.simulation import Engine
from atoll.runtime.sizes import Sizes
from atoll.runtime.study import settled
from atoll.runtime.work import Work
from atoll.runtime.workers import Workers, dealt_out, opened

COLUMNS = {
    **{name: {"range": [-10, 10]} for name in ("a", "b", "c")},
    "y": {"dtype": "integer", "values": [0, 1], "role": "label"},
}
LOGISTIC = {"family": "logistic", "target": "y", "features": ["a", "b", "c"]}
SCALED = {"steps": [{"step": "scale", "columns": ["a", "b", "c"]}]}


def table(federation: Any, number: int, rows: int = 40) -> Table:
    """Rows of a site."""
    random = np.random.default_rng((9, number))
    x = np.clip(random.normal(0.1 * number, 1.5, (rows, 3)), -10, 10)
    y = (x @ [1.0, -0.5, 0.2] + random.normal(size=rows) > 0).astype(float)
    return federation.table({"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "y": y}, COLUMNS)


@pytest.fixture
def tables(federation: Any) -> dict[str, Table]:
    """Four sites of unequal size."""
    return {f"s{i}": table(federation, i, 25 + 10 * i) for i in range(4)}


def simulated(plan: Plan, tables: Mapping[str, Table], *, batch: bool = False, **engine: Any) -> Simulation:
    """The plan, run on simulated sites."""
    plan = settled(plan)
    answers = Engine(plan, opened(plan, tables, Path()), batch=batch, **engine)
    run = Simulation(plan, tuple(tables), answers, work=Work(np.ones(len(tables))))
    run.run()
    return run


def told(result: Mapping[str, Any]) -> dict[str, Any]:
    """Of result.json, what does not depend on when and where it was made."""
    left_out = ("run", "seconds", "transport", "wire", "compression")
    return {key: value for key, value in result.items() if key not in left_out}


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("horizontal.glm", LOGISTIC),
        ("horizontal.fedavg", {**LOGISTIC, "rounds": 4, "sites_per_round": 3, "local_epochs": 2}),
        ("horizontal.scaffold", {**LOGISTIC, "rounds": 3}),
        ("horizontal.ditto", {**LOGISTIC, "rounds": 3}),
        ("horizontal.gossip", {**LOGISTIC, "rounds": 2}),
        ("statistics.describe", {"columns": ["a", "b", "y"]}),
        ("statistics.quantiles", {"columns": ["a"], "probabilities": [0.5]}),
    ],
)
def test_a_simulated_result_is_that_of_real_sites_to_the_bit(
    federation: Any, tables: dict[str, Table], name: str, params: dict[str, Any]
) -> None:
    """Recipe, hold-out, draws, state from round to round, personal models and evaluation included."""
    plan = federation.plan(name, params, tables, recipe=SCALED, run={"seed": 5, "holdout": 0.25})
    federation.run(plan, tables)
    result, arrays = federation.store.result(federation.run_id)
    found, made = simulated(plan, tables).result()
    assert json.dumps(told(found)) == json.dumps(told(result))
    assert {n: a.tobytes() for n, a in made.items()} == {n: a.tobytes() for n, a in arrays.items()}


@pytest.mark.parametrize(("protection", "within"), [("plain", 0.01), ("secagg", 0.2)])
def test_sizes_are_those_of_real_messages(
    federation: Any, tables: dict[str, Table], protection: str, within: float
) -> None:
    """Headers included; under a protection, as far as its estimate goes."""
    plan = federation.plan(
        "horizontal.fedavg", {**LOGISTIC, "rounds": 8}, tables, run={"holdout": 0.2}, protection=protection
    )
    federation.run(plan, tables)
    wire = federation.store.result(federation.run_id)[0]["wire"]
    found = simulated(plan, tables).result()[0]["wire"]
    for way, size in wire.items():
        assert found[way] == pytest.approx(size, rel=within)


@pytest.mark.slow
def test_processes_give_the_same_bits_as_one(federation: Any, tables: dict[str, Table]) -> None:
    plan = settled(federation.plan("horizontal.scaffold", {**LOGISTIC, "rounds": 2}, tables, run={"holdout": 0.25}))
    alone = simulated(plan, tables)
    workers = Workers(plan, 2)
    try:
        workers.open(tables, batch=False)
        run = Simulation(plan, tuple(tables), workers, work=Work(np.ones(len(tables))))
        run.run()
        found, made = run.result()
    finally:
        workers.close()
    result, arrays = alone.result()
    assert told(found) == told(result)
    assert {n: a.tobytes() for n, a in made.items()} == {n: a.tobytes() for n, a in arrays.items()}


@pytest.mark.slow
def test_a_site_that_cannot_open_the_plan_is_named_from_its_process(federation: Any, tables: dict[str, Table]) -> None:
    plan = settled(federation.plan("horizontal.fedavg", {**LOGISTIC, "rounds": 1}, tables))
    sources = {**tables, "gone": SourceSpec(path="gone.csv")}
    for number in (1, 2, 4):  # in this process, and in each place of another
        workers = Workers(plan, number)
        try:
            with pytest.raises(Exception, match="site gone") as error:
                workers.open(sources)
        finally:
            workers.close()
        assert error.value.code.startswith("source.")  # type: ignore[attr-defined]


def test_batches_of_sites_learn_the_same(federation: Any, tables: dict[str, Table]) -> None:
    plan = federation.plan("horizontal.fedavg", {**LOGISTIC, "rounds": 3}, tables)
    alone, together = simulated(plan, tables).result()[1], simulated(plan, tables, batch=True).result()[1]
    for name, value in alone.items():
        assert together[name] == pytest.approx(value, rel=1e-9)


def test_thousands_of_sites_run_in_one_process(federation: Any) -> None:
    some = [table(federation, i, 12) for i in range(20)]
    tables = {f"s{i:04}": some[i % 20] for i in range(2000)}
    plan = federation.plan("horizontal.fedavg", {**LOGISTIC, "rounds": 1, "batch_size": 12}, tables)
    run = simulated(plan, tables, batch=True)
    assert run.done.rounds[0].asked == run.done.rounds[0].answered == 2000
    few = simulated(plan, dict(list(tables.items())[:20]))  # each row counts the same as among a hundred of itself
    assert run.result()[1]["weights"] == pytest.approx(few.result()[1]["weights"], abs=1e-2)


# ---------------------------------------------------------------- what a site refuses, and dropouts


def test_a_site_that_diverges_drops_out_and_its_state_is_as_before(federation: Any, tables: dict[str, Table]) -> None:
    bad = federation.table({"a": [10.0] * 8, "b": [-10.0] * 8, "c": [10.0] * 8, "y": [0.0, 1.0] * 4}, COLUMNS)
    wild = {"family": "linear", "target": "a", "features": ["b", "c"], "learning_rate": 1e200, "local_epochs": 50}
    with pytest.raises(TransportError) as few:
        simulated(federation.plan("horizontal.fedavg", {**wild, "rounds": 2}, tables), {**tables, "bad": bad})
    assert few.value.code == "cohort.too-few-left"
    with pytest.raises(ProtocolError) as first:
        strict = {"min_sites": 1, "on_dropout": "fail"}
        simulated(federation.plan("horizontal.fedavg", {**wild, "rounds": 2}, tables, cohort=strict), tables)
    assert first.value.code == "site.diverged" and first.value.where["site"] == "s0"


def test_the_sites_gate_applies(federation: Any, tables: dict[str, Table]) -> None:
    policy = Policy.sandbox().model_copy(update={"min_group_size": 30})
    plan = federation.plan("horizontal.fedavg", {**LOGISTIC, "rounds": 1}, tables)
    with pytest.raises(DisclosureError) as error:
        simulated(plan, tables, policy=policy)
    assert error.value.where["site"] == "s0"  # it has 25 rows
    with pytest.raises(DisclosureError, match="behind"):  # of all together there are 160
        many = federation.plan("horizontal.glm", LOGISTIC, tables, protection="secagg",
                               run={"min_group_size": 100_000})  # fmt: skip
        simulated(many, tables)


def test_privacy_noises_what_leaves(federation: Any, tables: dict[str, Table]) -> None:
    promised = {"unit": "record", "epsilon": 1.0, "delta": 1e-6}
    exact = simulated(federation.plan("statistics.describe", {"columns": ["a"]}, tables), tables).result()[0]
    plan = federation.plan("statistics.describe", {"columns": ["a"]}, tables, privacy=promised, protection="secagg")
    noised, again = (simulated(plan, tables).result()[0] for _ in range(2))
    mean = [found["statistics"]["columns"]["a"]["mean"] for found in (exact, noised, again)]
    assert mean[0] != mean[1] == mean[2]  # by the plan's seed: a simulation can be repeated
    assert noised["privacy"]["noised"] and noised["privacy"]["spent"] <= 1.0


def test_values_beyond_their_bounds_are_clipped_and_nonsense_is_refused(federation: Any) -> None:
    @program("test.loose")
    class Loose:
        class Params(ProgramParams):
            value: float

        def __init__(self, params: Any) -> None:
            self.params = params

        def coordinate(self, cohort: Any, start: Any = None) -> Any:
            total = yield Round("tell", Sum(), {"x": real((2,), bound=1.0)})
            return {"x": total["x"].tolist()}

        @handler("tell")
        def tell(self, site: Any, task: Any) -> Any:
            return {"x": np.array([self.params.value, 0.5])}

    try:
        tables = {f"s{i}": table(federation, i) for i in range(3)}
        plan = federation.plan("test.loose", {"value": 7.0}, tables)
        assert simulated(plan, tables).done.outcome["result"] == {"x": [3.0, 1.5]}  # type: ignore[index]
        with pytest.raises(ProtocolError) as error:
            engine = Engine(settled(plan), opened(plan, tables, Path()))
            asked = Round("tell", Sum(), {"x": real((3,), bound=1.0)}, program="test.loose", params={"value": 7.0})
            engine.answers(asked, 0, tuple(tables), {})
        assert error.value.code == "reply.shape"
    finally:
        del REGISTRY["test.loose"]


@pytest.mark.parametrize("name", ["horizontal.fedbuff", "horizontal.fedasync"])
def test_rounds_of_those_that_are_ready_are_driven(federation: Any, tables: dict[str, Table], name: str) -> None:
    """With sites that are all alike they answer in the order in which they were asked."""
    run = simulated(federation.plan(name, {**LOGISTIC, "rounds": 4}, tables), tables)
    assert run.done.outcome is not None and np.isfinite(run.result()[1]["weights"]).all()


def test_a_stream_nobody_was_asked_in_is_refused(federation: Any, tables: dict[str, Table]) -> None:
    plan = settled(federation.plan("horizontal.fedavg", {**LOGISTIC, "rounds": 1}, tables))
    run = Simulation(plan, tuple(tables), Engine(plan, opened(plan, tables, Path())), work=Work(np.ones(4)))

    def steps() -> Any:
        yield Round("begin", Ready(), {}, sites=(), program="horizontal.fedbuff", params={})

    with pytest.raises(ProtocolError) as error:
        run.run(steps())
    assert error.value.code == "stream.idle"


# ---------------------------------------------------------------- from files


def test_the_rows_of_one_source_are_dealt_to_many_sites(federation: Any, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    lines = [f"{x:.3f},{y:.3f},{x + y:.3f},{int(x > 0)}" for x, y in np.clip(random.normal(size=(300, 2)), -4, 4)]
    (tmp_path / "all.csv").write_text("\n".join(["a,b,c,y", *lines, ""]))
    params = {**LOGISTIC, "rounds": 2}
    plan = federation.plan("horizontal.fedavg", params, {"s": table(federation, 0)}, recipe=SCALED)
    data = dealt({"all": SourceSpec(path="all.csv")}, 7)
    result, _ = run_simulated(plan, data, tmp_path, tmp_path / "out")
    rows = [site["rows"] for site in result["sites"].values()]
    assert sum(rows) == 300 and max(rows) - min(rows) <= 1 and next(iter(result["sites"])) == "all-1"
    parts = opened(settled(plan), data, tmp_path)
    assert sorted(np.concatenate([part.base()["a"] for part in parts.values()])) == pytest.approx(
        sorted(SiteData.read(SourceSpec(path="all.csv"), plan, tmp_path, "all").base()["a"])
    )
    saved = json.loads((tmp_path / "out" / "result.json").read_text())
    assert saved["transport"] == "simulated" and (tmp_path / "out" / "model" / "model.json").exists()
    with pytest.raises(PlanError, match="one source"):
        dealt({"a": SourceSpec(path="x.csv"), "b": SourceSpec(path="y.csv")}, 3)


def test_an_announcement_holds_the_whole_roster(federation: Any, tables: dict[str, Table]) -> None:
    plan = settled(federation.plan("horizontal.glm", LOGISTIC, tables))
    small, large = (Sizes(plan, tuple(f"s{i:04}" for i in range(n))).opening.down_bytes for n in (10, 1010))
    assert large - small == pytest.approx(1000 * (64 + 11), rel=0.01)


def test_rounds_are_dealt_out_evenly_but_for_sites_that_keep_something() -> None:
    rows, home = {"a": 100, "b": 60, "c": 40, "d": 10}, {"d": 0}
    shares = dealt_out(["a", "b", "c", "d"], rows, home, 2)
    assert {place: set(own) for place, own in shares.items()} == {0: {"d", "b", "c"}, 1: {"a"}}
