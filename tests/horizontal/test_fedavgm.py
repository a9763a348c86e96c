"""FedAvgM: its recursion written a second time, and FedAvg without momentum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, build

LOCAL = {"batch_size": 16, "local_epochs": 2, "learning_rate": 0.2}


@pytest.mark.parametrize(("beta", "eta"), [(0.9, 1.0), (0.5, 0.3), (0.0, 1.0)])
def test_it_is_the_papers_recursion(hospitals: Any, drive: Any, beta: float, eta: float) -> None:
    """v ← β·v + Δ; w ← w + η·v, with mini-batches at the sites."""
    sites, w, v = hospitals(), np.zeros(3), np.zeros(3)
    params = sites.params(rounds=6, server_momentum=beta, server_learning_rate=eta, **LOCAL)
    driven = sites.train(drive, "horizontal.fedavgm", params)
    for number, asked in enumerate(driven.rounds):
        assert set(asked.send) == {"weights"}
        assert np.allclose(asked.send["weights"], w, rtol=0, atol=1e-12)
        reached = {site: sites.sgd(site, w, sites.batches(site, number, 16, 2), 0.2) for site in sites.tables}
        v = beta * v + sites.mean({site: local - w for site, local in reached.items()})
        w = w + eta * v
    assert np.allclose(driven.result["model"].weights, w, rtol=0, atol=1e-12)


def test_without_momentum_it_is_fedavg(hospitals: Any, drive: Any) -> None:
    sites = hospitals()
    ours, fedavg = (
        sites.train(drive, name, sites.params(rounds=5, **LOCAL, **more)).result["model"].weights
        for name, more in (
            ("horizontal.fedavgm", {"server_momentum": 0.0, "server_learning_rate": 1.0}),
            ("horizontal.fedavg", {}),
        )
    )
    assert ours.tobytes() == fedavg.tobytes()


def test_a_site_without_rows_changes_nothing(hospitals: Any, drive: Any) -> None:
    sites = hospitals()
    params, full = sites.params(rounds=5, **LOCAL), sites.tables
    alone = sites.train(drive, "horizontal.fedavgm", params).result
    sites.tables = {**full, "none": full["s0"].rows(np.zeros(40, bool))}
    beside = sites.train(drive, "horizontal.fedavgm", params).result
    assert alone["model"].weights.tobytes() == beside["model"].weights.tobytes()
    assert alone["history"] == beside["history"]


def test_momentum_goes_on_after_a_checkpoint(hospitals: Any, drive: Any) -> None:
    """It is in the checkpoint, and the run without it would be another."""
    sites = hospitals()
    params = sites.params(rounds=6, sites_per_round=2, checkpoint_every=3, **LOCAL)
    whole = sites.train(drive, "horizontal.fedavgm", params)
    (number, checkpoint), *_ = whole.checkpoints
    cohort, ends = Cohort(tuple(sites.tables), sites.tables["s0"].schema), []
    for state in (checkpoint.state, {**checkpoint.state, "velocity": np.zeros(3)}):
        steps = build("horizontal.fedavgm", params).coordinate(cohort, dict(state))
        ends.append(drive(steps, sites.tables, first_round=number).result["model"].weights)
    assert ends[0].tobytes() == whole.result["model"].weights.tobytes()
    assert np.abs(ends[1] - ends[0]).max() > 1e-3


@pytest.mark.parametrize("bad", [{"server_momentum": 1.0}, {"server_momentum": -0.1}, {"server_learning_rate": 0.0}])
def test_senseless_settings_are_refused(hospitals: Any, bad: dict[str, float]) -> None:
    with pytest.raises(PlanError) as caught:
        build("horizontal.fedavgm", hospitals().params(**bad))
    assert caught.value.field == next(iter(bad))
