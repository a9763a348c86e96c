"""Models of trees as ONNX: every row's prediction in ONNX Runtime is the model's own, at thresholds and at gaps too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from atoll.cli.main import app
from atoll.contract.errors import PlanError
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.models import stored
from atoll.models.export import to_onnx
from atoll.models.trees import FURTHEST, LEAF, UNUSED, Trees, TreesSpec

onnxruntime = pytest.importorskip("onnxruntime")

CODES = tuple(range(100, 153))  # as many as a set may have
SCHEMA = TableSchema(
    name="test",
    columns={
        "a": Column(range=(-5, 5)),
        "b": Column(range=(0, 1e6)),
        "size": Column(dtype="text", values=("small", "large", "Huge")),
        "place": Column(dtype="integer", values=CODES),
        "y": Column(dtype="integer", values=(0, 1), role="label"),
        "value": Column(range=(-1000, 1000), role="label"),
        "cases": Column(dtype="integer", range=(0, 500), role="label"),
        "kind": Column(dtype="text", values=("x", "y", "z"), role="label"),
    },
)
FEATURES = ("a", "size", "b", "place")
TARGETS = {
    "identity": "value", "logistic": "y", "softmax": "kind", "exp": "cases", "probability": "y", "shares": "kind",
    "isolation": "",
}  # fmt: skip


def drawn(link: str, num_trees: int = 6, max_depth: int = 4, seed: int = 0, split: float = 0.8) -> Trees:
    """A model of random trees, some of them lopsided, some a single leaf."""
    spec = {"kind": "trees", "features": FEATURES, "categorical": ["size", "place"], "target": TARGETS[link],
            "link": link, "num_trees": num_trees, "max_depth": max_depth}  # fmt: skip
    model, random = Trees.of(TreesSpec.model_validate(spec), SCHEMA), np.random.default_rng(seed)
    words, inner = np.array(model.words), model.settings.num_nodes // 2
    for tree in words:
        tree[:, 0] = UNUSED
        tree[0, 0] = LEAF
        for at in range(len(tree)):
            if tree[at, 0] == UNUSED:
                continue
            if at < inner and random.random() < split:
                feature = int(random.integers(len(FEATURES)))
                codes = len(SCHEMA.columns[FEATURES[feature]].values or ())
                low, high = (-5, 5) if FEATURES[feature] == "a" else (0, 1e6)
                cut = float(random.integers(1, 2**codes)) if codes else float(np.float32(random.uniform(low, high)))
                tree[at, :3] = feature, cut, random.integers(2)
                tree[[2 * at + 1, 2 * at + 2], 0] = LEAF
            else:
                tree[at, :3] = LEAF, float(np.float32(random.normal() * 0.3)), 0
    return model.with_weights(np.concatenate([random.normal(0, 1, model.outputs), words.ravel()]))


def rows(model: Trees, n: int = 400, seed: int = 1) -> Table:
    """Rows with missing cells; many at a threshold of *model*, next to it, or rounded to it in float32."""
    random, found = np.random.default_rng(seed), dict[str, Any]()
    for name in ("a", "b"):
        nodes = model.nodes
        cuts = nodes.threshold[(nodes.feature == FEATURES.index(name))].astype(np.float64)
        near = random.choice(cuts, n) if len(cuts) else np.zeros(n)
        below = np.nextafter(near.astype(np.float32), np.float32(-np.inf)).astype(np.float64)
        off = abs(near) * 1e-9
        how = random.integers(0, 7, n)
        kinds = [near, below, near - off, near + off, np.full(n, 1e300), np.full(n, -FURTHEST)]
        found[name] = np.select([how == i for i in range(6)], kinds, random.uniform(-5, 1e6, n))
        found[name][random.random(n) < 0.1] = np.nan
    found["size"] = random.choice(np.array(["small", "large", "Huge", None], object), n)
    found["place"] = random.choice([*map(float, CODES), np.nan], n)
    return Table(SCHEMA, found)


def fed(table: Table, *, unknown: float) -> np.ndarray:
    """The table as the graph takes it; *unknown* stands for a category that is missing."""
    columns = []
    for name in FEATURES:
        if SCHEMA.columns[name].values:
            codes = table.codes(name).astype(np.float64)
            columns.append(np.where(codes < 0, unknown, codes))
        else:
            columns.append(np.asarray(table[name], np.float64))
    return np.column_stack(columns)


def predicted(path: Path, features: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    return np.asarray(session.run(["prediction"], {"features": features})[0])


@pytest.mark.parametrize("unknown", [np.nan, -1.0])
@pytest.mark.parametrize("link", TARGETS)
def test_every_row_is_predicted_alike(link: str, unknown: float, tmp_path: Path) -> None:
    model = drawn(link, 12, seed=len(link))
    table = rows(model, 1000)
    to_onnx(model, SCHEMA, tmp_path / "model.onnx")
    wanted = model.predict(table)
    found = predicted(tmp_path / "model.onnx", fed(table, unknown=unknown))
    assert found.dtype == np.float64 and found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-14)
    assert len(np.unique(wanted.round(9), axis=0)) > 5


def test_an_exposure_is_a_second_input(tmp_path: Path) -> None:
    model = drawn("exp")
    spec = {**model.spec(), "exposure": "b"}
    exposed = Trees.of(TreesSpec.model_validate(spec), SCHEMA).with_weights(model.weights)
    assert exposed.spec() == spec and "exposure" not in model.spec()
    found = rows(model, 100)
    years = np.linspace(0.1, 9, 100)
    table = Table(SCHEMA, {**found.columns, "b": years})
    to_onnx(exposed, SCHEMA, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    told = session.run(["prediction"], {"features": fed(table, unknown=np.nan), "exposure": years})[0]
    np.testing.assert_allclose(told, exposed.predict(table), rtol=1e-12)
    np.testing.assert_allclose(told, model.predict(table) * years, rtol=1e-12)
    for wrong in ({"link": "identity"}, {"exposure": "size"}, {"exposure": "cases"}):
        with pytest.raises(PlanError) as caught:
            Trees.of(TreesSpec.model_validate({**spec, **wrong}), SCHEMA)
        assert caught.value.code == "plan.bad-column"


def test_one_row_and_none(tmp_path: Path) -> None:
    model = drawn("logistic", 40, 6)
    table = rows(model)
    to_onnx(model, SCHEMA, tmp_path / "model.onnx")
    features = fed(table, unknown=np.nan)
    for row in (0, 7, 11):
        found = predicted(tmp_path / "model.onnx", features[row : row + 1])
        assert found == pytest.approx(model.predict(table)[row : row + 1], abs=1e-14)


def test_trees_that_ask_nothing(tmp_path: Path) -> None:
    model = drawn("identity", split=0.0)
    to_onnx(model, SCHEMA, tmp_path / "model.onnx")
    found = predicted(tmp_path / "model.onnx", np.zeros((3, 4)))
    assert found == pytest.approx(np.full(3, model.weights[0] + model.nodes.value.sum()), abs=1e-14)


def test_the_command_writes_it(tmp_path: Path) -> None:
    model = drawn("softmax")
    about = {"model": {"spec": model.spec(), "layers": ["weights"]}, "schema": SCHEMA.model_dump(mode="json")}
    stored.save(tmp_path, about, model.arrays())
    done = CliRunner().invoke(app, ["export", str(tmp_path), "--format", "onnx"])
    assert done.exit_code == 0, done.output
    table = rows(model, 50)
    found = predicted(tmp_path / "model.onnx", fed(table, unknown=np.nan))
    np.testing.assert_allclose(found, model.predict(table), rtol=1e-12)
