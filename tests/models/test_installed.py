"""Installed weights: found by name, checked by hash, and where a network begins."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from atoll.contract.errors import AtollError, PlanError
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.models.installed import Base
from atoll.models.model import make

SCHEMA = TableSchema(
    name="test",
    columns={
        "a": Column(range=(0, 4)),
        "b": Column(range=(0, 4)),
        "y": Column(dtype="integer", values=(0, 1), role="label"),
        "c": Column(dtype="integer", values=(0, 1, 2), role="label"),
    },
)
MLP: dict[str, Any] = {"kind": "mlp", "features": ["a", "b"], "hidden": [3], "target": "y"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATOLL_MODELS", str(tmp_path))
    return tmp_path


def install(folder: Path, name: str, content: bytes) -> dict[str, str]:
    (folder / f"{name}.safetensors").write_bytes(content)
    return {"name": name, "sha256": hashlib.sha256(content).hexdigest()}


def weights_of(model: Any, seed: int) -> dict[str, np.ndarray]:
    """A model's layers by name, with random weights."""
    return dict(model.with_weights(model.initial(seed) + 0.25).arrays())


def test_arrays_come_as_they_were_saved(folder: Path) -> None:
    arrays = {"encoder.0.weight": np.arange(6, dtype=np.float32).reshape(3, 2), "n": np.array([1, 2], np.int64)}
    found = Base(**install(folder, "backbone-1.0", save(arrays))).read()
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(found[name], array)
        assert not found[name].flags.writeable


def test_the_folder_is_models_in_the_home_folder_unless_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATOLL_MODELS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    base = install(tmp_path / "models", "here", save({"x": np.ones(1)}))
    assert Base(**base).read()["x"].tolist() == [1]


def test_what_is_not_installed_changed_or_broken_is_refused(folder: Path) -> None:
    right = install(folder, "right", save({"x": np.ones(1)}))
    absent = {**right, "name": "absent"}
    changed = {**right, "sha256": "0" * 64}
    broken = install(folder, "broken", b"no safetensors")
    for base, code in ((absent, "model.no-base"), (changed, "model.base-changed"), (broken, "model.bad-base")):
        with pytest.raises(AtollError) as caught:
            Base(**base).read()
        assert (caught.value.code, caught.value.field) == (code, "model.base")
        assert caught.value.remedy
    (folder / "right.safetensors").write_bytes(b"written over")
    (folder / "other.safetensors").write_bytes(b"written over")
    with pytest.raises(AtollError) as caught:
        Base(name="other", sha256=right["sha256"]).read()
    assert caught.value.code == "model.base-changed"


@pytest.mark.parametrize("base", [{"name": "../etc/passwd", "sha256": "0" * 64}, {"name": "x", "sha256": "short"},
                                  {"name": "x"}, {"name": "/x", "sha256": "0" * 64}])  # fmt: skip
def test_names_are_no_paths(base: dict[str, str]) -> None:
    with pytest.raises(PlanError) as caught:
        make({"kind": "linear", "family": "logistic", "features": ["a"], "target": "y", "base": base}, SCHEMA)
    assert caught.value.code in ("plan.bad-value", "plan.invalid")


def test_a_network_begins_with_its_base_and_a_head_of_its_own(folder: Path) -> None:
    pytest.importorskip("torch")
    arrays = weights_of(make(MLP, SCHEMA), 3)
    base = install(folder, "backbone", save(arrays))
    same, other = make({**MLP, "base": base}, SCHEMA), make({**MLP, "base": base, "target": "c"}, SCHEMA)
    assert np.allclose(same.initial(1), np.concatenate([array.ravel() for array in arrays.values()]))
    began, new = other.initial(1), make({**MLP, "target": "c"}, SCHEMA).initial(1)
    for name, where in other.layers.items():
        wanted = new[where] if name.startswith("head.") else arrays[name].ravel()
        assert np.array_equal(began[where], wanted), name
    assert other.spec()["base"] == {**base, "frozen": [], "adapters": None}
    again = make(other.spec(), SCHEMA)
    assert np.array_equal(again.initial(1), began)
    for name in (n for n in arrays if n.startswith("encoder.")):  # a base need not have every layer
        less = install(folder, "less", save({n: a for n, a in arrays.items() if n != name}))
        began = make({**MLP, "base": less}, SCHEMA).initial(1)
        assert np.array_equal(began[same.layers[name]], make(MLP, SCHEMA).initial(1)[same.layers[name]])


def test_a_base_of_another_network_is_refused(folder: Path) -> None:
    pytest.importorskip("torch")
    wide = install(folder, "wide", save(weights_of(make({**MLP, "hidden": [4]}, SCHEMA), 0)))
    foreign = install(folder, "foreign", save({"conv.weight": np.ones(3)}))
    linear = {"kind": "linear", "family": "logistic", "features": ["a"], "target": "y", "base": wide}
    for spec in ({**MLP, "base": wide}, {**MLP, "base": foreign}, linear):
        with pytest.raises(PlanError) as caught:
            make(spec, SCHEMA).initial(0)
        assert (caught.value.code, caught.value.field) == ("model.base-unfit", "model.base")


def test_frozen_layers_are_the_bases_and_no_weights(folder: Path) -> None:
    """The same predictions as with them among the weights, and the same gradients of the rest, clipped ones too."""
    pytest.importorskip("torch")
    random = np.random.default_rng(0)
    columns = {name: random.uniform(0, 4, 20) for name in "ab"}
    table = Table(SCHEMA, {**columns, "y": (columns["a"] > 2).astype(float), "c": np.zeros(20)})
    whole = make({**MLP, "hidden": [4, 3]}, SCHEMA)
    whole = whole.with_weights(whole.initial(3) + 0.25)
    base = {**install(folder, "backbone", save(dict(whole.arrays()))), "frozen": ["encoder.0"]}
    part = make({**MLP, "hidden": [4, 3], "base": base}, SCHEMA)
    kept = np.concatenate([np.arange(len(whole.weights))[whole.layers[name]] for name in part.layers])
    assert list(part.layers) == [name for name in whole.layers if not name.startswith("encoder.0.")]
    part = part.with_weights(whole.weights[kept])
    assert np.array_equal(part.predict(table), whole.predict(table))
    rows = whole.examples(table)
    for one, other in zip(
        part.loss_and_gradient(part.weights, rows), whole.loss_and_gradient(whole.weights, rows), strict=True
    ):
        assert np.allclose(one, np.asarray(other)[kept] if np.ndim(other) else other, rtol=1e-6, atol=1e-9)
    total = np.zeros(len(kept))
    for i in range(20):
        _, gradient = part.loss_and_gradient(part.weights, rows.take(slice(i, i + 1)))
        total += gradient * min(1, 0.05 / np.linalg.norm(gradient))
    assert np.allclose(part.clipped_gradient_sum(part.weights, rows, 0.05)[0], total, rtol=1e-3, atol=1e-6)
    assert np.array_equal(part.initial(1)[part.layers["encoder.2.weight"]], whole.arrays()["encoder.2.weight"].ravel())


@pytest.mark.parametrize("frozen", ["encoder.1", "nothing"])
def test_only_layers_that_the_base_has_are_frozen(folder: Path, frozen: str) -> None:
    pytest.importorskip("torch")
    base = install(folder, "backbone", save(weights_of(make(MLP, SCHEMA), 3)))
    with pytest.raises(PlanError) as caught:
        make({**MLP, "base": {**base, "frozen": [frozen]}}, SCHEMA)
    assert caught.value.code == "model.base-unfit"


def test_a_frozen_normalisation_goes_by_the_bases_means(folder: Path) -> None:
    """Written a second time in numpy; and its means neither travel nor move."""
    pytest.importorskip("torch")
    spec = {**MLP, "norm": "batch"}
    whole = make(spec, SCHEMA)
    random = np.random.default_rng(5)
    whole = whole.with_weights(random.uniform(0.5, 1.5, len(whole.weights)))
    arrays = dict(whole.arrays())
    base = {**install(folder, "backbone", save(arrays)), "frozen": ["encoder"]}
    model = make({**spec, "base": base}, SCHEMA)
    assert list(model.layers) == ["head.weight", "head.bias"]
    assert model.running.start == model.running.stop
    weights = model.initial(1).astype(np.float32)
    columns = {"a": random.uniform(0, 4, 8), "b": random.uniform(0, 4, 8), "y": np.arange(8) % 2.0, "c": np.zeros(8)}
    table = Table(SCHEMA, columns)
    examples = model.examples(table)
    for rows in (slice(0, 4), slice(4, 8)):
        model.loss_and_gradient(weights, examples.take(rows))
    inner = {name: value.astype(np.float64) for name, value in arrays.items()}
    hidden = examples.inputs[0] @ inner["encoder.0.weight"].T + inner["encoder.0.bias"]
    hidden = (hidden - inner["encoder.1.running_mean"]) / np.sqrt(inner["encoder.1.running_var"] + 1e-5)
    hidden = np.maximum(hidden * inner["encoder.1.weight"] + inner["encoder.1.bias"], 0)
    out = hidden @ weights[model.layers["head.weight"]].reshape(1, -1).T + weights[model.layers["head.bias"]]
    found = model.with_weights(weights).predict(table)
    assert np.allclose(found, 1 / (1 + np.exp(-out[:, 0])), atol=1e-5)
    loss = model.loss_and_gradient(weights, examples)[0]
    p, y = 1 / (1 + np.exp(-out[:, 0])), examples.labels
    assert loss == pytest.approx(-np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)), rel=1e-4)
