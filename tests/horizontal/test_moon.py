"""MOON: its two losses written a second time in numpy, and FedAvg where there is nothing to contrast."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, build
from atoll.data.sources import SourceSpec
from atoll.models.model import Examples, Represents, make
from atoll.runtime.study import check_plan

pytest.importorskip("torch")
MLP = {"kind": "mlp", "features": ["u", "v"], "hidden": [5, 4]}
PARAMS = {"target": "y", "model": MLP, "rounds": 4, "batch_size": 16, "learning_rate": 0.3}


def network(sites: Any) -> Any:
    return make({**MLP, "target": "y"}, sites.tables["s0"].schema)


def represented(made: Any, weights: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the last hidden layer, log-odds) of a multilayer perceptron with ReLU."""
    part = {name: weights[where].astype(np.float64) for name, where in made.layers.items()}
    names = [name.removesuffix(".weight") for name in part if name.endswith(".weight")]
    for name in names[:-1]:
        bias = part[f"{name}.bias"]
        x = np.maximum(x @ part[f"{name}.weight"].reshape(len(bias), -1).T + bias, 0)
    return x, x @ part["head.weight"] + part["head.bias"]


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-8)


def objective(made: Any, w: Any, batch: Examples, anchor: Any, previous: Any, mu: float, tau: float) -> float:
    """ℓ_sup + μ·ℓ_con as §3.3 has them."""
    x = batch.inputs[0].astype(np.float64)
    (z, odds), (z_glob, _), (z_prev, _) = (represented(made, held, x) for held in (w, anchor, previous))
    near, far = np.exp(cosine(z, z_glob) / tau), np.exp(cosine(z, z_prev) / tau)
    return float((np.logaddexp(0, odds) - batch.labels * odds - mu * np.log(near / (near + far))).mean())


@pytest.mark.parametrize(("mu", "tau"), [(1.0, 0.5), (5.0, 0.1), (0.0, 0.5)])
def test_loss_and_gradient_are_the_papers(hospitals: Any, mu: float, tau: float) -> None:
    """The gradient against differences of the loss written a second time, in double precision."""
    sites = hospitals()
    made, random = network(sites), np.random.default_rng(3)
    batch = made.examples(sites.tables["s0"])
    start = made.initial(7)
    w, anchor, previous = (start + random.normal(0, 0.3, len(start)) for _ in range(3))
    w = w.astype(np.float32).astype(np.float64)
    loss, gradient = made.contrastive(w, batch, anchor, previous, strength=mu, temperature=tau)
    assert loss == pytest.approx(objective(made, w, batch, anchor, previous, mu, tau), rel=1e-5)
    for i in range(len(w)):
        step = np.zeros(len(w))
        step[i] = 1e-6
        higher, lower = (objective(made, w + s, batch, anchor, previous, mu, tau) for s in (step, -step))
        assert gradient[i] == pytest.approx((higher - lower) / 2e-6, rel=1e-3, abs=2e-5 * (1 + mu / tau))


def test_without_strength_it_is_the_models_own_loss(hospitals: Any) -> None:
    sites = hospitals()
    made = network(sites)
    batch, w, other = made.examples(sites.tables["s1"]), made.initial(1), made.initial(2)
    loss, gradient = made.contrastive(w, batch, other, other, strength=0.0, temperature=0.5)
    plain = made.loss_and_gradient(w, batch)
    assert loss == pytest.approx(plain[0], rel=1e-6)
    assert np.allclose(gradient, plain[1], atol=1e-7)


def test_units_that_are_all_silent_have_a_gradient(hospitals: Any) -> None:
    """A representation of zeros has no direction, and must not make a site diverge."""
    sites = hospitals()
    made = network(sites)
    w = made.initial(1)
    for name, where in made.layers.items():
        if name.endswith("bias") and name != "head.bias":
            w[where] = -100
    loss, gradient = made.contrastive(
        w, made.examples(sites.tables["s0"]), made.initial(2), w, strength=1.0, temperature=0.5
    )
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()


def test_a_site_is_contrasted_with_what_it_reached_last(hospitals: Any, drive: Any) -> None:
    """Algorithm 1, with sites that are not always asked: the previous weights are of their own last round."""
    sites, mu, tau = hospitals(), 2.0, 0.3
    made = network(sites)
    driven = sites.train(
        drive, "horizontal.moon", {**PARAMS, "contrast": mu, "temperature": tau, "sites_per_round": 2, "rounds": 6}
    )
    reached: dict[str, np.ndarray] = {}
    rested = 0
    for number, (asked, replies) in enumerate(zip(driven.rounds, driven.replies, strict=True)):
        w, changes = asked.send["weights"], []
        assert set(asked.send) == {"weights"}
        for site in replies:
            rested += site in reached and site not in driven.replies[number - 1]
            local, examples = w.copy(), made.examples(sites.tables[site])
            for rows in sites.batches(site, number, 16):
                _, slope = made.contrastive(
                    local, examples.take(rows), w, reached.get(site, w), strength=mu, temperature=tau
                )
                local = local - np.float32(0.3) * slope
            reached[site] = local
            changes.append(local - w)
            assert np.allclose(driven.replies[number][site]["weights"] / len(examples), local - w, atol=1e-6)
        mean = np.average(changes, axis=0, weights=[sites.share[site] for site in replies])
        if number + 1 < len(driven.rounds):
            assert np.allclose(driven.rounds[number + 1].send["weights"], w + mean, atol=1e-6)
    assert rested


def test_without_contrast_it_is_fedavg(hospitals: Any, drive: Any) -> None:
    """And the first round is FedAvg's whatever the contrast: there is nothing yet to be unlike."""
    sites = hospitals()
    ours, none, fedavg = (
        [asked.send["weights"] for asked in sites.train(drive, name, {**PARAMS, **more}).rounds]
        for name, more in (
            ("horizontal.moon", {"contrast": 5.0}),
            ("horizontal.moon", {"contrast": 0.0}),
            ("horizontal.fedavg", {}),
        )
    )
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(none, fedavg, strict=True))
    assert np.allclose(ours[1], fedavg[1], atol=1e-2)
    assert np.abs(ours[3] - fedavg[3]).max() > 1e-3


def test_a_site_without_rows_changes_nothing(hospitals: Any, drive: Any) -> None:
    sites = hospitals()
    alone, full = sites.train(drive, "horizontal.moon", PARAMS).result, sites.tables
    sites.tables = {**full, "none": full["s0"].rows(np.zeros(40, bool))}
    beside = sites.train(drive, "horizontal.moon", PARAMS)
    assert alone["model"].weights.tobytes() == beside.result["model"].weights.tobytes()
    assert beside.desks["none"].state == {}


def test_a_model_without_representations_is_refused_before_any_data_is_read(hospitals: Any, federation: Any) -> None:
    sites = hospitals()
    linear = {"family": "logistic", "features": ["u", "v"], "target": "y"}
    assert not isinstance(make({"kind": "linear", **linear}, sites.tables["s0"].schema), Represents)
    with pytest.raises(PlanError) as caught:
        next(build("horizontal.moon", linear).coordinate(Cohort(tuple(sites.tables), sites.tables["s0"].schema)))
    assert caught.value.code == "model.no-representation"
    plan = federation.plan("horizontal.moon", linear, sites.tables)
    with pytest.raises(PlanError, match="no representation"):
        check_plan(plan)
    with pytest.raises(PlanError, match=r"model\.no-representation"):
        federation.run(plan, {site: SourceSpec(path="absent.csv") for site in sites.tables})


def test_somebody_elses_network_without_a_head_is_refused(hospitals: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atoll.models.allowed._NAMES", {"torch.nn:Linear"})
    linear = {"kind": "module", "name": "torch.nn:Linear", "arguments": {"in_features": 2, "out_features": 1}}
    program: Any = build("horizontal.moon", {"target": "y", "model": {**linear, "features": ["u", "v"]}})
    with pytest.raises(PlanError) as caught:
        program.model(hospitals().tables["s0"].schema)
    assert caught.value.code == "model.no-representation"
