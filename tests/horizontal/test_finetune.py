"""Local fine-tuning: FedAvg to the last bit, and then a site's own SGD."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

SETTINGS = {"rounds": 3, "local_epochs": 1, "batch_size": 8, "learning_rate": 0.3}


@pytest.mark.parametrize(("layers", "still"), [(None, []), (["head"], [1, 2]), (["slopes"], [0])])
def test_it_is_fedavg_and_then_a_sites_own_training(
    hospitals: Any, drive: Any, layers: list[str] | None, still: list[int]
) -> None:
    study = hospitals()
    driven = study.train(drive, "horizontal.finetune", study.params(**SETTINGS, tune_epochs=2, tune_layers=layers))
    fedavg = study.train(drive, "horizontal.fedavg", study.params(**SETTINGS)).result
    weights = driven.result["model"].weights
    assert weights.tobytes() == fedavg["model"].weights.tobytes()
    assert driven.result["history"] == fedavg["history"]
    for site, desk in driven.desks.items():
        wanted = study.sgd(site, weights, study.batches(site, 3, 8, epochs=2), 0.3, still)
        assert np.allclose(desk.personal["weights"], wanted, rtol=0, atol=1e-12)
        assert study.loss(site, wanted) < study.loss(site, weights)
