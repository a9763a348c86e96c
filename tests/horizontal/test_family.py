"""What every algorithm of federated averaging's family must stand: odd sites, few sites, frozen layers, compression.

Algorithms are found by their registration; each is tried with the first model here that suits it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError, PlanError
from atoll.contract.program import REGISTRY, Cohort, build
from atoll.contract.rounds import Round
from atoll.data.table import Table
from atoll.horizontal.federated import Federated

COLUMNS: dict[str, dict[str, Any]] = {
    "u": {"range": [-4, 4]},
    "v": {"range": [0, 10]},
    "image": {"dtype": "image", "shape": [4, 4]},
    "y": {"dtype": "integer", "values": [0, 1], "role": "label"},
}
MODELS: list[dict[str, Any]] = [
    {"family": "logistic", "features": ["u", "v"]},
    {"model": {"kind": "mlp", "features": ["u", "v"], "hidden": [4]}},
    {"model": {"kind": "cnn", "image": "image", "channels": [2], "hidden": 3, "norm": "batch"}},
]
NEEDED: dict[str, dict[str, Any]] = {
    "horizontal.feddf": {"generated": 30, "distil_steps": 3},
    "horizontal.online": {"time": "v", "start": 0, "every": 2.5},
}
"""What an algorithm cannot do without."""
FAMILY = sorted(name for name, cls in REGISTRY.items() if issubclass(cls, Federated))
OWN_PACE = {"horizontal.fedasync", "horizontal.fedbuff"}
"""Whose sites train each at its own pace: rounds, and who is in them, are other ones (they have tests of their own)."""
SINGLE = {"horizontal.shapley"}
"""That needs single changes, whole, and rounds between those of training."""
TRAINING = ("train", "train_single", "train_next", "hand_in")
every_algorithm = pytest.mark.parametrize("name", FAMILY)
in_step = pytest.mark.parametrize("name", sorted(set(FAMILY) - OWN_PACE))
by_sums = pytest.mark.parametrize("name", sorted(set(FAMILY) - OWN_PACE - SINGLE))


def tables(sizes: dict[str, int], seed: int = 3) -> dict[str, Table]:
    """Sites of these sizes; of one whose name begins with "one-sided" all labels are 1."""
    from atoll.contract.schema import Column, TableSchema

    random = np.random.default_rng(seed)
    schema = TableSchema(name="test", columns={n: Column(**c) for n, c in COLUMNS.items()}, max_rows=1000)
    made = {}
    for i, (name, n) in enumerate(sizes.items()):
        u, v = random.uniform(-4, 4, n), random.uniform(0, 10, n)
        y = (random.random(n) < 1 / (1 + np.exp(-u + (i - 1)))).astype(float)
        y = np.ones(n) if name.startswith("one-sided") else y
        image = (random.integers(0, 200, (n, 4, 4)) + 50 * y[:, None, None]).astype(np.uint8)
        made[name] = Table(schema, {"u": u, "v": v, "image": image, "y": y})
    return made


def params_of(name: str, schema: Any, first: int = 0, **more: Any) -> dict[str, Any]:
    """Parameters that the algorithm takes, with the first model from *first* on that suits it."""
    refused: list[PlanError] = []
    for model in MODELS[first:]:
        params = {"target": "y", "rounds": 4, "batch_size": 8, "learning_rate": 0.05, **NEEDED.get(name, {}), **model}
        params |= more
        try:
            next(build(name, params).coordinate(Cohort(("a", "b", "c"), schema)))
        except PlanError as error:
            refused.append(error)
            continue
        return params
    raise refused[0]


def run(
    drive: Any, name: str, data: dict[str, Table], options: dict[str, Any] | None = None, first: int = 0, **driven: Any
) -> Any:
    schema = next(iter(data.values())).schema
    params = params_of(name, schema, first, **(options or {}))
    return drive(build(name, params).coordinate(Cohort(tuple(data), schema, seed=5)), data, **driven)


def weights_of(driven: Any) -> np.ndarray:
    found = driven.result["model"].weights
    assert np.isfinite(found).all()
    return found  # type: ignore[no-any-return]


@every_algorithm
def test_an_empty_site_a_site_of_one_row_and_a_one_sided_site_are_no_trouble(drive: Any, name: str) -> None:
    sizes = {"empty": 0, "single": 1, "one-sided": 20, "plenty": 60}
    weights_of(run(drive, name, tables(sizes)))


@by_sums
def test_an_empty_site_changes_nothing(drive: Any, name: str) -> None:
    """No row, no weight: the mean is that of the others; but of some the coordinator's state moves by the share of
    the cohort that took part, and it took part."""
    data = tables({"a": 20, "b": 30, "c": 25})
    alone = run(drive, name, data)
    empty = data["a"].rows(np.zeros(20, bool))
    beside = run(drive, name, {**data, "none": empty})
    same = np.allclose(beside.result["history"], alone.result["history"], rtol=1e-9)
    assert same or name in ("horizontal.scaffold", "horizontal.feddyn")


@in_step
def test_only_those_that_were_drawn_are_asked(drive: Any, name: str) -> None:
    driven = run(drive, name, tables({"a": 20, "b": 30, "c": 25, "d": 12}), {"sites_per_round": 2, "rounds": 6})
    weights_of(driven)
    drawn = [item.sites for item in driven.rounds if isinstance(item, Round) and item.name in TRAINING]
    assert all(sites is not None and len(set(sites)) == 2 for sites in drawn)
    assert len(set(drawn)) > 1


@every_algorithm
def test_a_site_may_be_away_for_a_round(drive: Any, name: str) -> None:
    data = tables({"a": 20, "b": 30, "c": 25})
    weights_of(run(drive, name, data, None, absent=lambda number: ("b",) if number == 1 else ()))


@every_algorithm
def test_frozen_layers_keep_still_and_do_not_travel(drive: Any, name: str) -> None:
    data = tables({"a": 20, "b": 30, "c": 25})
    schema = data["a"].schema
    params = params_of(name, schema, 1)
    model = build(name, params).model(schema)
    first = next(iter(model.layers))
    driven = run(drive, name, data, {"freeze": [first]}, 1)
    frozen = np.zeros(len(model.weights), bool)
    frozen[model.layers[first]] = True
    moved = weights_of(driven) - model.initial(5)
    assert not moved[frozen].any()
    sent = next(item for item in driven.rounds if item.name in TRAINING).reply["weights"].shape[0]
    whole = (
        next(item for item in run(drive, name, data, None, 1).rounds if item.name in TRAINING).reply["weights"].shape[0]
    )
    assert sent < whole


@every_algorithm
def test_an_unknown_layer_is_refused_before_any_round(name: str) -> None:
    schema = tables({"a": 5})["a"].schema
    with pytest.raises(PlanError) as caught:
        next(build(name, params_of(name, schema) | {"freeze": ["nowhere"]}).coordinate(Cohort(("a",), schema)))
    assert (caught.value.code, caught.value.field) == ("model.no-layer", "nowhere")


@every_algorithm
@pytest.mark.parametrize("compress", [{"bits": 12}, {"keep": 0.5, "choose": "top", "bits": 10}], ids=str)
def test_it_can_be_compressed(drive: Any, name: str, compress: dict[str, Any]) -> None:
    if name in SINGLE or (name == "horizontal.fedasync" and "keep" in compress):
        pytest.skip("it is refused: what is mixed one by one, or valued, is sent whole")
    weights_of(run(drive, name, tables({"a": 20, "b": 30, "c": 25}), {"compress": compress, "clip": 1.0}))


@every_algorithm
def test_a_site_that_diverges_drops_out_and_the_others_go_on(federation: Any, name: str) -> None:
    """Rows at the edge of the ranges make its steps too long; those of the others are not."""
    data = tables({"a": 30, "b": 30, "c": 30})
    columns = dict(data["b"].columns)
    columns["y"] = np.full(30, np.inf)  # a broken label that no schema check has seen
    data["b"] = Table(data["b"].schema, columns)
    params = params_of(name, data["a"].schema)
    plan = federation.plan(name, params, data, cohort={"min_sites": 2})
    outcome = federation.run(plan, data)
    assert np.isfinite(outcome["result"]["model"].weights).all()
    assert [event["dropout"] for event in federation.events if "dropout" in event] == ["b"]
    assert "site.diverged" not in str(outcome)


@pytest.mark.slow
@by_sums
def test_noise_for_whole_sites_is_calibrated_and_added(federation: Any, name: str) -> None:
    data = tables({"a": 30, "b": 30, "c": 30})
    params = params_of(name, data["a"].schema, rounds=2, clip=0.5, clip_norm_l2=0.5)
    privacy = {"unit": "site", "epsilon": 1e6, "delta": 1e-6}
    plan = federation.plan(name, params, data, privacy=privacy, protection="secagg", cohort={"min_sites": 3})
    outcome = federation.run(plan, data)
    assert np.isfinite(outcome["result"]["model"].weights).all()


def test_no_site_is_left_when_all_diverge(federation: Any) -> None:
    data = tables({"a": 30, "b": 30})
    data = {n: Table(t.schema, {**t.columns, "y": np.full(len(t), np.inf)}) for n, t in data.items()}
    params = {"target": "y", **MODELS[0], "rounds": 3}
    with pytest.raises(AtollError) as caught:
        federation.run(federation.plan("horizontal.fedavg", params, data), data)
    assert "learning rate" in caught.value.remedy
