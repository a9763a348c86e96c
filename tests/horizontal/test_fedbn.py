"""FedBN: normalisation layers learn at their site and never travel; the rest is FedAvg."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, build
from atoll.data.table import Table
from atoll.runtime.study import check_plan

pytest.importorskip("torch")

COLUMNS = {
    "u": {"range": [-8, 8]},
    "v": {"range": [-8, 8]},
    "y": {"dtype": "integer", "values": [0, 1], "role": "label"},
}
SPEC = {"kind": "mlp", "features": ["u", "v"], "hidden": [6], "norm": "batch"}
SETTINGS = {"target": "y", "rounds": 3, "local_epochs": 1, "batch_size": 16, "learning_rate": 0.2}


def shifted(federation: Any) -> dict[str, Table]:
    """One task, seen by three scanners: each has its own brightness and contrast."""
    random = np.random.default_rng(0)
    tables = {}
    for i, (n, light, contrast) in enumerate(((60, -4, 1.0), (50, 0, 2.0), (70, 5, 0.7))):
        x = random.normal(size=(n, 2))
        y = (x[:, 0] * x[:, 1] > 0).astype(float)
        u, v = np.clip(light + contrast * x, -8, 8).T
        tables[f"s{i}"] = federation.table({"u": u, "v": v, "y": y}, COLUMNS)
    return tables


def train(drive: Any, program: str, tables: dict[str, Table], **more: Any) -> Any:
    params = {**SETTINGS, "model": SPEC, **more}
    return drive(build(program, params).coordinate(Cohort(tuple(tables), tables["s0"].schema)), tables)


def test_it_is_fedavg_of_all_but_the_normalisation_layers(federation: Any, drive: Any) -> None:
    """Written a second time, with each site's scales, offsets and running statistics kept apart."""
    tables = shifted(federation)
    driven = train(drive, "horizontal.fedbn", tables)
    model = driven.result["model"]
    kept = np.zeros(len(model.weights), bool)
    for name in ("weight", "bias", "running_mean", "running_var"):
        kept[model.layers[f"encoder.1.{name}"]] = True
    assert kept.sum() == 4 * 6 and model.normalisations == ("encoder.1",)
    shared, rows = model.initial(0), {site: len(table) for site, table in tables.items()}
    own = {site: shared[kept].astype(np.float32) for site in tables}
    for number in range(3):
        changes = np.zeros(len(shared))
        for site, table in tables.items():
            start = shared.copy()
            start[kept] = own[site]
            w, data = start.astype(np.float32), model.examples(table)
            order = np.random.Generator(np.random.Philox(np.random.SeedSequence((number, *site.encode()))))
            for batch in np.split(order.permutation(rows[site]), range(16, rows[site], 16)):
                step = model.loss_and_gradient(w, data.take(batch))[1]
                step[: model.running.start] *= np.float32(0.2)
                w = w - step
            own[site] = w[kept]
            changes += rows[site] / sum(rows.values()) * np.where(kept, 0, w - start)
        shared = shared + changes
    assert np.allclose(model.weights, shared, rtol=0, atol=1e-6)
    for site, desk in driven.desks.items():
        assert np.allclose(desk.personal["weights"][kept], own[site], rtol=0, atol=1e-5)
        assert np.array_equal(desk.personal["weights"][~kept], model.weights.astype(np.float32)[~kept])
    assert driven.rounds[0].reply["weights"].shape == ((~kept).sum(),)
    means = [desk.personal["weights"][model.layers["encoder.1.running_mean"]] for desk in driven.desks.values()]
    assert min(np.abs(a - b).max() for a, b in pairwise(means)) > 0.1


def test_where_inputs_are_shifted_it_beats_fedavg(federation: Any, drive: Any) -> None:
    tables, settings = shifted(federation), {"rounds": 40, "local_epochs": 2}
    found, fedavg = (
        train(drive, "horizontal.fedbn", tables, **settings),
        train(drive, "horizontal.fedavg", tables, **settings),
    )

    def right(site: str, weights: np.ndarray) -> float:
        called = fedavg.result["model"].with_weights(weights).predict(tables[site]) >= 0.5
        return float((called == tables[site]["y"]).mean())

    own = np.mean([right(site, desk.personal["weights"]) for site, desk in found.desks.items()])
    shared = np.mean([right(site, fedavg.result["model"].weights) for site in tables])
    assert own > shared + 0.1, (own, shared)


@pytest.mark.parametrize("model", [{**SPEC, "norm": "none"}, None])
def test_a_model_without_normalisation_is_refused_without_data(federation: Any, model: Any) -> None:
    tables = shifted(federation)
    chosen = {"model": model} if model else {"family": "logistic", "features": ["u", "v"]}
    plan = federation.plan("horizontal.fedbn", {**SETTINGS, **chosen}, tables)
    with pytest.raises(PlanError) as caught:
        check_plan(plan)
    assert caught.value.code == "model.no-normalisation"


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_batch_of_one_row_is_learned_from(federation: Any, drive: Any, norm: str) -> None:
    tables = {site: table.rows(np.arange(len(table)) < 17) for site, table in shifted(federation).items()}
    driven = train(drive, "horizontal.fedbn", tables, model={**SPEC, "norm": norm})
    assert np.isfinite(driven.result["model"].weights).all()
