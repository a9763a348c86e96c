"""Models of trees as XGBoost's files: the same leaf for every row there and here, in both directions."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from atoll.cli.main import app
from atoll.contract.errors import PlanError
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.models import estimator, shap, stored, tree_kernels, xgboost_json, xgboost_reading
from atoll.models.model import make
from atoll.models.trees import UNUSED, Trees, TreesSpec

xgboost = pytest.importorskip("xgboost")

SCHEMA = TableSchema(
    name="test",
    columns={
        "a": Column(range=(-5, 5)),
        "b": Column(range=(0, 1e6)),
        "size": Column(dtype="text", values=("small", "large", "Huge")),
        "grade": Column(dtype="integer", values=(7, 3, 11, 5)),
        "y": Column(dtype="integer", values=(0, 1), role="label"),
        "value": Column(range=(-1000, 1000), role="label"),
        "cases": Column(dtype="integer", range=(0, 500), role="label"),
        "kind": Column(dtype="text", values=("x", "y", "z"), role="label"),
    },
)
FEATURES = ["a", "size", "b", "grade"]
TARGETS = {"identity": "value", "logistic": "y", "softmax": "kind", "exp": "cases", "probability": "y"}
OUTPUTS = {"softmax": 3}
OF_LINK = {
    "identity": ["squared", "quantile"], "logistic": ["logistic"], "softmax": ["softmax"], "exp": ["poisson", "cox"],
    "probability": ["squared"],
}  # fmt: skip


def unfitted(link: str, num_trees: int, max_depth: int, features: list[str] = FEATURES) -> Trees:
    categorical = [name for name in features if name in ("size", "grade")]
    spec = {"kind": "trees", "features": features, "categorical": categorical, "target": TARGETS[link], "link": link,
            "num_trees": num_trees, "max_depth": max_depth}  # fmt: skip
    return Trees.of(TreesSpec.model_validate(spec), SCHEMA)


def drawn(link: str, num_trees: int, max_depth: int, seed: int, features: list[str] = FEATURES) -> Trees:
    """A model of random trees, some of them lopsided, some not in use."""
    model, random = unfitted(link, num_trees, max_depth, features), np.random.default_rng(seed)
    words, inner = np.array(model.words), model.settings.num_nodes // 2
    ranges = {"a": (-5, 5), "b": (0, 1e6)}
    for tree in words:
        if random.random() < 0.1:
            continue
        tree[:, 0] = UNUSED
        tree[0, 0] = -1
        for at in range(len(tree)):
            if tree[at, 0] == UNUSED:
                continue
            cover = random.uniform(1, 1000) if at == 0 else tree[at, 4]
            if at < inner and random.random() < 0.8:
                place = int(random.integers(len(features)))
                name = features[place]
                codes = len(SCHEMA.columns[name].values or ())
                split = float(random.integers(1, 2**codes)) if codes else np.float32(random.uniform(*ranges[name]))
                tree[at] = place, split, random.integers(2), random.exponential(), cover
                share = random.uniform(0.05, 0.95)
                tree[2 * at + 1, [0, 4]] = -1, cover * share
                tree[2 * at + 2, [0, 4]] = -1, cover * (1 - share)
            else:
                tree[at] = -1, np.float32(random.normal() * 0.3), 0, 0, cover
    base = random.normal(0, 2, model.outputs)
    return model.with_weights(np.concatenate([base, words.ravel()]))


def rows(n: int, seed: int, model: Trees | None = None) -> Table:
    """Rows with missing cells; many of them at a threshold of *model*, just below it, or rounded to it in float32."""
    random = np.random.default_rng(seed)
    found: dict[str, Any] = {
        "a": random.uniform(-5, 5, n),
        "b": random.uniform(0, 1e6, n),
        "size": random.choice(np.array(["small", "large", "Huge", None], object), n),
        "grade": random.choice([7.0, 3, 11, 5, np.nan], n),
    }
    for name in ("a", "b"):
        if model is not None and name in model.settings.features:
            at = model.nodes.feature == model.settings.features.index(name)
            cuts = model.nodes.threshold[at].astype(np.float64)
            if len(cuts):
                near = random.choice(cuts, n)
                below = np.nextafter(near.astype(np.float32), np.float32(-np.inf)).astype(np.float64)
                how = random.integers(0, 5, n)
                found[name] = np.select(
                    [how == 0, how == 1, how == 2, how == 3],
                    [near, below, near - abs(near) * 1e-9, near + abs(near) * 1e-9],
                    found[name],
                )
        found[name][random.random(n) < 0.1] = np.nan
    return Table(SCHEMA, found)


def frame(table: Table, features: list[str], *, shuffled: bool = False) -> pd.DataFrame:
    """The table as XGBoost takes one; shuffled: its categories in another order than the schema's."""
    columns: dict[str, Any] = {}
    for name in features:
        values = SCHEMA.columns[name].values
        if values is None:
            columns[name] = table[name]
            continue
        codes = table.codes(name)
        known = pd.Categorical.from_codes(codes, categories=list(values))
        columns[name] = known.reorder_categories(sorted(values)) if shuffled else known
    return pd.DataFrame(columns)


def booster(content: bytes, folder: Path) -> Any:
    path = folder / "model.json"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = xgboost.Booster(params={"nthread": 1})
        made.load_model(path)
    return made


def matrix(table: Table, features: list[str], **more: Any) -> Any:
    return xgboost.DMatrix(frame(table, features, **more), enable_categorical=True, nthread=1)


def size(model: Trees) -> float:
    """How large the numbers are that float32 adds."""
    return float(1 + np.abs(model.base).max() + np.abs(model.nodes.value).max(axis=1).sum())


def assert_alike(model: Trees, found: Any, table: Table) -> None:
    """Every row comes to the same leaf, and what is predicted differs by float32's rounding."""
    features = list(model.settings.features)
    inputs = model.inputs(table)
    ours = tree_kernels.leaf_of(inputs, *model.nodes[:4])
    for shuffled in (False, True):
        data = matrix(table, features, shuffled=shuffled)
        theirs = found.predict(data, pred_leaf=True, strict_shape=True).reshape(len(table), -1)
        for t, tree in enumerate(model.words):
            number = np.cumsum(tree[:, 0] != UNUSED) - 1
            assert (number[ours[:, t]] == theirs[:, t]).all()
    margins = found.predict(data, output_margin=True).reshape(len(table), -1)
    assert np.abs(margins - model.margins(inputs)).max() <= 1e-6 * size(model)
    told = found.predict(data)
    told = np.clip(told, 0, 1) if model.settings.link == "probability" else told
    assert told == pytest.approx(model.predict(table), rel=2e-6 * size(model), abs=1e-6 * size(model))


@pytest.mark.parametrize("link", TARGETS)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 6))
@settings(max_examples=4)
def test_xgboost_predicts_what_the_model_does(
    link: str, tmp_path_factory: Any, seed: int, trees: int, depth: int
) -> None:
    model = drawn(link, trees, depth, seed)
    table = rows(300, seed, model)
    objective = OF_LINK[link][seed % len(OF_LINK[link])]
    content = xgboost_json.to_json(model, SCHEMA, objective)
    found = booster(content, tmp_path_factory.mktemp("xgboost"))
    assert_alike(model, found, table)
    assert json.loads(found.save_config())["learner"]["objective"]["name"] == xgboost_json.NAMES[objective]
    again, told = xgboost_reading.from_json(content, SCHEMA, TARGETS[link])
    assert told == xgboost_json.NAMES[objective]
    inputs = model.inputs(table)
    assert np.abs(again.margins(inputs) - model.margins(inputs)).max() <= 1e-6 * size(model)
    assert xgboost_json.to_json(again, SCHEMA, told) == content
    theirs, _ = xgboost_reading.from_json(bytes(found.save_raw("json")), SCHEMA, TARGETS[link])
    assert theirs.weights.tobytes() == again.weights.tobytes()


@pytest.mark.parametrize("margin", [-90.0, -20.0, -3.3, -1e-8, 0.0, 0.1, 2.0, 5.0, 12.0, 60.0])
@pytest.mark.parametrize("link", ["identity", "logistic", "exp"])
def test_any_base_margin_is_had_back(link: str, margin: float, tmp_path: Path) -> None:
    """Where XGBoost's own base score could not say it in float32, the first tree's leaves do."""
    model = drawn(link, 2, 2, 1)
    model = model.with_weights(np.concatenate([[margin], model.weights[1:]]))
    table = rows(50, 1, model)
    content = xgboost_json.to_json(model, SCHEMA)
    assert_alike(model, booster(content, tmp_path), table)
    again, told = xgboost_reading.from_json(content, SCHEMA, TARGETS[link])
    assert xgboost_json.to_json(again, SCHEMA, told) == content


def test_classes_may_have_unequal_base_margins(tmp_path: Path) -> None:
    model = drawn("softmax", 3, 3, 4)
    model = model.with_weights(np.concatenate([[-4.0, 0.25, 7.0], model.weights[3:]]))
    assert_alike(model, booster(xgboost_json.to_json(model, SCHEMA), tmp_path), rows(100, 4, model))


@pytest.mark.parametrize("objective", xgboost_json.LINKS)
def test_every_objective_that_is_read_is_written_again(objective: str, tmp_path: Path) -> None:
    link = xgboost_json.LINKS[objective]
    model = drawn(link, 2, 2, 3)
    found = booster(xgboost_json.to_json(model, SCHEMA, objective), tmp_path)
    assert json.loads(found.save_config())["learner"]["objective"]["name"] == objective
    assert xgboost_reading.from_json(bytes(found.save_raw("json")), SCHEMA, TARGETS[link])[1] == objective


def test_names_that_xgboost_does_not_take_are_left_out(tmp_path: Path) -> None:
    schema = TableSchema(name="odd", columns={"a<1": Column(range=(0, 1)), "y": Column(range=(0, 1), role="label")})
    spec = {"kind": "trees", "features": ["a<1"], "target": "y", "link": "identity", "num_trees": 1, "max_depth": 1}
    model = Trees.of(TreesSpec.model_validate(spec), schema)
    found = booster(xgboost_json.to_json(model, schema), tmp_path)
    assert found.predict(xgboost.DMatrix(np.zeros((2, 1)), nthread=1)).tolist() == [0, 0]


def test_scores_of_isolation_have_no_objective() -> None:
    spec = {"kind": "trees", "features": ["a"], "target": "y", "link": "isolation", "num_trees": 1, "max_depth": 1}
    with pytest.raises(PlanError) as caught:
        xgboost_json.to_json(Trees.of(TreesSpec.model_validate(spec), SCHEMA), SCHEMA)
    assert caught.value.code == "export.no-objective"


# ---------------------------------------------------------------- models that XGBoost trained


def trained(objective: str, table: Table, label: np.ndarray, **params: Any) -> Any:
    features = ["a", "size", "b", "grade"]
    data = xgboost.DMatrix(frame(table, features, shuffled=True), label, enable_categorical=True, nthread=1)
    asked = {"objective": objective, "max_depth": 5, "nthread": 1, "seed": 1, **params}
    return xgboost.train(asked, data, params.get("rounds", 12))


CASES: dict[str, dict[str, Any]] = {
    "reg:squarederror": {}, "reg:absoluteerror": {}, "reg:quantileerror": {"quantile_alpha": 0.8},
    "binary:logistic": {}, "multi:softprob": {"num_class": 3, "num_parallel_tree": 2}, "count:poisson": {},
    "survival:cox": {}, "reg:gamma": {"tree_method": "exact", "max_cat_to_onehot": 9}, "reg:tweedie": {},
    "multi:softmax": {"num_class": 3, "grow_policy": "lossguide", "max_leaves": 9, "max_depth": 0},
    "reg:logistic": {"max_cat_to_onehot": 1, "subsample": 0.7, "colsample_bytree": 0.7, "gamma": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("objective", CASES)
def test_what_xgboost_trained_predicts_here_as_there(objective: str, tmp_path: Path) -> None:
    """Its categories are in another order than the schema's; values at thresholds; missing cells."""
    random, link = np.random.default_rng(8), xgboost_json.LINKS[objective]
    table = rows(800, 8)
    eta = np.nan_to_num(table["a"]) / 3 + (table.codes("size") == 1) - (table.codes("grade") == 2)
    labels = {
        "identity": eta * 100, "logistic": random.random(800) < 1 / (1 + np.exp(-eta)),
        "softmax": np.clip(np.round(eta + random.normal(0, 0.5, 800)), 0, 2), "exp": 1.0 + random.poisson(np.exp(eta)),
    }  # fmt: skip
    params = dict(CASES[objective])
    if params.get("tree_method") == "exact":  # it knows no categories
        table = Table(SCHEMA, {**table.columns, "size": np.full(800, None, object), "grade": np.full(800, np.nan)})
        params["tree_method"] = "hist"
    found = trained(objective, table, labels[link].astype(float), **params)
    content = bytes(found.save_raw("json"))
    model, told = xgboost_reading.from_json(content, SCHEMA, TARGETS[link])
    assert told == objective
    seen = rows(500, 9, model)
    data = matrix(seen, FEATURES, shuffled=True)
    margins = found.predict(data, output_margin=True).reshape(500, -1)
    assert np.abs(margins - model.margins(model.inputs(seen))).max() <= 1e-6 * size(model)
    if objective not in ("multi:softmax",):
        assert found.predict(data) == pytest.approx(model.predict(seen), rel=2e-6 * size(model), abs=1e-6)
    again = booster(xgboost_json.to_json(model, SCHEMA, told), tmp_path)
    assert np.abs(again.predict(data, output_margin=True).reshape(500, -1) - margins).max() <= 2e-6 * size(model)


def test_real_records_with_categories_and_missing_cells(atoll_data: Path) -> None:
    """Heart disease, four hospitals' columns: many missing cells, categories by number."""
    names = ["age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca"]
    names += ["thal", "num"]
    path = atoll_data / "heart-disease-uci" / "processed.hungarian.data"
    records = pd.read_csv(path, names=names, na_values="?")
    codes = {"cp": (1, 2, 3, 4), "restecg": (0, 1, 2), "thal": (3, 6, 7), "slope": (1, 2, 3)}
    columns = {
        name: Column(dtype="integer", values=codes[name]) if name in codes else Column(range=(-1000, 1000))
        for name in names[:-1]
    }
    schema = TableSchema(name="heart", columns={**columns, "ill": Column(dtype="integer", values=(0, 1), role="label")})
    data = {name: records[name].to_numpy(float) for name in names[:-1]}
    table = Table(schema, data)
    given = pd.DataFrame(data)
    for name, values in codes.items():
        given[name] = pd.Categorical(records[name].astype("Int64"), categories=list(values))
    label = (records["num"] > 0).to_numpy(float)
    taught = xgboost.DMatrix(given, label, enable_categorical=True, nthread=1)
    found = xgboost.train({"objective": "binary:logistic", "max_cat_to_onehot": 2, "nthread": 1}, taught, 20)
    model, _ = xgboost_reading.from_json(bytes(found.save_raw("json")), schema, "ill")
    assert sorted(model.settings.categorical) == sorted(codes)
    assert found.predict(taught, output_margin=True) == pytest.approx(
        model.margins(model.inputs(table))[:, 0], abs=2e-6
    )


# ---------------------------------------------------------------- files that are not trusted


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


# ---------------------------------------------------------------- the commands


def kept(model: Trees, folder: Path, **more: Any) -> Path:
    told = {"spec": model.spec(), "layers": ["weights"], **more}
    stored.save(folder, {"model": told, "schema": SCHEMA.model_dump(mode="json")}, model.arrays())
    return folder


def called(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_the_commands_write_a_model_for_xgboost_and_read_it_again(tmp_path: Path) -> None:
    model = drawn("exp", 4, 3, 6)
    table = rows(60, 6, model)
    done = called("export", kept(model, tmp_path / "model", objective="cox"))
    assert done.exit_code == 0, done.output
    path = tmp_path / "model" / "model.xgboost.json"
    assert_alike(model, booster(path.read_bytes(), tmp_path), table)
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(SCHEMA.model_dump(mode="json")))
    asked = ("import", path, "--target", "cases", "--out", tmp_path / "taken")
    done = called(*asked, "--schema", tmp_path / "schema.yaml")
    assert done.exit_code == 0, done.output
    found, schema, about = stored.load(tmp_path / "taken")
    assert schema == SCHEMA
    assert about["model"]["objective"] == "survival:cox"
    assert about["imported"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.predict(table) == pytest.approx(model.predict(table), rel=1e-5)
    assert called("export", tmp_path / "taken", "--out", tmp_path / "again.json").exit_code == 0
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert isinstance(called(*asked).exception, PlanError)


def test_a_plan_gives_the_schema_of_its_prepared_table(tmp_path: Path) -> None:
    model = drawn("identity", 2, 2, 6)
    (tmp_path / "model.json").write_bytes(xgboost_json.to_json(model, SCHEMA))
    plan = {
        "atoll": 1, "name": "p", "purpose": "x", "schema": SCHEMA.model_dump(mode="json"), "dataset": "d",
        "program": "statistics.describe", "params": {},
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    done = called("import", tmp_path / "model.json", "--target", "value", "--plan", tmp_path / "plan.yaml",
                  "--out", tmp_path / "taken")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert stored.load(tmp_path / "taken")[1].columns == SCHEMA.columns


@pytest.mark.parametrize("kind", ["onnx", "xgboost"])
def test_a_format_is_for_some_kinds_of_models(tmp_path: Path, kind: str) -> None:
    if kind == "onnx":
        folder = kept(drawn("identity", 1, 1, 1), tmp_path)
    else:
        linear = make({"kind": "linear", "family": "linear", "features": ["a"], "target": "value"}, SCHEMA)
        told = {"spec": linear.spec(), "layers": ["weights"]}
        stored.save(tmp_path, {"model": told, "schema": SCHEMA.model_dump(mode="json")}, linear.arrays())
        folder = tmp_path
    found = called("export", folder, "--format", kind).exception
    assert isinstance(found, PlanError)
    assert found.code == "export.format"


# ---------------------------------------------------------------- scikit-learn's interface


@pytest.mark.parametrize("link", ["identity", "logistic", "softmax"])
def test_the_estimator_tells_importances_and_shap_values(link: str, tmp_path: Path) -> None:
    model = drawn(link, 5, 3, 2)
    table = rows(40, 2, model)
    loaded: Any = estimator.load(kept(model, tmp_path))
    data = pd.DataFrame({name: list(table[name]) for name in reversed(FEATURES)})
    assert set(loaded.feature_names_in_) == set(FEATURES)
    assert len(loaded.feature_importances_) == loaded.n_features_in_
    assert loaded.feature_importances_.sum() == pytest.approx(1)
    gains = dict.fromkeys(loaded.feature_names_in_.tolist(), 0.0)
    for tree in model.words:
        for node in tree[tree[:, 0] >= 0]:
            gains[FEATURES[int(node[0])]] += node[3]
    assert np.argmax(loaded.feature_importances_) == np.argmax(list(gains.values()))
    values, expected = loaded.shap_values(data)
    order = [FEATURES.index(name) for name in loaded.feature_names_in_]
    wanted, base = shap.shap_values(model, model.inputs(table))
    assert np.array_equal(values, wanted[:, 0][:, order] if link != "softmax" else wanted[:, :, order])
    assert np.array_equal(expected, base[0] if link != "softmax" else base)
    assert values.sum(axis=-1) + expected == pytest.approx(
        model.margins(model.inputs(table))[:, 0] if link != "softmax" else model.margins(model.inputs(table))
    )


def test_other_kinds_have_neither(tmp_path: Path) -> None:
    linear = make({"kind": "linear", "family": "linear", "features": ["a"], "target": "value"}, SCHEMA)
    told = {"spec": linear.spec(), "layers": ["weights"]}
    stored.save(tmp_path, {"model": told, "schema": SCHEMA.model_dump(mode="json")}, linear.arrays())
    loaded: Any = estimator.load(tmp_path)
    assert not hasattr(loaded, "feature_importances_")
    with pytest.raises(PlanError) as caught:
        loaded.shap_values({"a": [1.0]})
    assert caught.value.code == "model.not-trees"
