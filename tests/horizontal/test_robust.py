"""Learning among bad sites: by single updates and by groups of sums, with every algorithm and protection.

A bad site runs other code than it should: here its part of a program is replaced where it asks for its site's name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from atoll.contract.errors import AtollError, PlanError
from atoll.contract.program import REGISTRY, Cohort, build
from atoll.contract.schema import Column, TableSchema
from atoll.data.sources import SourceSpec
from atoll.data.table import Table
from atoll.horizontal.fedavg import FedAvg
from atoll.horizontal.federated import Federated
from atoll.runtime import egress
from atoll.runtime.sandbox import run_sandbox
from atoll.runtime.study import check_plan

COLUMNS: dict[str, dict[str, Any]] = {
    "u": {"range": [-4, 4]}, "v": {"range": [0, 10]}, "image": {"dtype": "image", "shape": [4, 4]},
    "y": {"dtype": "integer", "values": [0, 1], "role": "label"},
}  # fmt: skip
MODELS: list[dict[str, Any]] = [
    {"family": "logistic", "features": ["u", "v"]},
    {"model": {"kind": "mlp", "features": ["u", "v"], "hidden": [4]}},
    {"model": {"kind": "cnn", "image": "image", "channels": [2], "hidden": 3, "norm": "batch"}},
]
NEEDED = {
    "horizontal.feddf": {"generated": 30, "distil_steps": 3},
    "horizontal.online": {"time": "v", "start": 0, "every": 2.5},
    "horizontal.ifca": {"clusters": 1},
}
FAMILY = sorted(name for name, cls in REGISTRY.items() if issubclass(cls, Federated))
SITES = tuple(f"s{i}" for i in range(10))
Sent = Callable[[np.ndarray, int], np.ndarray]
"""(a bad site's honest change, how often it was asked before) → what it sends."""


def tables(number: int = 10, rows: int = 60, max_rows: int = 2_000_000_000, lean: float = 1.0) -> dict[str, Table]:
    """Sites with labels by the same law, and features that lean their own way."""
    random = np.random.default_rng(3)
    schema = TableSchema(name="test", columns={n: Column(**c) for n, c in COLUMNS.items()}, max_rows=max_rows)
    made = {}
    for site in SITES[:number]:
        u = np.clip(random.normal(lean * random.normal(), 1.5, rows), -4, 4)
        v = np.clip(random.normal(5 + 2 * lean * random.normal(), 2, rows), 0, 10)
        y = (random.random(rows) < 1 / (1 + np.exp(-2 * u + (v - 5)))).astype(float)
        image = (random.integers(0, 200, (rows, 4, 4)) + 50 * y[:, None, None]).astype(np.uint8)
        made[site] = Table(schema, {"u": u, "v": v, "image": image, "y": y})
    return made


def params(rule: str = "median", attackers: int = 1, rounds: int = 8, **more: Any) -> dict[str, Any]:
    aggregate = {"rule": rule, "attackers": attackers, **more.pop("aggregate", {})}
    aggregate = {} if rule == "mean" else aggregate
    learning = {"target": "y", "rounds": rounds, "batch_size": 16, "learning_rate": 0.2, "aggregate": aggregate}
    return {**MODELS[0], **learning, **more}


def spoil(monkeypatch: pytest.MonkeyPatch, bad: tuple[str, ...], sent: Sent) -> None:
    """Those sites send something else."""
    honest, asked = FedAvg.local, dict.fromkeys(bad, 0)

    def local(self: Any, at: Any, told: Any) -> Any:
        found = honest(self, at, told)
        if at.site.name in bad:
            found = {**found, "weights": sent(np.asarray(found["weights"], float), asked[at.site.name])}
            asked[at.site.name] += 1
        return found

    monkeypatch.setattr(FedAvg, "local", local)


def drive_it(drive: Any, given: dict[str, Any], data: dict[str, Table], name: str = "fedavg", **more: Any) -> Any:
    schema = next(iter(data.values())).schema
    made = build(f"horizontal.{name}", given)
    return drive(made.coordinate(Cohort(tuple(data), schema, seed=5), more.pop("start", None)), data, **more)


def right(model: Any, data: dict[str, Table]) -> float:
    """Share of all sites' rows that it calls rightly."""
    return float(np.mean([np.mean((model.predict(t) > 0.5).ravel() == t["y"]) for t in data.values()]))


def suspected(result: Any) -> dict[str, set[str]]:
    return {one["site"]: set(one["reasons"]) for one in result["suspects"]}


# ---------------------------------------------------------------- every algorithm


@pytest.mark.parametrize("by", ["single", "groups"])
@pytest.mark.parametrize("name", FAMILY)
def test_every_algorithm_learns_by_a_rule(drive: Any, name: str, by: str) -> None:
    """What it sends beside the weights is combined too; models are those of the right shapes and finite."""
    aggregate = {"groups": 3} if by == "groups" else {}
    data = tables(6, 30)
    for model in MODELS:
        given = {**params("trimmed_mean", rounds=2, aggregate=aggregate), "learning_rate": 0.05, **NEEDED.get(name, {})}
        given = {key: value for key, value in given.items() if key not in MODELS[0]} | model
        try:
            driven = drive_it(drive, given, data, name.removeprefix("horizontal."))
        except PlanError as error:
            if model is MODELS[-1]:
                assert "aggregate" in str(error), error
            continue
        weights = driven.result["model"].weights
        assert np.isfinite(weights).all() and {"suspects", "trust"} <= driven.result.keys()
        asked = {item.name for item in driven.rounds if item.name.startswith("train")}
        assert asked == ({"train"} if by == "groups" else {"train_single"})
        return


def test_clusters_are_not_weighed_against_each_other() -> None:
    with pytest.raises(PlanError, match="aggregate"):
        build("horizontal.ifca", params(clusters=2))


def test_with_nobody_bad_and_sites_alike_a_rule_is_the_mean(drive: Any) -> None:
    """One site's table ten times, and one batch of all rows: all updates are the same."""
    one = tables(1)["s0"]
    data = dict.fromkeys(SITES, one)
    mean = drive_it(drive, params("mean", batch_size=1000), data).result
    for rule in ("median", "geometric_median", "multi_krum", "norm_clipping"):
        found = drive_it(drive, params(rule, batch_size=1000), data).result
        assert np.allclose(found["model"].weights, mean["model"].weights, rtol=1e-9)
        assert np.allclose(found["history"], mean["history"], rtol=1e-9)


# ---------------------------------------------------------------- bad sites


ATTACKS: dict[str, tuple[str | None, Sent]] = {
    "sign flip": ("against", lambda change, _: -5 * change),
    "scaling": ("large", lambda change, _: -100 * change),
    "nothing": ("nothing", lambda change, _: 0 * change),
    "a coalition that knows the rule": ("copy", lambda change, _: np.full(len(change), -0.15)),
}


@pytest.mark.parametrize("attack", sorted(ATTACKS))
@pytest.mark.parametrize("rule", ["median", "geometric_median", "trimmed_mean", "fltrust"])
def test_forty_per_cent_attackers_do_not_stop_it_learning_and_are_named(
    drive: Any, monkeypatch: pytest.MonkeyPatch, rule: str, attack: str
) -> None:
    data, bad = tables(), SITES[:4]
    reason, sent = ATTACKS[attack]
    more = {"aggregate": {"root": "s9"}} if rule == "fltrust" else {}
    honest = right(drive_it(drive, params(rule, 4, rounds=15, **more), data).result["model"], data)
    spoil(monkeypatch, bad, sent)
    found = drive_it(drive, params(rule, 4, rounds=15, **more), data).result
    assert right(found["model"], data) > honest - 0.1
    named = suspected(found)
    assert named.keys() == set(bad) and all(reason in reasons for reasons in named.values())


def test_the_mean_is_lost_to_them(drive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tables()
    spoil(monkeypatch, SITES[:4], ATTACKS["sign flip"][1])
    assert right(drive_it(drive, params("mean", rounds=15), data).result["model"], data) < 0.4


def test_a_site_that_replays_its_last_update_is_named(drive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[int, np.ndarray] = {}
    spoil(
        monkeypatch,
        ("s3",),
        lambda change, _: kept.setdefault(0, change),
    )
    found = drive_it(drive, params(rounds=12), tables()).result
    assert suspected(found) == {"s3": {"replay"}}


@pytest.mark.parametrize("rule", ["median", "geometric_median", "krum", "norm_clipping"])
def test_a_site_that_claims_a_billion_rows_has_no_more_influence(
    drive: Any, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    data = tables()
    honest = drive_it(drive, params(rule, 3), data).result
    mean = drive_it(drive, params("mean", rounds=2), data).result["model"].weights
    weight = FedAvg.weight
    monkeypatch.setattr(FedAvg, "weight", lambda self, at, sent, means: (
        1e9 if at.site.name == "s2" else weight(self, at, sent, means)))  # fmt: skip
    found = drive_it(drive, params(rule, 3), data).result
    assert np.allclose(found["model"].weights, honest["model"].weights, rtol=1e-9)
    assert suspected(honest) == {} and suspected(found) == {"s2": {"claim"}}
    lost = drive_it(drive, params("mean", rounds=2), data).result["model"].weights  # it is that site's alone
    assert not np.allclose(lost, mean, rtol=0.01)


@pytest.mark.parametrize("rule", ["median", "krum", "geometric_median", "norm_clipping"])
@pytest.mark.parametrize("lean", [0.0, 2.0])
def test_honest_sites_that_differ_are_not_accused(drive: Any, rule: str, lean: float) -> None:
    data = tables(lean=lean)
    data["s4"] = data["s4"].rows(np.arange(60) < 12)
    assert suspected(drive_it(drive, params(rule, 2, rounds=25), data).result) == {}


def test_evidence_survives_a_restart(drive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tables()
    spoil(monkeypatch, ("s1",), lambda change, _: -50 * change)
    given = params(checkpoint_every=3)
    whole = drive_it(drive, given, data)
    done, checkpoint = whole.checkpoints[0]
    again = drive_it(drive, given, data, start=dict(checkpoint.state), first_round=done)
    assert again.result["suspects"] == whole.result["suspects"] != []
    assert again.result["trust"] == whole.result["trust"]
    assert np.array_equal(again.result["model"].weights, whole.result["model"].weights)


# ---------------------------------------------------------------- in a whole federation


def not_a_number(change: np.ndarray, number: int) -> np.ndarray:
    return np.full_like(change, np.nan) if number % 2 else change


def beyond(change: np.ndarray, number: int) -> np.ndarray:
    return np.full_like(change, 1e20)


def of_another_shape(change: np.ndarray, number: int) -> np.ndarray:
    raise IndexError


@pytest.mark.parametrize("sent", [not_a_number, beyond, of_another_shape])
def test_a_site_that_breaks_the_protocol_does_not_stop_a_run_whose_rule_withstands_it(
    federation: Any, monkeypatch: pytest.MonkeyPatch, sent: Sent
) -> None:
    """It also leaves out its own gate."""
    data = tables(5, max_rows=1000)
    spoil(monkeypatch, ("s1",), sent)
    monkeypatch.setattr(egress, "clip", lambda arrays, fields: (arrays, 0))
    bounded = Federated.handed

    def handed(self: Any, at: Any, told: Any, found: dict[str, Any]) -> Any:
        reply = dict(bounded(self, at, told, dict(found)))
        if at.site.name == "s1" and sent is beyond:
            reply["weights"] = np.asarray(found["weights"]) * 0 + 1e20
        return reply

    monkeypatch.setattr(Federated, "handed", handed)
    outcome = federation.run(federation.plan("horizontal.fedavg", params(rounds=4), data), data)
    assert right(outcome["result"]["model"], data) > 0.7
    named = suspected(outcome["result"])
    if sent is of_another_shape:  # it only fails: the run's events say so
        assert any(event.get("left_out") == "s1" for event in federation.events) and "s1" in named
    else:
        assert named == {"s1": {"broke"}}
    with pytest.raises(AtollError):
        federation.run(federation.plan("horizontal.fedavg", params("mean", rounds=4), data), data)


def test_a_run_in_which_everybody_fails_says_why(federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tables(5)
    spoil(monkeypatch, SITES, of_another_shape)
    with pytest.raises(AtollError) as caught:
        federation.run(federation.plan("horizontal.fedavg", params(), data), data)
    assert caught.value.code == "site.internal"


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold"])
def test_groups_of_masked_sums_give_what_plain_ones_do(
    federation: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """To the masks' resolution; single changes are never seen."""
    data = tables(9, max_rows=1000)
    if name != "scaffold":
        spoil(monkeypatch, ("s1",), lambda change, _: -1000 * change)
    given = params("median", 1, rounds=3, clip=2.0, aggregate={"groups": 3})
    found = {}
    for protection in ("plain", "secagg"):
        plan = federation.plan(f"horizontal.{name}", given, data, protection=protection, cohort={"min_sites": 3})
        found[protection] = federation.run(plan, data)["result"]
    assert np.allclose(found["plain"]["model"].weights, found["secagg"]["model"].weights, atol=1e-5)
    assert right(found["secagg"]["model"], data) > 0.7
    handlers = {body["handler"] for body in federation.releases()}
    assert "train" in handlers and "train_single" not in handlers


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_a_group_whose_sum_fails_is_left_out(federation: Any, monkeypatch: pytest.MonkeyPatch, protection: str) -> None:
    data = tables(9, max_rows=1000)
    spoil(monkeypatch, ("s1",), of_another_shape)
    given = params("geometric_median", 0, rounds=4, clip=2.0, aggregate={"groups": 3})
    plan = federation.plan("horizontal.fedavg", given, data, protection=protection, cohort={"min_sites": 3})
    outcome = federation.run(plan, data)
    assert right(outcome["result"]["model"], data) > 0.7
    assert sum("s1" in event.get("left_out", "") for event in federation.events) == 4


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize(
    ("given", "more", "said"),
    [
        (params("krum", 2), {"cohort": {"sites": list(SITES[:6]), "min_sites": 3}}, "plan.too-few-updates"),
        (params("krum", 2, sites_per_round=6), {}, "plan.too-few-updates"),
        (params("median", 1, aggregate={"groups": 4}), {"cohort": {"sites": list(SITES), "min_sites": 3}},
         "fewer sites than the cohort"),
        (params("fltrust", 1, aggregate={"root": "s7"}), {"cohort": {"sites": list(SITES[:5]), "min_sites": 3}},
         "plan.no-root"),
        (params("median"), {"protection": "secagg"}, "plan."),
    ],
)  # fmt: skip
def test_plans_that_cannot_keep_what_a_rule_promises_are_refused(
    federation: Any, given: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    with pytest.raises(PlanError) as caught:
        check_plan(federation.plan("horizontal.fedavg", given, tables(2), **more))
    assert said in f"{caught.value.code}: {caught.value}"


def test_a_cohort_that_turns_out_too_small_is_refused_before_anything_is_asked(federation: Any) -> None:
    data = tables(4)
    with pytest.raises(PlanError) as caught:
        federation.run(federation.plan("horizontal.fedavg", params("krum", 1), data), data)
    assert caught.value.code == "plan.too-few-updates" and not federation.releases()


# ---------------------------------------------------------------- real data


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["median", "geometric_median", "norm_clipping"])
def test_four_hospitals_that_differ_are_not_accused(atoll_data: Path, tmp_path: Path, rule: str) -> None:
    from atoll.contract.plan import Plan

    home = Path(__file__).parents[2] / "examples" / "heart"
    content = {
        name: yaml.safe_load((home / f"{name}.yaml").read_text()) for name in ("plan", "schema", "recipe", "sites")
    }
    plan = {**content["plan"], "schema": content["schema"], "recipe": content["recipe"], "protection": "plain"}
    learning = {"rounds": 40, "local_steps": 4, "aggregate": {"rule": rule, "attackers": 1}}
    plan |= {"program": "horizontal.fedavg", "params": {**content["plan"]["params"], **learning}}
    sources = {site: SourceSpec(**spec) for site, spec in content["sites"].items()}
    result, _ = run_sandbox(Plan.from_json(plan), sources, atoll_data / "heart-disease-uci", tmp_path)
    assert result["output"]["suspects"] == []
    assert result["metrics"]["federated"]["auc"] > 0.8
