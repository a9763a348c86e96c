"""SCAFFOLD: Algorithm 1 written a second time, and the optimum that FedAvg's many local steps miss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from atoll.contract.program import build

SIZES = (30, 60, 40, 25)
RATE, STEPS = 0.5, 5


def params_of(sites: Any, **more: Any) -> dict[str, Any]:
    """Full batches, so that nothing is left to the shuffles."""
    return sites.params(batch_size=1000, **{"local_steps": STEPS, "learning_rate": RATE, **more})  # type: ignore[no-any-return]


def train(drive: Any, sites: Any, name: str = "horizontal.scaffold", **more: Any) -> Any:
    return sites.train(drive, name, params_of(sites, **more))


def algorithm_1(
    sites: Any, rounds: Sequence[Sequence[str]], weighting: str = "sites", eta_g: float = 1.0, clip: float = np.inf
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(x before each round and at the end, c likewise), with option II, by Karimireddy et al. 2020."""
    x, c, own = np.zeros(3), np.zeros(3), {site: np.zeros(3) for site in sites.tables}
    xs, cs = [x], [c]
    for drawn in rounds:
        moves, turns, weights = [], [], []
        for site in drawn:
            y = x
            for _ in range(STEPS):
                y = y - RATE * (sites.gradient(site, y) - own[site] + c)
            turn = np.clip((x - y) / (STEPS * RATE) - c, -clip, clip)  # c_i⁺ − c_i
            own[site] = own[site] + turn
            moves.append(y - x)
            turns.append(turn)
            weights.append(sites.share[site] if weighting == "rows" else 1)
        x = x + eta_g * np.average(moves, axis=0, weights=weights)
        c = c + len(drawn) / len(own) * np.average(turns, axis=0, weights=weights)
        xs.append(x)
        cs.append(c)
    return xs, cs


@pytest.mark.parametrize(
    ("weighting", "more"),
    [("sites", {}), ("rows", {}), ("sites", {"server_learning_rate": 0.7}), ("sites", {"sites_per_round": 2}),
     ("sites", {"control_clip": 0.1})],
)  # fmt: skip
def test_it_is_algorithm_1_with_option_ii(hospitals: Any, drive: Any, weighting: str, more: dict[str, Any]) -> None:
    sites = hospitals("linear", SIZES, unlike=True)
    driven = train(drive, sites, rounds=12, weighting=weighting, **more)
    drawn = [list(replies) for replies in driven.replies]
    eta_g, clip = more.get("server_learning_rate", 1.0), more.get("control_clip", np.inf)
    xs, cs = algorithm_1(sites, drawn, weighting, eta_g, clip)
    assert {len(asked) for asked in drawn} == {more.get("sites_per_round", 4)}
    for asked, x, c in zip(driven.rounds, xs, cs, strict=False):
        assert np.allclose(asked.send["weights"], x, rtol=0, atol=1e-12)
        assert np.allclose(asked.send["control"], c, rtol=0, atol=1e-12)
    assert np.allclose(driven.result["model"].weights, xs[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("weighting", ["sites", "rows"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_it_comes_to_the_optimum_that_fedavg_misses(
    hospitals: Any, drive: Any, weighting: str, momentum: float
) -> None:
    """The paper's toy, of drift: the more local steps, the farther FedAvg's fixed point is from the optimum."""
    sites, off = hospitals("linear", SIZES, unlike=True), {}
    for name in ("horizontal.scaffold", "horizontal.fedavg"):
        common = {"rounds": 60, "weighting": weighting, "momentum": momentum}
        found = train(drive, sites, name, **common).result["model"].weights
        off[name] = np.abs(found - sites.optimum(weighting)).max()
    assert off["horizontal.scaffold"] < 1e-5
    assert off["horizontal.fedavg"] > 0.05


def test_it_comes_there_with_few_sites_a_round_and_with_clipped_controls(hospitals: Any, drive: Any) -> None:
    """What a clip takes from a control variate's change comes with the next."""
    sites = hospitals("linear", SIZES, unlike=True)
    driven = train(drive, sites, rounds=150, sites_per_round=2, control_clip=0.1)
    assert np.abs(driven.replies[0][driven.reduced[0].sites[0]]["control"]).max() == 0.1
    assert np.abs(driven.result["model"].weights - sites.optimum("sites")).max() < 1e-4


def test_with_momentum_a_control_variate_is_still_a_mean_of_gradients(hospitals: Any, drive: Any) -> None:
    """Weighted by how often each stands in the change, so the size is a gradient's."""
    sites, beta = hospitals("linear"), 0.8
    driven = train(drive, sites, rounds=1, momentum=beta, learning_rate=0.1)
    for site, reply in driven.replies[0].items():
        w, velocity, gradients = np.zeros(3), np.zeros(3), []
        for _ in range(STEPS):
            gradients.append(sites.gradient(site, w))
            velocity = beta * velocity + gradients[-1]
            w = w - 0.1 * velocity
        often = [sum(beta**k for k in range(STEPS - step)) for step in range(STEPS)]
        assert np.allclose(reply["control"], np.average(gradients, axis=0, weights=often), rtol=0, atol=1e-12)


def test_with_one_local_step_it_is_fedavg(hospitals: Any, drive: Any) -> None:
    """Corrections add up to nothing where all sites step from the same weights."""
    ours, fedavg = (
        train(drive, hospitals("logistic"), name, rounds=20, local_steps=1, weighting="sites").result["model"].weights
        for name in ("horizontal.scaffold", "horizontal.fedavg")
    )
    assert np.allclose(ours, fedavg, rtol=0, atol=1e-12)


def test_one_site_alone_has_nothing_to_correct(hospitals: Any, drive: Any) -> None:
    sites = hospitals("linear", (50,))
    found = train(drive, sites, rounds=4).result["model"].weights
    x = np.zeros(3)
    for _ in range(4 * STEPS):
        x = x - RATE * sites.gradient("s0", x)
    assert np.allclose(found, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weighting", ["sites", "rows"])
def test_a_site_without_rows_changes_nothing(hospitals: Any, drive: Any, weighting: str) -> None:
    sites = hospitals("linear", SIZES)
    alone, full = train(drive, sites, rounds=5, weighting=weighting), sites.tables
    sites.tables = {**full, "none": full["s0"].rows(np.zeros(SIZES[0], bool))}
    beside = train(drive, sites, rounds=5, weighting=weighting)
    assert alone.result["model"].weights.tobytes() == beside.result["model"].weights.tobytes()
    assert beside.desks["none"].state == {}


@pytest.mark.parametrize(("weighting", "drawn"), [("sites", 4), ("sites", 2), ("rows", 4)])
def test_the_mean_control_variate_is_the_mean_of_the_sites(
    hospitals: Any, drive: Any, weighting: str, drawn: int
) -> None:
    """So corrections cancel: of all sites, those too that were not asked."""
    sites = hospitals("linear", SIZES)
    driven = train(drive, sites, rounds=9, checkpoint_every=9, weighting=weighting, sites_per_round=drawn)
    own = [driven.desks[site].state.get("control", np.zeros(3)) for site in sites.tables]
    share = list(sites.share.values()) if weighting == "rows" else None
    [(_, checkpoint)] = driven.checkpoints
    assert np.allclose(checkpoint.state["control"], np.average(own, axis=0, weights=share), atol=1e-12)


def test_frozen_layers_have_no_control_variates(hospitals: Any, drive: Any) -> None:
    """They neither move nor travel."""
    driven = train(drive, hospitals("linear"), rounds=5, freeze=["head"])
    weights, control = driven.result["model"].weights, driven.rounds[-1].send["control"]
    assert driven.replies[0]["s0"]["control"].shape == (2,)
    assert (weights[0], control[0]) == (0, 0)
    assert weights[1:].all()
    assert control[1:].all()


def test_what_follows_the_data_has_no_control_variate(hospitals: Any, drive: Any) -> None:
    """It moves by its mean change."""
    pytest.importorskip("torch")
    sites, model = hospitals(), {"kind": "mlp", "features": ["u", "v"], "hidden": [3], "norm": "batch"}
    params = {"target": "y", "model": model, "rounds": 3, "batch_size": 20, "server_learning_rate": 0.5}
    made: Any = build("horizontal.scaffold", params)
    running = made.model(sites.tables["s0"].schema).running
    driven = sites.train(drive, "horizontal.scaffold", params)
    before, after = (driven.rounds[i].send["weights"][running] for i in (0, 1))
    mean = np.mean([reply["weights"][running] for reply in driven.replies[0].values()], axis=0)
    assert running.stop - running.start == 6
    assert np.allclose(after, before + mean, atol=1e-6)
    assert not driven.rounds[-1].send["control"][running].any()
    assert driven.rounds[-1].send["control"][: running.start].any()


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_sites_keep_their_control_variates_in_a_whole_federation(
    hospitals: Any, federation: Any, drive: Any, protection: str
) -> None:
    """With journals, and few sites a round: the same weights as when the two halves are driven by hand."""
    sites = hospitals("linear", SIZES)
    params = params_of(sites, rounds=4, sites_per_round=3, checkpoint_every=2)
    plan = federation.plan("horizontal.scaffold", params, sites.tables, protection=protection)
    found = federation.run(plan, sites.tables)["result"]["model"].weights
    drawn = [list(replies) for replies in sites.train(drive, "horizontal.scaffold", params).replies]
    xs, _ = algorithm_1(sites, drawn)
    assert np.allclose(found, xs[-1], rtol=0, atol=1e-6 if protection == "secagg" else 1e-12)
