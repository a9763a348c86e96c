"""Transfer to small sites: an encoder that the sites have installed, frozen, and heads learned by FedAvg.

No program of its own is needed: a model's ``base`` is where it begins; ``freeze``, or the base's own ``frozen``, keeps
its encoder as it is.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from atoll.contract.errors import AtollError
from atoll.contract.program import Cohort, build
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.models.model import make

pytest.importorskip("torch")

FEATURES = [f"x{i}" for i in range(6)]
SCHEMA = TableSchema(
    name="test",
    columns={
        **{name: Column(range=(-1, 1)) for name in FEATURES},
        "old": Column(dtype="integer", values=(0, 1), role="label"),
        "y": Column(dtype="integer", values=(0, 1), role="label"),
    },
)
MLP: dict[str, Any] = {"kind": "mlp", "features": FEATURES, "hidden": [16]}
PARAMS: dict[str, Any] = {"target": "y", "rounds": 20, "local_epochs": 2, "batch_size": 5, "learning_rate": 0.2}


def table(num_rows: int, seed: int) -> Table:
    """The old task is to tell whether a product of two features is above zero, the new one whether it is below −0.1."""
    x = np.random.default_rng(seed).uniform(-1, 1, (num_rows, 6))
    product = x[:, 0] * x[:, 1]
    labels = {"old": (product > 0).astype(float), "y": (product < -0.1).astype(float)}
    return Table(SCHEMA, {**dict(zip(FEATURES, x.T, strict=True)), **labels})


@pytest.fixture(scope="module")
def backbone() -> bytes:
    """An encoder that learned the old task from many rows, as a party saves it."""
    model = make({**MLP, "target": "old"}, SCHEMA)
    weights, examples, random = model.initial(0), model.examples(table(6000, 1)), np.random.default_rng(0)
    for _ in range(2500):
        _, gradient = model.loss_and_gradient(weights, examples.take(random.integers(0, 6000, 64)))
        weights = weights - 0.3 * gradient
    return save(dict(model.with_weights(weights).arrays()))


@pytest.fixture
def base(backbone: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("ATOLL_MODELS", str(tmp_path))
    (tmp_path / "quadrants.safetensors").write_bytes(backbone)
    return {"name": "quadrants", "sha256": hashlib.sha256(backbone).hexdigest()}


def fedavg(drive: Any, tables: dict[str, Table], **more: Any) -> Any:
    made = build("horizontal.fedavg", {**PARAMS, "model": MLP, **more})
    return drive(made.coordinate(Cohort(tuple(tables), SCHEMA, seed=1)), tables)


def test_small_sites_learn_more_from_a_frozen_encoder_than_from_scratch(drive: Any, base: dict[str, str]) -> None:
    tables, unseen = {f"s{i}": table(15, 10 + i) for i in range(4)}, table(2000, 99)

    def accuracy(driven: Any) -> float:
        return float(((driven.result["model"].predict(unseen) >= 0.5) == unseen["y"]).mean())

    scratch = accuracy(fedavg(drive, tables))
    driven = fedavg(drive, tables, model={**MLP, "base": base}, freeze=["encoder"])
    assert accuracy(driven) > scratch + 0.1
    assert accuracy(driven) > 0.75
    began, ended = driven.rounds[0].send["weights"], driven.result["model"].weights
    model = driven.result["model"]
    for name, where in model.layers.items():
        assert np.array_equal(began[where], ended[where].astype(np.float32)) == name.startswith("encoder."), name
    assert all(asked.reply["weights"].shape == (17,) for asked in driven.rounds)  # what comes back is the head


def test_an_encoder_that_the_sites_have_never_travels(drive: Any, base: dict[str, str]) -> None:
    """Frozen by the base itself, it is not among the weights: heads go out, and heads come back."""
    tables, unseen = {f"s{i}": table(15, 10 + i) for i in range(4)}, table(2000, 99)
    driven = fedavg(drive, tables, model={**MLP, "base": {**base, "frozen": ["encoder"]}})
    assert ((driven.result["model"].predict(unseen) >= 0.5) == unseen["y"]).mean() > 0.75
    assert all(asked.reply["weights"].shape == asked.send["weights"].shape == (17,) for asked in driven.rounds)


def test_the_whole_federation_begins_with_the_base(federation: Any, base: dict[str, str]) -> None:
    tables = {f"s{i}": table(30, 10 + i) for i in range(3)}
    params = {**PARAMS, "rounds": 10, "model": {**MLP, "base": base}, "freeze": ["encoder"]}
    plan = federation.plan("horizontal.fedavg", params, tables, run={"holdout": 0.3})
    assert federation.run(plan, tables)["evaluation"]["pooled"]["auc"] > 0.6


def test_a_base_that_is_not_installed_is_told_before_anything_runs(
    federation: Any, base: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ATOLL_MODELS", str(tmp_path / "elsewhere"))
    tables = {f"s{i}": table(30, 10 + i) for i in range(3)}
    plan = federation.plan("horizontal.fedavg", {**PARAMS, "model": {**MLP, "base": base}}, tables)
    with pytest.raises(AtollError) as caught:
        federation.run(plan, tables)
    assert caught.value.code == "cohort.refused"  # every party looks before it takes part
    assert [part.code for part in caught.value.parts] == ["model.no-base"] * 3
    assert all("ATOLL_MODELS" in part.remedy for part in caught.value.parts)
