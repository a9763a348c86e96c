"""FedDyn: Algorithm 1 written a second time, and the optimum that FedAvg's many local steps miss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from atoll.contract.program import build

SIZES = (30, 60, 40, 25)
RATE, STEPS, ALPHA = 0.3, 10, 0.5


def params_of(sites: Any, **more: Any) -> dict[str, Any]:
    """Full batches, so that nothing is left to the shuffles."""
    return sites.params(batch_size=1000, local_steps=STEPS, learning_rate=RATE, **more)  # type: ignore[no-any-return]


def train(drive: Any, sites: Any, name: str = "horizontal.feddyn", **more: Any) -> Any:
    alpha = {"alpha": ALPHA} if name == "horizontal.feddyn" else {}
    return sites.train(drive, name, params_of(sites, **alpha, **more))


def algorithm_1(
    sites: Any, rounds: Sequence[Sequence[str]], weighting: str = "sites", norm: float = np.inf
) -> list[np.ndarray]:
    """θ before each round and at the end, by Acar et al. 2021, with local steps for its argmin."""
    theta, h, own = np.zeros(3), np.zeros(3), {site: np.zeros(3) for site in sites.tables}
    found = [theta]
    for drawn in rounds:
        reached, weights = [], []
        for site in drawn:
            local = theta
            for _ in range(STEPS):
                local = local - RATE * (sites.gradient(site, local) - own[site] + ALPHA * (local - theta))
            far = np.linalg.norm(local - theta)
            local = theta + (local - theta) * min(1, norm / far)
            own[site] = own[site] - ALPHA * (local - theta)
            reached.append(local)
            weights.append(sites.share[site] if weighting == "rows" else 1)
        mean = np.average(reached, axis=0, weights=weights)
        h = h - ALPHA * len(drawn) / len(own) * (mean - theta)
        theta = mean - h / ALPHA
        found.append(theta)
    return found


@pytest.mark.parametrize(
    ("weighting", "more"),
    [("sites", {}), ("rows", {}), ("sites", {"sites_per_round": 2}), ("sites", {"clip_norm_l2": 0.3})],
)
def test_it_is_algorithm_1(hospitals: Any, drive: Any, weighting: str, more: dict[str, Any]) -> None:
    """Where a change is clipped, gₖ is of what was sent."""
    sites = hospitals("linear", SIZES, unlike=True)
    driven = train(drive, sites, rounds=12, weighting=weighting, **more)
    drawn = [list(replies) for replies in driven.replies]
    thetas = algorithm_1(sites, drawn, weighting, more.get("clip_norm_l2", np.inf))
    assert {len(asked) for asked in drawn} == {more.get("sites_per_round", 4)}
    for asked, theta in zip(driven.rounds, thetas, strict=False):
        assert set(asked.send) == {"weights"}
        assert np.allclose(asked.send["weights"], theta, rtol=0, atol=1e-11)
    assert np.allclose(driven.result["model"].weights, thetas[-1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("weighting", ["sites", "rows"])
def test_it_comes_to_the_optimum_that_fedavg_misses(hospitals: Any, drive: Any, weighting: str) -> None:
    """The only point where it can rest is the optimum of all, however many local steps."""
    sites = hospitals("linear", SIZES, unlike=True)
    off = {}
    for name in ("horizontal.feddyn", "horizontal.fedavg"):
        found = train(drive, sites, name, rounds=60, weighting=weighting).result["model"].weights
        off[name] = np.abs(found - sites.optimum(weighting)).max()
    assert off["horizontal.feddyn"] < 1e-5
    assert off["horizontal.fedavg"] > 0.05


def test_it_comes_there_with_few_sites_a_round(hospitals: Any, drive: Any) -> None:
    sites = hospitals("linear", SIZES, unlike=True)
    found = train(drive, sites, rounds=120, sites_per_round=2)
    assert np.abs(found.result["model"].weights - sites.optimum("sites")).max() < 1e-4


def test_a_site_without_rows_changes_nothing(hospitals: Any, drive: Any) -> None:
    sites = hospitals("linear", SIZES)
    for weighting in ("sites", "rows"):
        alone, full = train(drive, sites, rounds=5, weighting=weighting), sites.tables
        sites.tables = {**full, "none": full["s0"].rows(np.zeros(SIZES[0], bool))}
        beside, sites.tables = train(drive, sites, rounds=5, weighting=weighting), full
        assert alone.result["model"].weights.tobytes() == beside.result["model"].weights.tobytes()
        assert beside.desks["none"].state == {}


def test_what_the_coordinator_keeps_is_the_mean_of_the_sites(hospitals: Any, drive: Any) -> None:
    """h is the mean of all gₖ, of those too that were not asked."""
    sites = hospitals("linear", SIZES)
    driven = train(drive, sites, rounds=7, sites_per_round=2, checkpoint_every=7)
    own = [driven.desks[site].state.get("slope", np.zeros(3)) for site in sites.tables]
    [(_, checkpoint)] = driven.checkpoints
    assert np.allclose(checkpoint.state["drift"], np.mean(own, axis=0), atol=1e-12)


def test_frozen_layers_stay(hospitals: Any, drive: Any) -> None:
    weights = train(drive, hospitals("linear"), rounds=5, freeze=["head"]).result["model"].weights
    assert weights[0] == 0
    assert weights[1:].all()


def test_what_follows_the_data_moves_by_its_mean_change(hospitals: Any, drive: Any) -> None:
    pytest.importorskip("torch")
    sites, model = hospitals(), {"kind": "mlp", "features": ["u", "v"], "hidden": [3], "norm": "batch"}
    params = {"target": "y", "model": model, "rounds": 3, "batch_size": 20}
    running = build("horizontal.feddyn", params).model(sites.tables["s0"].schema).running  # type: ignore[attr-defined]
    driven = sites.train(drive, "horizontal.feddyn", params)
    for i in (0, 1):
        before, after = (driven.rounds[n].send["weights"][running] for n in (i, i + 1))
        mean = np.mean([reply["weights"][running] for reply in driven.replies[i].values()], axis=0)
        assert np.allclose(after, before + mean, atol=1e-6)


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_sites_keep_their_slopes_in_a_whole_federation(
    hospitals: Any, federation: Any, drive: Any, protection: str
) -> None:
    """With journals, and few sites a round: the same weights as when the two halves are driven by hand."""
    sites = hospitals("linear", SIZES)
    params = params_of(sites, rounds=4, sites_per_round=3, alpha=ALPHA)
    plan = federation.plan("horizontal.feddyn", params, sites.tables, protection=protection)
    found = federation.run(plan, sites.tables)["result"]["model"].weights
    drawn = [list(replies) for replies in sites.train(drive, "horizontal.feddyn", params).replies]
    assert np.allclose(found, algorithm_1(sites, drawn)[-1], rtol=0, atol=1e-6 if protection == "secagg" else 1e-11)
