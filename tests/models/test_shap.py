"""Shapley values of trees: against the definition, against XGBoost's, and their sums."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.models import shap, xgboost_json
from atoll.models.importance import importance, told
from atoll.models.trees import COVER, LEAF, UNUSED, Trees, TreesSpec

SCHEMA = TableSchema(
    name="test",
    columns={
        **{name: Column(range=(-2, 2)) for name in "abcd"},
        "code": Column(dtype="text", values=("x", "y", "z")),
        "value": Column(range=(-9, 9), role="label"),
        "kind": Column(dtype="text", values=("p", "q"), role="label"),
    },
)
FEATURES = ("a", "b", "c", "code", "d")


def drawn(seed: int, depth: int, num_trees: int = 3, link: str = "identity", bare: float = 0.0) -> Trees:
    """Random trees; a share *bare* of their splits sends all cover to one side."""
    spec = TreesSpec.model_validate(
        {"kind": "trees", "features": FEATURES, "categorical": ["code"], "link": link, "num_trees": num_trees,
         "max_depth": depth, "target": "kind" if link == "softmax" else "value"}
    )  # fmt: skip
    model, random = Trees.of(spec, SCHEMA), np.random.default_rng(seed)
    words, inner = np.array(model.words), spec.num_nodes // 2
    for tree in words:
        tree[0, COVER] = 100
        for at in range(len(tree)):
            if tree[at, 0] == UNUSED:
                continue
            cover = tree[at, COVER]
            if at >= inner or (at and random.random() < 0.2):
                tree[at] = LEAF, np.float32(random.normal()), 0, 0, cover
                continue
            place = int(random.integers(len(FEATURES)))
            cut = float(random.integers(1, 8)) if FEATURES[place] == "code" else np.float32(random.uniform(-1, 1))
            tree[at] = place, cut, random.integers(2), random.exponential(), cover
            share = float(random.integers(2)) if random.random() < bare else random.uniform(0.1, 0.9)
            tree[2 * at + 1, [0, COVER]] = LEAF, cover * share
            tree[2 * at + 2, [0, COVER]] = LEAF, cover * (1 - share)
    return model.with_weights(np.concatenate([random.normal(size=model.outputs), words.ravel()]))


def inputs(model: Trees, n: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    columns: dict[str, Any] = {name: random.uniform(-2, 2, n) for name in "abcd"}
    columns["a"][random.random(n) < 0.2] = np.nan
    columns["code"] = random.choice(np.array(["x", "y", "z", None], object), n)
    return model.inputs(Table(SCHEMA, columns))


def expectation(model: Trees, t: int, row: np.ndarray, known: tuple[int, ...], at: int = 0) -> float:
    """What tree *t* expects of a row of which *known* features are known (Lundberg et al. 2020, algorithm 1)."""
    nodes, cover = model.nodes, model.words[t, :, COVER]
    feature = nodes.feature[t, at]
    if feature == LEAF:
        return float(nodes.value[t, at])
    left, right = 2 * at + 1, 2 * at + 2
    if feature in known:
        x = row[feature]
        if np.isnan(x):
            down = nodes.default_left[t, at]
        elif model.categorical[feature]:
            down = not int(nodes.mask[t, at]) >> int(x) & 1
        else:
            down = x < nodes.threshold[t, at]
        return expectation(model, t, row, known, left if down else right)
    sides = [expectation(model, t, row, known, side) for side in (left, right)]
    return float(np.average(sides, weights=cover[[left, right]])) if cover[[left, right]].any() else sum(sides) / 2


def by_definition(model: Trees, row: np.ndarray) -> np.ndarray:
    """[outputs, num_features], by all sets of features."""
    size = len(FEATURES)
    found = np.zeros((model.outputs, size))
    for t in range(len(model.words)):
        for j in range(size):
            others = [i for i in range(size) if i != j]
            for k in range(size):
                weight = math.factorial(k) * math.factorial(size - 1 - k) / math.factorial(size)
                for known in combinations(others, k):
                    gain = expectation(model, t, row, (*known, j)) - expectation(model, t, row, known)
                    found[t % model.outputs, j] += weight * gain
    return found


@pytest.mark.parametrize("bare", [0.0, 0.4])
@given(seed=st.integers(0, 2**32), depth=st.integers(1, 5), link=st.sampled_from(["identity", "softmax"]))
@settings(max_examples=5)
def test_they_are_what_the_definition_says(seed: int, depth: int, link: str, bare: float) -> None:
    model = drawn(seed, depth, num_trees=2, link=link, bare=bare)
    x = inputs(model, 4, seed)
    values, expected = shap.shap_values(model, x)
    assert values.shape == (4, model.outputs, len(FEATURES))
    for row, found in zip(x, values, strict=True):
        assert found == pytest.approx(by_definition(model, row), abs=1e-12)
    nothing = [
        model.base[k] + sum(expectation(model, t, x[0], ()) for t in range(k, len(model.words), model.outputs))
        for k in range(model.outputs)
    ]
    assert expected == pytest.approx(nothing, abs=1e-12)


@given(seed=st.integers(0, 2**32), depth=st.integers(1, 10))
@settings(max_examples=10)
def test_they_sum_to_the_margin_and_keep_within_their_bounds(seed: int, depth: int) -> None:
    model = drawn(seed, depth, num_trees=4, link="softmax", bare=0.1)
    x = inputs(model, 50, seed)
    values, expected = shap.shap_values(model, x)
    assert values.sum(axis=2) + expected == pytest.approx(model.margins(x), abs=1e-10)
    assert (np.abs(values) <= shap.most(model) + 1e-12).all()


def test_paths_of_twelve_features_lose_no_digits(tmp_path: Any) -> None:
    """Such leaves are worked out for each row by itself."""
    xgboost = pytest.importorskip("xgboost")
    names = [f"x{i}" for i in range(12)]
    columns = {name: Column(range=(0, 1)) for name in names}
    schema = TableSchema(name="wide", columns={**columns, "value": Column(range=(-9, 9), role="label")})
    spec = {"kind": "trees", "features": names, "link": "identity", "num_trees": 1, "max_depth": 12, "target": "value"}
    model, random = Trees.of(TreesSpec.model_validate(spec), schema), np.random.default_rng(3)
    words = np.array(model.words)
    words[:] = LEAF, 0, 0, 0, 1
    words[0, :, 1] = random.normal(size=words.shape[1]).astype(np.float32)
    for at in range(words.shape[1] // 2):
        level = (at + 1).bit_length() - 1
        words[0, at] = (5 * level + at % 2 * (level > 3)) % 12, np.float32(random.uniform(0.2, 0.8)), 0, 1, 0
    cover = np.where(words[0, :, 0] == LEAF, random.exponential(size=words.shape[1]), 0)
    for at in range(words.shape[1] // 2 - 1, -1, -1):
        cover[at] = cover[2 * at + 1] + cover[2 * at + 2]
    words[0, :, COVER] = cover
    model = model.with_weights(np.concatenate([[0.5], words.ravel()]))
    x = random.uniform(0, 1, (40, 12)).astype(np.float32)
    values, expected = shap.shap_values(model, x)
    assert values.sum(axis=2) + expected == pytest.approx(model.margins(x), abs=1e-12)
    (tmp_path / "model.json").write_bytes(xgboost_json.to_json(model, schema))
    booster = xgboost.Booster(params={"nthread": 1}, model_file=tmp_path / "model.json")
    theirs = booster.predict(xgboost.DMatrix(x, feature_names=names, nthread=1), pred_contribs=True)
    assert theirs[:, :-1] == pytest.approx(values[:, 0], abs=1e-5)


def test_a_feature_that_nothing_asks_for_adds_nothing() -> None:
    model = drawn(3, 3)
    unasked = [f for f in range(len(FEATURES)) if not (model.nodes.feature == f).any()]
    lone = model.with_weights(np.where(model.weights == -3, 0, model.weights))
    words = np.array(lone.words)
    words[words[:, :, 0] == 4, 0] = 2  # nobody asks for "d" any more
    model = lone.with_weights(np.concatenate([lone.base, words.ravel()]))
    values, _ = shap.shap_values(model, inputs(model, 30))
    assert not values[:, :, [*unasked, 4]].any()
    assert not shap.most(model)[:, 4].any()


def test_trees_not_in_use_and_lone_leaves_add_nothing() -> None:
    model = drawn(1, 3)
    words = np.zeros_like(model.words)
    words[:, :, 0] = UNUSED
    words[:, 0, 0] = LEAF
    words[1, 0, 1] = 0.5
    bare = model.with_weights(np.concatenate([[2.0], words.ravel()]))
    values, expected = shap.shap_values(bare, inputs(bare, 3))
    assert not values.any()
    assert expected.tolist() == [2.5]
    assert importance(bare) == []


@pytest.mark.parametrize("link", ["identity", "softmax"])
def test_xgboost_tells_the_same(link: str, tmp_path: Any) -> None:
    xgboost = pytest.importorskip("xgboost")
    model = drawn(11, 6, num_trees=8, link=link)
    x = inputs(model, 200)
    (tmp_path / "model.json").write_bytes(xgboost_json.to_json(model, SCHEMA))
    booster = xgboost.Booster(params={"nthread": 1}, model_file=tmp_path / "model.json")
    kinds = ["c" if one else "float" for one in model.categorical]
    data = xgboost.DMatrix(x, feature_names=list(FEATURES), feature_types=kinds, enable_categorical=True, nthread=1)
    theirs = booster.predict(data, pred_contribs=True, strict_shape=True)
    values, expected = shap.shap_values(model, x)
    assert theirs[:, :, :-1] == pytest.approx(values, abs=1e-5)
    assert theirs[:, :, -1] == pytest.approx(np.tile(expected, (len(x), 1)), abs=1e-5)
    for kind, mine in (("total_gain", "gain"), ("total_cover", "cover"), ("weight", "splits")):
        scores = booster.get_score(importance_type=kind)
        ours = {one["feature"]: one[mine] for one in importance(model)}
        assert ours == pytest.approx(scores, rel=1e-5)


def test_what_is_told_of_a_model() -> None:
    model = drawn(4, 3, num_trees=20)
    found = told(model)
    gains = [one["gain"] for one in found["importance"]]
    assert gains == sorted(gains, reverse=True)
    assert found["trees"] == 20
    assert len(found["drawn"]) == 2
    root = found["drawn"][0]["root"]
    name = FEATURES[int(model.words[0, 0, 0])]
    assert root["feature"] == name
    if name == "code":
        assert set(root["right"]) <= {"x", "y", "z"}
    else:
        assert root["below"] == model.words[0, 0, 1]
    assert len(root["children"]) == 2
