"""Ditto: FedAvg's model to the last bit, and the paper's own models written a second time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

SETTINGS = {"rounds": 4, "local_epochs": 1, "batch_size": 8, "learning_rate": 0.3}


@pytest.mark.parametrize("own_epochs", [None, 3])
def test_own_models_are_the_papers(hospitals: Any, drive: Any, own_epochs: int | None) -> None:
    study = hospitals()
    params = study.params(**SETTINGS, pull=0.7, own_epochs=own_epochs)
    driven = study.train(drive, "horizontal.ditto", params)
    w, own = np.zeros(3), {site: np.zeros(3) for site in study.tables}
    for number in range(4):
        changes = {}
        for site in study.tables:
            changes[site] = study.sgd(site, w, study.batches(site, number, 8), 0.3) - w
            batches = study.batches(site, number, 8, epochs=own_epochs or 1, part=1)
            own[site] = study.sgd(site, own[site], batches, 0.3, drawn=lambda v, w=w: 0.7 * (v - w))
        w = w + study.mean(changes)
    assert np.allclose(driven.result["model"].weights, w, rtol=0, atol=1e-12)
    for site, desk in driven.desks.items():
        assert np.allclose(desk.personal["weights"], own[site], rtol=0, atol=1e-12)


def test_the_federations_model_is_fedavgs_bit_for_bit(hospitals: Any, drive: Any) -> None:
    study = hospitals()
    found = study.train(drive, "horizontal.ditto", study.params(**SETTINGS, pull=2.0)).result
    fedavg = study.train(drive, "horizontal.fedavg", study.params(**SETTINGS)).result
    assert found["model"].weights.tobytes() == fedavg["model"].weights.tobytes()
    assert found["history"] == fedavg["history"]


def test_without_a_pull_a_site_learns_alone(hospitals: Any, drive: Any) -> None:
    study = hospitals()
    driven = study.train(drive, "horizontal.ditto", study.params(**SETTINGS, pull=0.0))
    for site, desk in driven.desks.items():
        batches = [rows for number in range(4) for rows in study.batches(site, number, 8, part=1)]
        assert np.allclose(desk.personal["weights"], study.sgd(site, np.zeros(3), batches, 0.3), rtol=0, atol=1e-12)


def test_a_strong_pull_holds_a_site_near_the_federation(hospitals: Any, drive: Any) -> None:
    study = hospitals()

    def apart(pull: float) -> float:
        driven = study.train(drive, "horizontal.ditto", study.params(**{**SETTINGS, "rounds": 30}, pull=pull))
        model = driven.result["model"].weights
        return max(float(np.linalg.norm(desk.personal["weights"] - model)) for desk in driven.desks.values())

    assert apart(3.0) < 0.3 * apart(0.01)


def test_a_site_that_was_never_asked_trains_its_model_in_the_end(hospitals: Any, drive: Any) -> None:
    study = hospitals()
    params = study.params(**SETTINGS, pull=0.7)
    driven = study.train(drive, "horizontal.ditto", params, absent=lambda number: ["s1"] if number < 4 else [])
    w = driven.result["model"].weights
    wanted = study.sgd("s1", w, study.batches("s1", 4, 8, part=1), 0.3, drawn=lambda v: 0.7 * (v - w))
    assert np.allclose(driven.desks["s1"].personal["weights"], wanted, rtol=0, atol=1e-12)
