"""XGBoost's files are not trusted: each is refused, or makes a sound model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import PlanError
from atoll.contract.schema import Column, TableSchema
from atoll.models import xgboost_json, xgboost_reading

from .random_trees import (
    FEATURES,
    SCHEMA,
    drawn,
    rows,
    xgboost,
)


def written() -> dict[str, Any]:
    told: dict[str, Any] = json.loads(xgboost_json.to_json(drawn("logistic", 2, 3, 17), SCHEMA))
    return told


def refused(told: Any, target: str = "y") -> PlanError:
    content = told if isinstance(told, bytes) else json.dumps(told).encode()
    with pytest.raises(PlanError) as caught:
        xgboost_reading.from_json(content, SCHEMA, target)
    return caught.value


def changed(path: str, value: Any) -> dict[str, Any]:
    """A good file with one part replaced; None removes it."""
    told = written()
    holder: Any = told["learner"]
    *way, last = path.split("/")
    for key in way:
        holder = holder[int(key) if isinstance(holder, list) else key]
    if value is None:
        del holder[int(last) if isinstance(holder, list) else last]
    else:
        holder[int(last) if isinstance(holder, list) else last] = value
    return told


TREE = "gradient_booster/model/trees/0/"
MALFORMED = [
    ("gradient_booster/model/tree_info", [0]), ("gradient_booster/model/tree_info", [0, 1]),
    ("gradient_booster/model/trees", {}), ("gradient_booster/model/trees", []),
    ("gradient_booster/model/trees/0", 3), (TREE + "left_children", None), (TREE + "left_children/0", 0),
    (TREE + "left_children/0", 10**6), (TREE + "right_children/0", 1), (TREE + "left_children/0", 1.5),
    (TREE + "left_children/0", -3), (TREE + "right_children/0", -1), (TREE + "split_indices/0", 99),
    (TREE + "split_conditions/-1", "x"), (TREE + "split_conditions", [0.0]), (TREE + "split_conditions/-1", 1e39),
    (TREE + "split_conditions/-1", float("nan")), (TREE + "split_type/0", 7), (TREE + "sum_hessian/0", [1]),
    (TREE + "loss_changes/0", float("inf")), (TREE + "tree_param/size_leaf_vector", "many"),
    (TREE + "default_left/0", None), ("learner_model_param/base_score", "a half"), ("learner_model_param", None),
    ("learner_model_param/base_score", "1.5"), ("learner_model_param/num_class", "-1"), ("objective", "logistic"),
    ("feature_names", ["a", "b"]), ("feature_names", [1, 2, 3, 4]), ("feature_types", ["c"]),
    ("gradient_booster/model/cats/enc", [1]), ("gradient_booster/model/cats/enc/1/offsets", [0, 99]),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), MALFORMED, ids=[f"{p}={v!r}"[:60] for p, v in MALFORMED])
def test_what_xgboost_would_not_have_written_is_refused(path: str, value: Any) -> None:
    assert refused(changed(path, value)).code == "import.malformed"


@pytest.mark.parametrize("names", [5, "abcd", {"a": 1}])
@pytest.mark.parametrize("kinds", [None, 7])
def test_names_that_are_no_list_are_refused(names: Any, kinds: Any) -> None:
    told = changed("feature_types", kinds)
    told["learner"]["feature_names"] = names
    assert refused(told).code == "import.malformed"


@pytest.mark.parametrize("name", ["categories", "categories_nodes", "categories_segments", "categories_sizes"])
def test_sets_of_codes_that_are_not_there_are_refused(name: str) -> None:
    told = written()
    trees = told["learner"]["gradient_booster"]["model"]["trees"]
    held = next(tree for tree in trees if tree["categories"])
    held[name] = [] if name != "categories_sizes" else [10**6] * len(held[name])
    assert refused(told).code == "import.malformed"


UNSUPPORTED = [
    ("gradient_booster/name", "dart"), ("gradient_booster/name", "gblinear"), ("objective/name", "rank:ndcg"),
    ("objective/name", "survival:aft"), (TREE + "tree_param/size_leaf_vector", "3"), ("feature_names", []),
    ("learner_model_param/num_target", "2"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), UNSUPPORTED, ids=[f"{p}={v}" for p, v in UNSUPPORTED])
def test_models_of_other_sorts_are_refused(path: str, value: Any) -> None:
    found = refused(changed(path, value))
    assert found.code == "import.unsupported"
    assert found.remedy


def test_trees_that_are_too_deep_are_refused() -> None:
    depth, told = 13, written()
    size = 2 * depth + 1
    left = [i + 1 if i % 2 == 0 and i + 2 < size else -1 for i in range(size)]
    chain = {
        "left_children": left, "right_children": [i + 1 if i >= 0 else -1 for i in left], "split_indices": [0] * size,
        "default_left": [0] * size, "split_type": [0] * size, "split_conditions": [0.5] * size,
        "loss_changes": [0.0] * size, "sum_hessian": [1.0] * size, "categories": [], "categories_nodes": [],
        "categories_segments": [], "categories_sizes": [], "tree_param": {"size_leaf_vector": "1"},
    }  # fmt: skip
    told["learner"]["gradient_booster"]["model"]["trees"][0] = chain
    found = refused(told)
    assert (found.code, "12" in found.remedy) == ("import.unsupported", True)


@pytest.mark.parametrize(
    ("schema_change", "target"),
    [({"a": None}, "y"), ({"size": Column(dtype="text")}, "y"), ({"a": Column(dtype="text")}, "y"), ({}, "kind")],
)
def test_a_model_that_does_not_fit_the_schema_is_refused(schema_change: dict[str, Any], target: str) -> None:
    columns = {n: c for n, c in {**SCHEMA.columns, **schema_change}.items() if c is not None}
    with pytest.raises(PlanError) as caught:
        xgboost_reading.from_json(json.dumps(written()).encode(), TableSchema(name="t", columns=columns), target)
    assert caught.value.code == "import.unfit"


def test_more_trees_than_a_model_has_are_refused_before_they_are_looked_at() -> None:
    told = written()
    model = told["learner"]["gradient_booster"]["model"]
    model["trees"], model["tree_info"] = model["trees"][:1] * 2001, [0] * 2001
    assert refused(told).code == "import.unsupported"


ODD = [None, True, -1, 0, 1, 7, 2**31, 10**30, 1.5, 1e39, float("nan"), "", "x", "3", [], {}, [1], [[1]], {"a": 1}]


def test_a_threshold_of_a_set_of_codes_means_nothing() -> None:
    """XGBoost 2.1 writes NaN there."""
    told = written()
    for tree in told["learner"]["gradient_booster"]["model"]["trees"]:
        for node in tree["categories_nodes"]:
            tree["split_conditions"][node] = float("nan")
    found, _ = xgboost_reading.from_json(json.dumps(told).encode(), SCHEMA, "y")
    wanted, _ = xgboost_reading.from_json(json.dumps(written()).encode(), SCHEMA, "y")
    assert (found.words[:, :, 0] == FEATURES.index("size")).any()
    assert found.weights.tobytes() == wanted.weights.tobytes()


@given(st.data())
@settings(max_examples=60)
def test_whatever_is_changed_in_a_file_is_refused_or_makes_a_sound_model(data: Any) -> None:
    told: Any = written()
    holder = told["learner"]
    while True:
        key = data.draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
        inside = holder[key]
        if not isinstance(inside, dict | list) or not inside or data.draw(st.integers(0, 5)) == 0:
            break
        holder = inside
    holder[key] = data.draw(st.sampled_from(ODD))
    try:
        model, objective = xgboost_reading.from_json(json.dumps(told).encode(), SCHEMA, "y")
    except PlanError as error:
        assert error.remedy
    else:
        xgboost_json.to_json(model, SCHEMA, objective)
        assert np.isfinite(model.margins(model.inputs(rows(5, 1)))).all()


def test_other_formats_are_told_apart() -> None:
    found = booster_raw("ubj")
    assert refused(found).code == "import.ubjson"
    assert "save_model" in refused(found).remedy
    for content in (b"", b"[]", b"{}", b'{"learner": 1}', b"\xff\xfe", b"[" * 100_000, b'{"learner": {}}'):
        assert refused(content).code == "import.malformed"


def booster_raw(kind: str) -> bytes:
    data = xgboost.DMatrix(np.arange(8.0).reshape(4, 2), [0, 1, 0, 1], nthread=1)
    return bytes(xgboost.train({"nthread": 1}, data, 1).save_raw(kind))


def test_a_code_that_the_schema_does_not_know_changes_nothing() -> None:
    """XGBoost's model knows a category more than the schema; a split by it alone sends all that there are left."""
    told = written()
    cats = told["learner"]["gradient_booster"]["model"]["cats"]
    place = FEATURES.index("grade")
    cats["enc"][place]["values"] = [7, 3, 99, 5]  # 11 became one that the schema does not have
    known, _ = xgboost_reading.from_json(json.dumps(told).encode(), SCHEMA, "y")
    before, _ = xgboost_reading.from_json(json.dumps(written()).encode(), SCHEMA, "y")
    table = rows(400, 3)
    others = table.rows(table.codes("grade") != SCHEMA.columns["grade"].values.index(11))  # type: ignore[union-attr]
    assert known.predict(others).tolist() == before.predict(others).tolist()
