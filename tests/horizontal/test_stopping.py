"""Early stopping, and whose weights become the model: by hand, within runs, after restarts, and under privacy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError, PlanError
from atoll.contract.program import Cohort, build
from atoll.horizontal.stopping import Stop, Target, Watch
from atoll.models.model import LearnerParams
from atoll.runtime.study import check_plan


class Died(BaseException):
    """Stands for the process being killed: nothing catches it."""


def params_of(study: Any, **more: Any) -> dict[str, Any]:
    return study.params(**{"rounds": 30, "learning_rate": 0.3, "batch_size": 1000, **more})


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("stop", "values", "at"),
    [
        (Stop(patience=2), [5, 4, 4, 3, 3, 3, 3], 5),
        (Stop(patience=1, min_delta=0.5), [5, 4, 3.6, 3], 2),
        (Stop(patience=3, metric="auc"), [0.5, 0.6, 0.55, 0.58, 0.6, 0.7], 4),
        (Stop(target=Target(at_most=0.3)), [0.5, 0.31, 0.3, 0.2], 2),
        (Stop(target=Target(metric="auc", at_least=0.9)), [0.5, 0.89, 0.95], 2),
        (Stop(), [1, 1, 1, 1], None),
        (Stop(patience=2), [1, float("nan"), float("nan"), 1, 1], 4),
    ],
)
def test_it_ends_when_nothing_gets_better_or_all_is_good(stop: Stop, values: list[float], at: int | None) -> None:
    watch, metric = Watch(stop), stop.target.metric if stop.target else stop.metric
    ended = [number for number, value in enumerate(values) if watch.enough({metric: value}, number)]
    assert (ended[0] if ended else None) == at


def test_what_it_knows_survives_a_checkpoint() -> None:
    stop = Stop(patience=3, metric="auc")
    watch = Watch(stop, "best", "auc")
    for number, value in enumerate((0.6, 0.8, 0.7)):
        watch.enough({"auc": value}, number, np.full(3, float(number)))
    state = {name: np.asarray(value) for name, value in watch.arrays().items()}
    again = Watch(stop, "best", "auc").resumed(state)
    assert not state
    assert (again.best, again.since, again.score, again.weights.tolist()) == (0.8, 1, 0.8, [1, 1, 1])
    assert again.told(used_up=True) == {"ended_by": "schedule", "kept_round": 1}
    assert not Watch(Stop()).arrays()


@pytest.mark.parametrize(
    "stop",
    [
        {"patience": 0}, {"metric": "beauty", "patience": 1}, {"target": {"metric": "auc"}},
        {"target": {"at_least": 1, "at_most": 2}}, {"min_delta": -1},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused(hospitals: Any, stop: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        build("horizontal.fedavg", params_of(hospitals(), stop=stop))


@pytest.mark.parametrize("more", [{"keep": "best"}, {"stop": {"target": {"metric": "auc", "at_least": 0.9}}}], ids=str)
def test_what_is_never_evaluated_is_refused(hospitals: Any, more: dict[str, Any]) -> None:
    study = hospitals()
    steps = build("horizontal.fedavg", params_of(study, **more)).coordinate(Cohort(("a",), study.tables["s0"].schema))
    with pytest.raises(PlanError, match="on the way"):
        next(steps)


# ---------------------------------------------------------------- within runs


def test_the_training_loss_is_watched(drive: Any, hospitals: Any) -> None:
    study = hospitals()
    whole = study.train(drive, "horizontal.fedavg", params_of(study)).result
    target = whole["history"][9]
    found = study.train(drive, "horizontal.fedavg", params_of(study, stop={"target": {"at_most": target}})).result
    assert (found["iterations"], found["ended_by"], whole["ended_by"]) == (10, "target", "rounds")
    assert found["history"] == whole["history"][:10]
    gains = -np.diff(whole["history"])
    wanted = int(np.argmax(gains <= 0.005)) + 2
    found = study.train(drive, "horizontal.fedavg", params_of(study, stop={"patience": 1, "min_delta": 0.005})).result
    assert found["iterations"] == wanted < 30
    assert found["ended_by"] == "patience"


def halves(study: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    odd = {name: np.arange(len(table)) % 2 == 1 for name, table in study.tables.items()}
    split = [{n: t.rows(odd[n] == side) for n, t in study.tables.items()} for side in (False, True)]
    return split[0], split[1]


def test_the_best_evaluated_weights_are_kept(drive: Any, hospitals: Any) -> None:
    """A rate so high that learning goes to and fro."""
    study = hospitals()
    training, holdouts = halves(study)
    params = params_of(study, rounds=9, learning_rate=20.0, local_epochs=3, evaluate_every=1, clip=100.0)
    cohort = Cohort(tuple(training), study.tables["s0"].schema)
    last = drive(build("horizontal.fedavg", params).coordinate(cohort), training, holdouts)
    best = drive(build("horizontal.fedavg", {**params, "keep": "best"}).coordinate(cohort), training, holdouts)
    scored = {item.step: item.values["log_loss"] for item in best.metrics if "log_loss" in item.values}
    assert len(scored) == 9
    number = min(scored, key=lambda step: scored[step])
    assert 0 < number < 8
    model = LearnerParams(**study.params()).unfitted(cohort.schema)
    tasks = [item for item in last.rounds if item.name == "train"]
    wanted = np.asarray(tasks[number + 1].send["weights"])
    assert np.allclose(best.result["model"].weights, wanted, atol=1e-15)
    assert best.result["kept_round"] == number and "kept_round" not in last.result
    assert not np.allclose(last.result["model"].weights, wanted, atol=1e-3)
    assert len(model.weights) == len(wanted)


def test_an_evaluated_metric_ends_the_run(federation: Any, hospitals: Any) -> None:
    study = hospitals()
    stop = {"target": {"metric": "auc", "at_least": 0.55}}
    plan = federation.plan(
        "horizontal.fedavg", params_of(study, evaluate_every=2, stop=stop), study.tables, run={"holdout": 0.4},
        protection="secagg",
    )  # fmt: skip
    outcome = federation.run(plan, study.tables)
    assert outcome["result"]["iterations"] in (2, 4, 6)
    assert outcome["evaluation"]["pooled"]["auc"] >= 0.55


def test_a_run_that_is_resumed_keeps_and_ends_as_it_would_have(federation: Any, hospitals: Any) -> None:
    study = hospitals()
    more = {"evaluate_every": 1, "keep": "best", "checkpoint_every": 1, "learning_rate": 40.0, "clip": 100.0}
    params = params_of(study, rounds=12, stop={"metric": "log_loss", "patience": 3}, **more)
    plan = federation.plan("horizontal.fedavg", params, study.tables, run={"holdout": 0.4})
    wanted = federation.run(plan, study.tables)["result"]
    rounds = len(federation.store.rounds(federation.run_id))
    for dies_at in (3, 8, rounds - 1):
        federation.build(study.tables)
        run = federation.submit(plan)

        def die(event: dict[str, Any], at: int = dies_at) -> None:
            if event.get("round") == at:
                raise Died

        with pytest.raises(Died):
            federation.drive(on_event=die)
        federation.start_coordinator()
        found = federation.drive(run)["result"]
        assert found["model"].weights.tobytes() == wanted["model"].weights.tobytes()
        assert found["history"] == wanted["history"]
    assert len(wanted["history"]) < 12


# ---------------------------------------------------------------- under privacy


def private(federation: Any, study: Any, run: dict[str, Any], **more: Any) -> Any:
    params = params_of(study, rounds=8, clip=0.5, clip_norm_l2=0.5, **more.pop("params", {}))
    privacy = {"unit": "site", "epsilon": 50.0, "delta": 1e-6}
    return federation.plan(
        "horizontal.fedavg", params, study.tables, privacy=privacy, protection="secagg", cohort={"min_sites": 3},
        run=run, **more,
    )  # fmt: skip


def test_a_private_run_that_ends_early_is_charged_its_rounds_so_far(federation: Any, hospitals: Any) -> None:
    study = hospitals()
    stop = {"target": {"at_most": 1e12}}  # whatever noise makes of the loss
    plan = private(federation, study, {"evaluate": False}, params={"stop": stop})
    assert federation.run(plan, study.tables)["result"]["iterations"] == 1
    for site, journal in federation.journals.items():
        spent = journal.spent(plan.dataset, federation.sites[site]._policy.budget(plan.dataset))
        assert 0 < spent.epsilon < 30, "one of eight rounds, and not all that was reserved"


@pytest.mark.parametrize(
    ("params", "schedule"),
    [({"stop": {"patience": 1}}, {}), ({}, {"stop_after_s": 9.0}), ({}, {"stop_after_bytes": 10**6})],
)
def test_a_private_run_does_not_end_early_where_rounds_follow(
    federation: Any, hospitals: Any, params: dict[str, Any], schedule: dict[str, Any]
) -> None:
    study = hospitals()
    plan = private(federation, study, {"holdout": 0.3}, params=params, schedule=schedule)
    with pytest.raises(AtollError) as caught:
        check_plan(plan)
    assert "privacy.early-stop" in {caught.value.code, *[part.code for part in caught.value.parts]}
