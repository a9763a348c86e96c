"""Stored models: read again, in scikit-learn's interface and as ONNX, with the predictions that the model gave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from typer.testing import CliRunner

from atoll.cli.main import app
from atoll.contract.errors import PlanError, PolicyError, SchemaError
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.models import estimator, stored
from atoll.models.export import to_onnx
from atoll.models.model import find, make

SCHEMA = TableSchema(
    name="test",
    columns={
        "a": Column(range=(1900, 2030), unit="year"),
        "b": Column(range=(-1, 3)),
        "image": Column(dtype="image", shape=(8, 6)),
        "colour": Column(dtype="image", shape=(8, 6, 3)),
        "note": Column(dtype="text"),
        "y": Column(dtype="integer", values=(0, 1), role="label"),
        "value": Column(range=(-3, 9), role="label"),
        "later": Column(range=(0, 9), role="label"),
        "kind": Column(dtype="text", values=("x", "y", "z"), role="label"),
    },
)
TABLES: dict[str, dict[str, Any]] = {
    "logistic": {"kind": "linear", "family": "logistic", "features": ["b", "a"], "target": "y"},
    "poisson": {"kind": "linear", "family": "poisson", "features": ["a"], "target": "later"},
    "linear": {"kind": "linear", "family": "linear", "features": ["a", "b"], "target": "value"},
}
NETWORKS: dict[str, dict[str, Any]] = {
    "binary": {"kind": "mlp", "features": ["b", "a"], "target": "y"},
    "classes": {"kind": "mlp", "features": ["a", "b"], "target": "kind"},
    "several": {"kind": "mlp", "features": ["a"], "target": ["value", "later"]},
    "cnn": {"kind": "cnn", "image": "image", "channels": [4], "target": "y", "norm": "batch", "standardise": True},
    "resnet": {"kind": "resnet", "image": "colour", "widths": [4, 8], "target": "value"},
    "text": {"kind": "embedding_bag", "text": "note", "buckets": 50, "width": 4, "length": 6, "target": "kind"},
}
ALL = {**TABLES, **NETWORKS}


def rows(n: int = 30) -> Table:
    random = np.random.default_rng(2)
    columns: dict[str, Any] = {
        "a": random.uniform(1900, 2030, n),
        "b": random.uniform(-1, 3, n),
        "image": random.integers(0, 256, (n, 8, 6)).astype(np.uint8),
        "colour": random.integers(0, 256, (n, 8, 6, 3)).astype(np.uint8),
        "note": np.array(["rain again", "all is well today", ""] * (n // 3), object),
    }
    return Table(SCHEMA, columns)


def fitted(name: str) -> Any:
    if ALL[name]["kind"] != "linear":
        pytest.importorskip("torch")
    model = make(ALL[name], SCHEMA)
    weights = model.initial(4) + np.random.default_rng(1).normal(0, 0.2, len(model.weights)).astype(np.float32)
    weights[model.running] = np.abs(weights[model.running]) + 0.1
    return model.with_weights(weights)


def kept(model: Any, folder: Path) -> Path:
    told = {"spec": model.spec(), "layers": list(model.layers)}
    about = {"model": told, "schema": SCHEMA.model_dump(mode="json")}
    stored.save(folder, about, model.arrays())
    return folder


def frame(table: Table) -> pd.DataFrame:
    """The table as a data frame, its columns in another order; images are cells."""
    return pd.DataFrame({name: list(table[name]) for name in reversed(table.columns)})


@pytest.mark.parametrize("name", ALL)
def test_what_is_read_predicts_what_was_stored(name: str, tmp_path: Path) -> None:
    model, table = fitted(name), rows()
    found, schema, about = stored.load(kept(model, tmp_path))
    assert found.predict(table).tobytes() == model.predict(table).tobytes()
    assert schema == SCHEMA
    arrays = load_file(tmp_path / "model.safetensors")
    if name in NETWORKS:  # the vector of weights, from the files alone
        vector = np.concatenate([arrays[layer].ravel() for layer in about["model"]["layers"]])
        assert vector.dtype == np.float32
        assert np.array_equal(vector, model.weights.astype(np.float32))
        assert len(arrays["head.weight"]) == len(arrays["head.bias"]) == model.goal.outputs
    else:
        assert arrays["weights"].tobytes() == model.weights.tobytes()


@pytest.mark.parametrize("name", ALL)
def test_scikit_learn_knows_it(name: str, tmp_path: Path) -> None:
    model, table = fitted(name), rows()
    loaded: Any = estimator.load(kept(model, tmp_path))
    used = [c for c in ALL[name].values() if isinstance(c, str) and c in table.columns] or ALL[name]["features"]
    assert list(loaded.feature_names_in_) == list(used)
    assert loaded.n_features_in_ == len(used)
    pipeline = make_pipeline(FunctionTransformer(), clone(loaded))
    wanted = model.predict(table)
    if is_classifier(loaded):
        found = loaded.predict_proba(frame(table))
        assert np.array_equal(found[:, 1] if wanted.ndim == 1 else found, wanted)
        assert np.allclose(found.sum(1), 1)
        labels = pipeline.predict(frame(table))
        assert labels.tolist() == [loaded.classes_[place] for place in found.argmax(1)]
        assert loaded.classes_.tolist() == ([0, 1] if model.task == "binary" else ["x", "y", "z"])
        assert loaded.score(frame(table), labels) == accuracy_score(labels, labels) == 1
    else:
        assert is_regressor(loaded)
        assert np.array_equal(pipeline.predict(frame(table)), wanted)
    if name in ("logistic", "classes"):  # a matrix has the columns in the model's order
        matrix = np.column_stack([table[c] for c in used])
        assert np.array_equal(loaded.predict_proba(matrix), loaded.predict_proba(frame(table)))
        with pytest.raises(ValueError, match="matrix of 2 columns"):
            loaded.predict(matrix[:, :1])
    with pytest.raises(SchemaError) as caught:
        loaded.predict({"other": [1.0]})
    assert caught.value.code == "schema.no-column"


@pytest.mark.parametrize(
    "name", [name if name in (*TABLES, "binary") else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
)
def test_onnx_predicts_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, table = fitted(name), rows()
    to_onnx(model, SCHEMA, tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    columns = [np.asarray(table[c], np.float64) for c in ALL[name].get("features", ())]
    feed = {"features": np.column_stack(columns)} if columns else {}
    feed |= {c: table[c] for c in ("image", "colour") if c in ALL[name].values()}
    feed = feed or {"input_0": model.inputs(table)[0].astype(np.int64)}
    assert {i.name for i in session.get_inputs()} == set(feed)
    [found] = session.run(["prediction"], feed)
    wanted = model.predict(table)
    assert found.shape == wanted.shape
    assert np.allclose(found, wanted, rtol=1e-5, atol=1e-5 if name in NETWORKS else 1e-12)
    one = {input_name: values[:1] for input_name, values in feed.items()}
    assert np.allclose(session.run(None, one)[0], wanted[:1], rtol=1e-5, atol=1e-5)


def test_a_graph_that_holds_for_one_number_of_rows_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    model = fitted("binary")
    kind, forward = type(model.net), type(model.net).forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) + 0 * x.new_ones(len(x), 1))
    with pytest.raises(PlanError) as caught:
        to_onnx(model, SCHEMA, tmp_path / "model.onnx")
    assert caught.value.code == "export.fixed-rows"
    assert not (tmp_path / "model.onnx").exists()


def test_the_command_writes_onnx(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = fitted("logistic")
    done = CliRunner().invoke(app, ["export", str(kept(model, tmp_path)), "--format", "onnx"])
    assert done.exit_code == 0, done.output
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    table = rows()
    found = session.run(None, {"features": np.column_stack([table["b"], table["a"]])})[0]
    assert np.allclose(found, model.predict(table), atol=1e-12)
    other = CliRunner().invoke(app, ["export", str(tmp_path), "--out", str(tmp_path / "other.onnx")])
    assert other.exit_code == 0
    assert (tmp_path / "other.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("onnx", "onnxscript", "torch"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from atoll.contract.errors import PlanError
from atoll.models import estimator, stored
from atoll.models.export import to_onnx
print(estimator.load(sys.argv[1]).predict([[2.0, 1950.0]]).tolist())
try:
    to_onnx(*stored.load(sys.argv[1])[:2], "model.onnx")
except PlanError as error:
    print(error.code, "|", error.remedy)
"""


def test_without_onnx_and_pytorch_a_linear_model_still_predicts(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BLOCKED, str(kept(fitted("logistic"), tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = done.stdout.splitlines()
    assert told[0] in ("[0]", "[1]"), done.stderr
    assert told[1] == 'export.no-onnx | pip install "atoll[onnx]"'


@pytest.mark.parametrize("damage", ["no json", "no numbers", "half", "not json", "no spec", "other layers"])
def test_folders_that_hold_no_model_are_told(damage: str, tmp_path: Path) -> None:
    kept(fitted("logistic"), tmp_path)
    about, numbers = tmp_path / "model.json", tmp_path / "model.safetensors"
    if damage == "no json":
        about.unlink()
    elif damage == "no numbers":
        numbers.unlink()
    elif damage == "half":
        numbers.write_bytes(numbers.read_bytes()[:40])
    elif damage == "not json":
        about.write_text("{")
    elif damage == "no spec":
        about.write_text(json.dumps({"schema": {}}))
    else:
        told = json.loads(about.read_text())
        told["model"]["spec"]["features"] = ["a"]
        about.write_text(json.dumps(told))
    with pytest.raises(PlanError) as caught:
        stored.load(tmp_path)
    assert caught.value.code == ("model.shape" if damage == "other layers" else "model.unreadable")


def test_a_folder_does_not_say_what_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stored model may come from anybody: its network's package is imported only by its user's word."""
    pytest.importorskip("torch")
    monkeypatch.setattr("atoll.models.allowed._NAMES", set())
    spec = {"kind": "module", "name": "torch.nn:Linear", "arguments": {"in_features": 2, "out_features": 1},
            "features": ["a", "b"], "target": "y"}  # fmt: skip
    about = {"model": {"spec": spec}, "schema": SCHEMA.model_dump(mode="json")}
    stored.save(tmp_path, about, {"weight": np.ones((1, 2), np.float32), "bias": np.zeros(1, np.float32)})
    with pytest.raises(PolicyError) as caught:
        estimator.load(tmp_path)
    assert caught.value.code == "model.not-allowed"
    loaded: Any = estimator.load(tmp_path, models=("torch.nn:Linear",))
    assert loaded.predict_proba(rows()).shape == (30, 2)
    assert find("module").__name__ == "Module"
