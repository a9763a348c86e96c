"""IFCA: the paper's algorithm written a second time, FedAvg where there is one cluster, and planted clusters found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

SETTINGS = {"rounds": 4, "local_epochs": 1, "batch_size": 8, "learning_rate": 0.3}


@pytest.mark.parametrize("weighting", ["rows", "sites"])
def test_it_is_the_papers_algorithm(hospitals: Any, drive: Any, weighting: str) -> None:
    study = hospitals()
    params = study.params(**SETTINGS, clusters=2, min_cluster=1, weighting=weighting)
    driven = study.train(drive, "horizontal.ifca", params)
    clusters = driven.rounds[0].send["weights"].reshape(2, 3).copy()
    assert not np.allclose(*clusters), "else no site could choose"
    for number in range(4):
        changes: list[dict[str, Any]] = [{}, {}]
        for site in study.tables:
            chosen = int(np.argmin([study.loss(site, w) for w in clusters]))
            trained = study.sgd(site, clusters[chosen], study.batches(site, number, 8), 0.3)
            changes[chosen][site] = trained - clusters[chosen]
        shares = [[study.share[s] if weighting == "rows" else 1 / 3 for s in found] for found in changes]
        for j, found in enumerate(changes):
            if found:
                clusters[j] = clusters[j] + np.average(list(found.values()), axis=0, weights=shares[j])
    assert all(changes), "both clusters have sites"
    order = np.argsort([-sum(found) for found in shares])
    assert np.allclose(driven.result["model"].weights, clusters[order[0]], rtol=0, atol=1e-12)
    assert np.allclose(driven.result["arrays"]["clusters"], clusters[order], rtol=0, atol=1e-12)
    told = driven.result["clusters"]
    assert [cluster["share"] for cluster in told] == pytest.approx([sum(shares[j]) for j in order])
    assert told[0]["coefficients"] == pytest.approx(driven.result["coefficients"])
    for site, desk in driven.desks.items():
        best = min(clusters, key=lambda w: study.loss(site, w))
        assert np.allclose(desk.personal["weights"], best, rtol=0, atol=1e-12)


def test_one_cluster_is_fedavg_bit_for_bit(hospitals: Any, drive: Any) -> None:
    study = hospitals()
    found = study.train(drive, "horizontal.ifca", study.params(**SETTINGS, clusters=1)).result
    fedavg = study.train(drive, "horizontal.fedavg", study.params(**SETTINGS)).result
    assert found["model"].weights.tobytes() == fedavg["model"].weights.tobytes()
    assert found["history"] == fedavg["history"]


def test_a_cluster_that_nobody_chooses_stays_as_it_is(hospitals: Any, drive: Any) -> None:
    study = hospitals()
    driven = study.train(drive, "horizontal.ifca", study.params(**SETTINGS, clusters=12, min_cluster=1, spread=1.0))
    first, last = driven.rounds[0].send["weights"].reshape(12, 3), driven.rounds[-1].send["weights"].reshape(12, 3)
    still = (first == last).all(1)
    assert still.sum() >= 9
    assert sum(cluster["share"] for cluster in driven.result["clusters"]) == pytest.approx(1)


def test_networks_begin_from_other_seeds(hospitals: Any, drive: Any) -> None:
    pytest.importorskip("torch")
    study = hospitals()
    params = {**SETTINGS, "target": "y", "model": {"kind": "mlp", "features": ["u", "v"], "hidden": [3]}, "rounds": 2}
    driven = study.train(drive, "horizontal.ifca", {**params, "clusters": 3, "freeze": ["encoder.0"]})
    model, first = driven.result["model"], driven.rounds[0].send["weights"].reshape(3, -1)
    head = model.layers["head.weight"]
    assert [w[head].tobytes() for w in first] == [model.initial(j)[head].astype("<f4").tobytes() for j in range(3)]
    frozen = model.layers["encoder.0.weight"]
    assert (first[:, frozen] == first[0, frozen]).all(), "what is frozen is the same in all clusters"


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_planted_clusters_are_found(federation: Any, protection: str) -> None:
    """The paper's §6.1, smaller: linear regression at sites of two kinds; nobody is told which is which."""
    random = np.random.default_rng(3)
    columns = {"u": {"range": [-1, 1]}, "v": {"range": [-1, 1]}, "y": {"range": [-4, 4], "role": "label"}}
    planted = np.array([[0.5, 1.5, -1.0], [-0.5, -1.0, 1.5]])
    kinds = [0, 1, 0, 0, 1, 0]
    tables = {}
    for i, kind in enumerate(kinds):
        x = np.column_stack([np.ones(40), random.uniform(-1, 1, (40, 2))])
        y = x @ planted[kind] + random.normal(0, 0.05, 40)
        tables[f"s{i}"] = federation.table({"u": x[:, 1], "v": x[:, 2], "y": y}, columns)
    params = {"family": "linear", "features": ["u", "v"], "target": "y", "clusters": 2, "rounds": 25, "min_cluster": 2}
    params |= {"batch_size": 20, "local_epochs": 2, "learning_rate": 0.4}
    plan = federation.plan("horizontal.ifca", params, tables, protection=protection, run={"seed": 3})
    outcome = federation.run(plan, tables)["result"]
    assert np.allclose(outcome["arrays"]["clusters"], planted, atol=0.05)
    assert [cluster["share"] for cluster in outcome["clusters"]] == pytest.approx([4 / 6, 2 / 6])
    for journal, kind in zip(federation.journals.values(), kinds, strict=True):
        own = journal.state(federation.run_id, "personal")["weights"]
        assert np.allclose(own, planted[kind], atol=0.05)
    result, arrays = federation.store.result(federation.run_id)
    assert arrays["clusters"].shape == (2, 3)
    assert np.array_equal(arrays["clusters"][0], arrays["weights"])
    assert [set(cluster) for cluster in result["output"]["clusters"]] == [{"share", "coefficients"}] * 2


def test_small_clusters_take_their_next_best(hospitals: Any, drive: Any) -> None:
    """The paper's algorithm with one step more: of clusters that enough sites chose, the best."""
    sizes, rounds = (40, 25, 33, 21, 30, 26), 5
    study = hospitals("logistic", sizes)
    params = study.params(**{**SETTINGS, "rounds": rounds}, clusters=3, min_cluster=3, spread=1.0)
    driven = study.train(drive, "horizontal.ifca", params)
    clusters, moved = driven.rounds[0].send["weights"].reshape(3, 3).copy(), 0
    for number in range(rounds):
        losses = {site: np.array([study.loss(site, w) for w in clusters]) for site in study.tables}
        chosen = np.bincount([int(np.argmin(found)) for found in losses.values()], minlength=3)
        trained = chosen >= 3
        trained[np.argmax(chosen)] |= not trained.any()
        assert driven.rounds[2 * number + 1].send["trained"].tolist() == trained.tolist()
        assert "weights" not in driven.rounds[2 * number + 1].send, "they were sent with the choice"
        moved += int(chosen[~trained].sum())
        changes: list[dict[str, Any]] = [{}, {}, {}]
        for site, found in losses.items():
            j = int(np.argmin(np.where(trained, found, np.inf)))
            batches = study.batches(site, 2 * number + 1, 8)
            changes[j][site] = study.sgd(site, clusters[j], batches, 0.3) - clusters[j]
        for j, own in enumerate(changes):
            if own:
                weights = [study.share[site] for site in own]
                clusters[j] = clusters[j] + np.average(list(own.values()), axis=0, weights=weights)
    assert moved, "else nobody was alone"
    found = driven.result["arrays"]["clusters"]
    assert np.allclose(np.sort(found, axis=0), np.sort(clusters, axis=0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("more", [{}, {"compress": {"down": {"changes": True}}}, {"sites_per_round": 5}], ids=str)
def test_a_cluster_of_one_is_not_seen_under_masks(federation: Any, more: dict[str, Any]) -> None:
    """The sums that the coordinator has hold nothing in the place of a cluster that fewer sites than three chose."""
    random = np.random.default_rng(3)
    columns = {"u": {"range": [-1, 1]}, "y": {"range": [-4, 4], "role": "label"}}
    tables = {}
    for i in range(6):
        u = random.uniform(-1, 1, 40)
        y = (-1.5 if i == 4 else 1.5) * u + random.normal(0, 0.05, 40)
        tables[f"s{i}"] = federation.table({"u": u, "y": y}, columns)
    params = {"family": "linear", "features": ["u"], "target": "y", "clusters": 2, "rounds": 4, "batch_size": 20}
    params |= {"learning_rate": 0.4, "checkpoint_every": 99, "spread": 1.0}
    plan = federation.plan("horizontal.ifca", {**params, **more}, tables, protection="secagg", run={"seed": 3})
    outcome = federation.run(plan, tables)["result"]
    alone = 0
    for number in range(0, 8, 2):
        chosen, trained = (federation.store.reduced(federation.run_id, n).arrays for n in (number, number + 1))
        few = chosen["choosers"] < 3
        assert chosen["choosers"].sum() == (5 if more.get("sites_per_round") else 6)
        assert not trained["members"][few].any() and trained["members"].any()
        assert not trained["weights"].reshape(2, 2)[few].any()
        alone += int((chosen["choosers"] == 1).sum())
    assert alone, "somebody was alone"
    assert np.isfinite(outcome["arrays"]["clusters"]).all()
