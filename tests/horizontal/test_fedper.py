"""FedPer: the paper's two algorithms written a second time, and FedAvg where nothing is personal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError
from atoll.runtime.study import check_plan

SETTINGS = {"rounds": 4, "local_epochs": 2, "batch_size": 8, "learning_rate": 0.3}
HEAD, BODY = 0, slice(1, 3)


def test_it_is_the_papers_algorithm(hospitals: Any, drive: Any) -> None:
    study = hospitals()
    driven = study.train(drive, "horizontal.fedper", study.params(**SETTINGS))
    body, heads = np.zeros(2), dict.fromkeys(study.tables, 0.0)
    for number in range(4):
        changes = {}
        for site in study.tables:
            batches = study.batches(site, number, 8, epochs=2)
            trained = study.sgd(site, [heads[site], *body], batches, 0.3)
            heads[site], changes[site] = trained[HEAD], trained[BODY] - body
        body = body + study.mean(changes)
    model = driven.result["model"].weights
    assert np.allclose(model[BODY], body, rtol=0, atol=1e-12)
    assert model[HEAD] == 0, "the federation has no head"
    for site, desk in driven.desks.items():
        assert np.allclose(desk.personal["weights"], [heads[site], *body], rtol=0, atol=1e-12)
    assert len({round(head, 3) for head in heads.values()}) == 3
    assert all(reply["weights"].shape == (2,) for replies in driven.replies[:-1] for reply in replies.values())
    assert driven.rounds[-1].name == "personalise"
    assert all(set(reply) == {"sites"} for reply in driven.replies[-1].values())


@pytest.mark.parametrize("network", [False, True])
def test_without_personal_layers_it_is_fedavg_bit_for_bit(hospitals: Any, drive: Any, network: bool) -> None:
    study = hospitals()
    params = study.params(**SETTINGS)
    if network:
        pytest.importorskip("torch")
        params = {"target": "y", "model": {"kind": "mlp", "features": ["u", "v"], "hidden": [4]}, **SETTINGS}
    found = study.train(drive, "horizontal.fedper", {**params, "personal_layers": []})
    fedavg = study.train(drive, "horizontal.fedavg", params).result
    assert found.result["model"].weights.tobytes() == fedavg["model"].weights.tobytes()
    assert found.result["history"] == fedavg["history"]
    for desk in found.desks.values():
        wanted = fedavg["model"].weights.astype(found.result["model"].dtype)
        assert np.array_equal(desk.personal["weights"], wanted)


def test_a_networks_head_stays_and_learns(hospitals: Any, drive: Any) -> None:
    pytest.importorskip("torch")
    study = hospitals()
    params = {"target": "y", "model": {"kind": "mlp", "features": ["u", "v"], "hidden": [4]}, **SETTINGS}
    driven = study.train(drive, "horizontal.fedper", params)
    model = driven.result["model"]
    head = np.r_[model.layers["head.weight"], model.layers["head.bias"]]
    body = np.setdiff1d(np.arange(len(model.weights)), head)
    assert np.array_equal(model.weights[head], model.initial(0)[head])
    own = [desk.personal["weights"] for desk in driven.desks.values()]
    assert all(np.array_equal(weights[body], model.weights.astype(np.float32)[body]) for weights in own)
    assert len({weights[head].tobytes() for weights in own}) == 3


def test_a_site_that_was_never_asked_has_the_first_head(hospitals: Any, drive: Any) -> None:
    study = hospitals()
    params = study.params(**SETTINGS)
    driven = study.train(drive, "horizontal.fedper", params, absent=lambda number: ["s1"] if number < 4 else [])
    own = {site: desk.personal["weights"] for site, desk in driven.desks.items()}
    assert own["s1"][HEAD] == 0 != own["s0"][HEAD]
    assert np.array_equal(own["s1"][BODY], own["s0"][BODY])


@pytest.mark.parametrize(
    ("layers", "code"), [(["slopes", "head"], "plan.nothing-travels"), (["tail"], "model.no-layer")]
)
def test_layers_that_cannot_be_personal_are_refused_without_data(
    federation: Any, hospitals: Any, layers: list[str], code: str
) -> None:
    study = hospitals()
    plan = federation.plan("horizontal.fedper", study.params(personal_layers=layers), study.tables)
    with pytest.raises(PlanError) as caught:
        check_plan(plan)
    assert caught.value.code == code
