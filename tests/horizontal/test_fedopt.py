"""FedAdagrad, FedAdam and FedYogi: Algorithm 2 of their paper written a second time, and FedAvg where τ is vast."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError
from atoll.contract.program import build

ALL = ("horizontal.fedadagrad", "horizontal.fedadam", "horizontal.fedyogi")
LOCAL = {"batch_size": 16, "local_epochs": 2, "learning_rate": 0.2}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("drawn", [3, 2])
def test_it_is_algorithm_2(hospitals: Any, drive: Any, name: str, drawn: int) -> None:
    """With Σ nₖ/n in place of 1/|S|; m₋₁ = 0, v₋₁ = τ², and no correction for it."""
    sites, eta, beta1, beta2, tau = hospitals(), 0.3, 0.7, 0.9, 0.05
    more: dict[str, Any] = {"beta1": beta1, "tau": tau} | ({} if name == "horizontal.fedadagrad" else {"beta2": beta2})
    params = sites.params(rounds=8, sites_per_round=drawn, server_learning_rate=eta, **more, **LOCAL)
    driven = sites.train(drive, name, params)
    x, m, v = np.zeros(3), np.zeros(3), np.full(3, tau**2)
    for number, (asked, replies) in enumerate(zip(driven.rounds, driven.replies, strict=True)):
        assert set(asked.send) == {"weights"}
        assert np.allclose(asked.send["weights"], x, rtol=0, atol=1e-10)
        assert len(replies) == drawn
        changes = [sites.sgd(site, x, sites.batches(site, number, 16, 2), 0.2) - x for site in replies]
        delta = np.average(changes, axis=0, weights=[sites.share[site] for site in replies])
        m = beta1 * m + (1 - beta1) * delta
        v = {
            "horizontal.fedadagrad": v + delta**2,
            "horizontal.fedadam": beta2 * v + (1 - beta2) * delta**2,
            "horizontal.fedyogi": v - (1 - beta2) * delta**2 * np.sign(v - delta**2),
        }[name]
        x = x + eta * m / (np.sqrt(v) + tau)
    assert np.allclose(driven.result["model"].weights, x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_with_a_vast_tau_it_is_fedavg(hospitals: Any, drive: Any, name: str) -> None:
    """√v + τ is then 2τ for every weight: with η = 2τ and no mean over rounds, a step is Δ."""
    sites = hospitals()
    more = {} if name == "horizontal.fedadagrad" else {"beta2": 1 - 1e-12}
    vast = sites.params(rounds=5, beta1=0.0, tau=1e6, server_learning_rate=2e6, **more, **LOCAL)
    found = sites.train(drive, name, vast).result["model"].weights
    fedavg = sites.train(drive, "horizontal.fedavg", sites.params(rounds=5, **LOCAL)).result["model"].weights
    assert np.allclose(found, fedavg, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_a_site_without_rows_changes_nothing(hospitals: Any, drive: Any, name: str) -> None:
    sites = hospitals()
    params, full = sites.params(rounds=4, **LOCAL), sites.tables
    alone = sites.train(drive, name, params).result
    sites.tables = {**full, "none": full["s0"].rows(np.zeros(40, bool))}
    beside = sites.train(drive, name, params).result
    assert alone["model"].weights.tobytes() == beside["model"].weights.tobytes()
    assert alone["history"] == beside["history"]


@pytest.mark.parametrize("name", ALL)
def test_frozen_layers_stay(hospitals: Any, drive: Any, name: str) -> None:
    sites = hospitals()
    weights = sites.train(drive, name, sites.params(rounds=4, freeze=["head"], **LOCAL)).result["model"].weights
    assert weights[0] == 0
    assert weights[1:].all()


@pytest.mark.parametrize("name", ALL)
def test_a_batch_normalisations_means_are_averaged(hospitals: Any, drive: Any, name: str) -> None:
    pytest.importorskip("torch")
    sites, model = hospitals(), {"kind": "mlp", "features": ["u", "v"], "hidden": [3], "norm": "batch"}
    trained = {}
    for program in (name, "horizontal.fedavg"):
        params = {"target": "y", "model": model, "rounds": 2, "batch_size": 20}
        made: Any = build(program, params)
        running = made.model(sites.tables["s0"].schema).running
        trained[program] = sites.train(drive, program, params).rounds[1].send["weights"]
    assert np.allclose(trained[name][running], trained["horizontal.fedavg"][running], atol=1e-6)
    assert np.abs(trained[name] - trained["horizontal.fedavg"]).max() > 0.001


@pytest.mark.parametrize("bad", [{"beta1": 1.0}, {"beta2": 1.0}, {"tau": 0.0}, {"server_learning_rate": 0.0}])
def test_senseless_settings_are_refused(hospitals: Any, bad: dict[str, float]) -> None:
    for name in ALL:
        with pytest.raises(PlanError):
            build(name, hospitals().params(**bad))
