"""APFL: FedAvg's model to the last bit, the paper's mixtures written a second time, and both ends of the share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

SETTINGS = {"rounds": 4, "local_epochs": 2, "batch_size": 8, "learning_rate": 0.3}


@pytest.mark.parametrize("adaptive", [False, True])
def test_own_models_are_the_papers(hospitals: Any, drive: Any, adaptive: bool) -> None:
    study = hospitals()
    driven = study.train(drive, "horizontal.apfl", study.params(**SETTINGS, share=0.25, adaptive=adaptive))
    final, own = np.zeros(3), {site: np.zeros(3) for site in study.tables}
    share = dict.fromkeys(study.tables, 0.25)
    for number in range(4):
        changes = {}
        for site in study.tables:
            w, v, a = final, own[site], share[site]
            for step, rows in enumerate(study.batches(site, number, 8, epochs=2)):
                slope = study.gradient(site, a * v + (1 - a) * w, rows)
                alpha = a - 0.3 * ((v - w) @ slope) if adaptive and step == 0 else a
                w, v, a = w - 0.3 * study.gradient(site, w, rows), v - 0.3 * a * slope, min(max(alpha, 0), 1)
            changes[site], own[site], share[site] = w - final, v, a
        final = final + study.mean(changes)
    assert np.allclose(driven.result["model"].weights, final, rtol=0, atol=1e-12)
    for site, desk in driven.desks.items():
        mixed = share[site] * own[site] + (1 - share[site]) * final
        assert np.allclose(desk.personal["weights"], mixed, rtol=0, atol=1e-12)
    assert (len(set(share.values())) == 3) is adaptive


def test_the_federations_model_is_fedavgs_bit_for_bit(hospitals: Any, drive: Any) -> None:
    study = hospitals()
    found = study.train(drive, "horizontal.apfl", study.params(**SETTINGS)).result
    fedavg = study.train(drive, "horizontal.fedavg", study.params(**SETTINGS)).result
    assert found["model"].weights.tobytes() == fedavg["model"].weights.tobytes()
    assert found["history"] == fedavg["history"]


def test_a_share_of_nothing_is_the_federations_model_and_one_of_all_is_a_sites_alone(
    hospitals: Any, drive: Any
) -> None:
    study = hospitals()
    none = study.train(drive, "horizontal.apfl", study.params(**SETTINGS, share=0.0, adaptive=False))
    whole = study.train(drive, "horizontal.apfl", study.params(**SETTINGS, share=1.0, adaptive=False))
    for site in study.tables:
        assert np.array_equal(none.desks[site].personal["weights"], none.result["model"].weights)
        batches = [rows for number in range(4) for rows in study.batches(site, number, 8, epochs=2)]
        alone = study.sgd(site, np.zeros(3), batches, 0.3)
        assert np.allclose(whole.desks[site].personal["weights"], alone, rtol=0, atol=1e-12)


def test_the_share_stays_within_nothing_and_all(hospitals: Any, drive: Any) -> None:
    study = hospitals()
    driven = study.train(drive, "horizontal.apfl", study.params(**{**SETTINGS, "rounds": 25, "learning_rate": 2.0}))
    shares = [float(desk.state["share"]) for desk in driven.desks.values()]
    assert all(0 <= share <= 1 for share in shares)
    assert len(set(shares)) > 1
