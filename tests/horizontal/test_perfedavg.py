"""Per-FedAvg: the paper's steps with an exact Hessian, the optimum in closed form, and FedAvg without adaptation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

SETTINGS = {"rounds": 3, "local_epochs": 2, "batch_size": 8, "learning_rate": 0.3}
VARIANTS = ("first-order", "hessian-free")


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_papers_algorithm(hospitals: Any, drive: Any, variant: str) -> None:
    study, alpha = hospitals(), 0.4
    params = study.params(**SETTINGS, variant=variant, adapt_rate=alpha, adapt_steps=2)
    driven = study.train(drive, "horizontal.perfedavg", params)
    final = np.zeros(3)
    for number in range(3):
        changes = {}
        for site in study.tables:
            w = final
            for one, two, three in zip(*(study.batches(site, number, 8, 2, part) for part in (0, 1, 2)), strict=True):
                slope = study.gradient(site, w - alpha * study.gradient(site, w, one), two)
                if variant == "hessian-free":
                    slope = slope - alpha * study.hessian(site, w, three) @ slope
                w = w - 0.3 * slope
            changes[site] = w - final
        final = final + study.mean(changes)
    assert np.allclose(driven.result["model"].weights, final, rtol=0, atol=1e-9)
    for site, desk in driven.desks.items():
        adapted = study.sgd(site, final, study.batches(site, 3, 8)[:2], alpha)
        assert np.allclose(desk.personal["weights"], adapted, rtol=0, atol=1e-9)


def test_without_adaptation_it_is_fedavg(hospitals: Any, drive: Any) -> None:
    study = hospitals()
    whole = study.params(rounds=5, batch_size=100, learning_rate=0.5)
    found = study.train(drive, "horizontal.perfedavg", {**whole, "adapt_rate": 0.0}).result
    fedavg = study.train(drive, "horizontal.fedavg", whole).result
    assert np.allclose(found["model"].weights, fedavg["model"].weights, rtol=0, atol=1e-13)
    assert found["history"] == pytest.approx(fedavg["history"])


def test_it_finds_the_weights_that_are_best_after_a_step(hospitals: Any, drive: Any) -> None:
    """The paper's (2), for least squares: f(w) = wᵀHw/2 − bᵀw, whose step leads to Aw + αb with A = I − αH; so the
    mean of f(Aw + αb) is least where the mean of A(HA)w is that of A(b − αHb)."""
    study, alpha = hospitals("linear"), 0.6
    params = study.params(rounds=100, batch_size=100, learning_rate=2.5, adapt_rate=alpha, variant="hessian-free")
    driven = study.train(drive, "horizontal.perfedavg", params)
    left, right = np.zeros((3, 3)), np.zeros(3)
    for site, share in study.share.items():
        h, b = study.hessian(site, np.zeros(3)), -study.gradient(site, np.zeros(3))
        a = np.eye(3) - alpha * h
        left, right = left + share * a @ h @ a, right + share * a @ (b - alpha * h @ b)
    best = np.linalg.solve(left, right)
    assert np.allclose(driven.result["model"].weights, best, rtol=0, atol=1e-4)
    other = study.train(drive, "horizontal.perfedavg", {**params, "variant": "first-order"}).result["model"].weights
    assert np.abs(other - best).max() > 1e-3, "leaving the Hessian out leads elsewhere"


def test_a_networks_meta_gradient_is_the_derivative_of_the_loss_after_a_step(hospitals: Any, drive: Any) -> None:
    """To the accuracy of float32 and of kinks; the first-order variant is several times farther off."""
    pytest.importorskip("torch")
    study, alpha = hospitals(sizes=(200,)), 2.0
    params = {"target": "y", "model": {"kind": "mlp", "features": ["u", "v"], "hidden": [6]}, "rounds": 1}
    params |= {"batch_size": 200, "learning_rate": 1e-3, "adapt_rate": alpha}
    errors = {}
    for variant in VARIANTS:
        model = study.train(drive, "horizontal.perfedavg", {**params, "variant": variant}).result["model"]
        start, batch = model.initial(0), model.examples(study.tables["s0"])
        slope, random, apart = (start - model.weights) / 1e-3, np.random.default_rng(1), []
        for _ in range(20):
            way = random.normal(size=len(start)) / len(start) ** 0.5
            up, down = (start + far * way for far in (5e-3, -5e-3))
            losses = [
                model.loss_and_gradient(w - alpha * model.loss_and_gradient(w, batch)[1], batch)[0] for w in (up, down)
            ]
            apart.append(slope @ way - (losses[0] - losses[1]) / 1e-2)
        errors[variant] = float(np.sqrt(np.mean(np.square(apart))) / np.linalg.norm(slope))
    assert errors["hessian-free"] < 0.04, errors
    assert errors["hessian-free"] < errors["first-order"] / 4, errors
