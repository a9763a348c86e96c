"""What every personalised program must keep: its models stay at their sites, are scored there, and outlive a crash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError, PolicyError, ProtocolError
from atoll.contract.plan import Plan
from atoll.contract.program import REGISTRY, build, handler_of
from atoll.contract.rounds import Task, TaskId
from atoll.contract.wire import decode
from atoll.crypto.identity import Identity
from atoll.data.site_data import SiteData
from atoll.data.sources import SourceSpec
from atoll.runtime.journal import Journal
from atoll.runtime.policy import Policy
from atoll.runtime.sandbox import run_sandbox
from atoll.runtime.site import Site
from atoll.statistics.scores import binary_metrics

LINEAR = {"family": "logistic", "features": ["u", "v"]}
NETWORK = {"model": {"kind": "mlp", "features": ["u", "v"], "hidden": [3], "norm": "batch"}}
OPTIONS: dict[str, dict[str, Any]] = {
    "horizontal.apfl": LINEAR,
    "horizontal.ditto": LINEAR,
    "horizontal.fedbn": NETWORK,
    "horizontal.fedmd": {**LINEAR, "generated": 30},
    "horizontal.fedper": LINEAR,
    "horizontal.fedrep": {**LINEAR, "head_epochs": 2},
    "horizontal.finetune": LINEAR,
    "horizontal.ifca": LINEAR,
    "horizontal.perfedavg": LINEAR,
}
every_program = pytest.mark.parametrize("name", OPTIONS)


def plan_of(federation: Any, study: Any, name: str, **more: Any) -> Any:
    if "model" in OPTIONS[name]:
        pytest.importorskip("torch")
    params = {"target": "y", "rounds": 3, "batch_size": 8, "learning_rate": 0.3, **OPTIONS[name], **more}
    return federation.plan(name, params, study.tables, run={"holdout": 0.4, "seed": 5})


def own_weights(federation: Any) -> dict[str, np.ndarray]:
    return {n: j.personal(federation.run_id).arrays["weights"] for n, j in federation.journals.items()}


def test_every_personalised_program_is_tried_here() -> None:
    assert sorted(OPTIONS) == sorted(name for name, cls in REGISTRY.items() if getattr(cls, "personal", False))


@every_program
def test_models_are_scored_where_they_are_and_never_leave(federation: Any, hospitals: Any, name: str) -> None:
    study = hospitals()
    plan = plan_of(federation, study, name)
    outcome = federation.run(plan, study.tables)
    model, own, found = outcome["result"]["model"], own_weights(federation), outcome["evaluation"]["personal"]
    labels, scores = [], []
    for site, weights in own.items():
        held = SiteData.of(study.tables[site], plan, site).parts({})[1]
        labels.append(held["y"])
        scores.append(model.with_weights(weights).predict(held))
        exact = binary_metrics(labels[-1], scores[-1])
        assert found["own"][site]["log_loss"] == float(
            f"{exact['log_loss']:.3g}"
        )  # more digits would tell of the model
    pooled = binary_metrics(np.concatenate(labels), np.concatenate(scores))
    assert found["pooled"]["log_loss"] == pytest.approx(pooled["log_loss"], rel=1e-6)
    assert found["pooled"]["accuracy"] == pooled["accuracy"]
    result = federation.store.result(federation.run_id)[0]
    assert result["metrics"]["personal"]["log_loss"] == found["pooled"]["log_loss"]
    assert result["curves"] == {}  # a histogram of scores would tell the models
    for site in own:
        assert result["metrics"]["per_site"][site]["personal"]["accuracy"] == found["own"][site]["accuracy"]
    told = weights_sent(federation)
    wire = b"".join(content for _, _, content in federation.wire)
    public = {value.tobytes() for array in told for value in np.asarray(array, model.dtype).ravel()}
    assert public and all(value in wire for value in public)
    secret = {value.tobytes() for weights in own.values() for value in weights.astype(model.dtype)} - public
    assert secret or name == "horizontal.ifca", "whose clusters are everybody's"
    assert not [value for value in secret if value in wire]


def weights_sent(federation: Any) -> list[np.ndarray]:
    """The weights that tasks brought to sites."""
    messages = [decode(content) for _, way, content in federation.wire if way == "to"]
    return [m.arrays["weights"] for m in messages if m.kind == "task" and "weights" in m.arrays]


@every_program
def test_they_end_with_a_run_that_fails(federation: Any, hospitals: Any, name: str) -> None:
    study = hospitals()
    plan = plan_of(federation, study, name, evaluate_every=1)
    federation.build(study.tables)
    federation.submit(plan)
    kept: list[dict[str, np.ndarray]] = []

    def fail(event: dict[str, Any]) -> None:
        if event.get("name") == "statistics.evaluation/own" and not kept:
            kept.append(own_weights(federation))
            raise ValueError("the coordinator breaks")

    with pytest.raises(AtollError):
        federation.drive(on_event=fail)
    assert kept and all(len(weights) for weights in kept[0].values()), "there were some before"
    for site, journal in federation.journals.items():
        assert journal.status(federation.run_id) == "failed"
        assert journal.personal(federation.run_id).arrays == {} == journal.state(federation.run_id, name)
        journal.close()
        content = (federation.home / f"{site}.db").read_bytes()
        assert kept[0][site].tobytes() not in content


@every_program
def test_a_site_that_is_killed_goes_on_with_what_it_kept(
    federation: Any, hospitals: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """All sites and the coordinator die before each round, and start again from their files alone."""
    study, keys, generate = hospitals(), dict[str, Identity](), Identity.generate
    plan = plan_of(federation, study, name)
    wanted = federation.run(plan, study.tables)["result"]
    own, rounds = own_weights(federation), len(federation.store.rounds(federation.run_id))
    monkeypatch.setattr(Identity, "generate", staticmethod(lambda name: keys.setdefault(name, generate(name))))
    federation.build(study.tables)
    run = federation.submit(plan)
    for number in range(rounds):
        with pytest.raises(Died):
            federation.drive(run, on_event=die_at(number))
        restart(federation, study.tables, keys)
    found = federation.drive(run)["result"]
    assert found["model"].weights.tobytes() == wanted["model"].weights.tobytes()
    assert {site: w.tobytes() for site, w in own_weights(federation).items()} == {
        s: w.tobytes() for s, w in own.items()
    }


def test_a_site_whose_last_step_diverges_keeps_the_federations_model(federation: Any, hospitals: Any) -> None:
    study = hospitals("linear")
    params = study.params(rounds=1, adapt_rate=1e150, adapt_steps=4, batch_size=100)
    found = federation.run(federation.plan("horizontal.perfedavg", params, study.tables), study.tables)["result"]
    assert not federation.store.run(federation.run_id)["note"]
    for weights in own_weights(federation).values():
        assert weights.tobytes() == found["model"].weights.tobytes()


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"horizontal.fedmd"}))  # its models do not follow what is sent
def test_a_coordinator_cannot_have_models_made_as_often_as_it_likes(hospitals: Any, drive: Any, name: str) -> None:
    """Scores of models that are made for one set of the coordinator's weights after another would tell what stays."""
    if "model" in OPTIONS[name]:
        pytest.importorskip("torch")
    study = hospitals()
    params = {"target": "y", "rounds": 3, "batch_size": 8, **OPTIONS[name]}
    made: Any = build(name, params)
    driven = study.train(drive, name, params)
    last = next(item for item in driven.rounds[::-1] if item.name == "personalise")
    task = Task(TaskId("0" * 32, 99, 0, "reply", "s0"), dict(last.send), (99,))
    with pytest.raises(PolicyError) as caught:
        handler_of(made, "personalise").answer(made, driven.desks["s0"], task)
    assert caught.value.code == "policy.not-in-plan"


def test_histograms_are_never_of_personal_models(hospitals: Any, drive: Any) -> None:
    study = hospitals()
    driven = study.train(drive, "horizontal.fedper", study.params(rounds=1))
    made: Any = build("statistics.evaluation", {"model": driven.result["model"].spec(), "personal": True})
    sent = {"weights": driven.result["model"].weights, "personal": np.array(1.0)}
    for name in ("scores", "cells"):
        with pytest.raises(ProtocolError):
            task = Task(TaskId("0" * 32, 9, 0, "reply", "s0"), sent, (0,))
            handler_of(made, name).answer(made, driven.desks["s0"], task)


class Died(BaseException):
    """A process ends at once."""


def die_at(number: int) -> Callable[[dict[str, Any]], None]:
    def listen(event: dict[str, Any]) -> None:
        if event.get("round") == number:
            raise Died

    return listen


def restart(federation: Any, tables: Any, keys: dict[str, Identity]) -> None:
    for name, table in tables.items():
        federation.journals[name].close()
        identity = keys[name]
        journal = Journal(federation.home / f"{name}.db", name, identity.public, identity.sign, durable=False)

        def read(plan: Any, table: Any = table, name: str = name) -> SiteData:
            return SiteData.of(table, plan, name)

        federation.journals[name] = journal
        federation.sites[name] = Site(identity, journal, Policy.sandbox(), read, federation.coordinator.public)
    federation.start_coordinator()
    federation.start_transport()


def test_alone_a_site_has_what_it_learns_alone(hospitals: Any, tmp_path: Path) -> None:
    """A rehearsal compares with the program run at one site, whose model is then its own: FedPer's is FedAvg's."""
    study = hospitals()
    sources = {}
    for site, table in study.tables.items():
        lines = [",".join(map(repr, row)) for row in zip(*(table[n].tolist() for n in ("u", "v", "y")), strict=True)]
        (tmp_path / f"{site}.csv").write_text("\n".join(["u,v,y", *lines]))
        sources[site] = SourceSpec(path=f"{site}.csv")
    schema = study.tables["s0"].schema.model_dump(mode="json")
    found = {}
    for name in ("fedavg", "fedper"):
        plan = {
            "atoll": 1, "name": name, "schema": schema, "program": f"horizontal.{name}", "protection": "plain",
            "params": study.params(rounds=3, batch_size=8, learning_rate=0.3), "run": {"holdout": 0.4, "seed": 5},
        }  # fmt: skip
        found[name] = run_sandbox(Plan.from_json(plan), sources, tmp_path, tmp_path / name)[0]["metrics"]
    fedper, fedavg = found["fedper"], found["fedavg"]
    assert "personal" not in fedavg
    assert fedper["pooled"]["log_loss"] == pytest.approx(fedavg["pooled"]["log_loss"], rel=1e-9)
    for site in study.tables:
        local = fedper["per_site"][site]["local"]
        assert local["log_loss"] == pytest.approx(fedavg["per_site"][site]["local"]["log_loss"], rel=5e-3)
        assert set(fedper["per_site"][site]) == {"federated", "personal", "local"}
    assert fedper["personal"]["log_loss"] < fedper["federated"]["log_loss"], "which has no head"
