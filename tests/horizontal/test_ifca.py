"""IFCA: the paper's algorithm written a second time, FedAvg where there is one cluster, and planted clusters found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

SETTINGS = {"rounds": 4, "local_epochs": 1, "batch_size": 8, "learning_rate": 0.3}


@pytest.mark.parametrize("weighting", ["rows", "sites"])
def test_it_is_the_papers_algorithm(hospitals: Any, drive: Any, weighting: str) -> None:
    study = hospitals()
    driven = study.train(drive, "horizontal.ifca", study.params(**SETTINGS, clusters=2, weighting=weighting))
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
    driven = study.train(drive, "horizontal.ifca", study.params(**SETTINGS, clusters=12, spread=1.0))
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
    params = {"family": "linear", "features": ["u", "v"], "target": "y", "clusters": 2, "rounds": 25}
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
