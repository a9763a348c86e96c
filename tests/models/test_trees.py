"""Models of trees: they predict what their layout says, and nothing else is taken for one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save
from sklearn.base import is_classifier
from sklearn.metrics import mean_squared_error

from atoll.contract.errors import AtollError, IntegrityError, PlanError, SchemaError
from atoll.contract.program import Cohort, build
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.models import estimator, stored
from atoll.models.model import LearnerParams, from_spec, kept, make, restored
from atoll.models.trees import Trees, linked
from atoll.statistics.scores import class_losses, log_loss

NAN = float("nan")
CITIES = tuple(f"city {i}" for i in range(53))
COLUMNS: dict[str, dict[str, Any]] = {
    "a": {"range": (0, 10)},
    "colour": {"dtype": "text", "values": ("red", "green", "blue")},
    "b": {"range": (-5, 5)},
    "grade": {"dtype": "integer", "values": (1, 2, 3, 7)},
    "city": {"dtype": "text", "values": CITIES},
    "free": {"dtype": "text"},
    "many": {"dtype": "integer", "values": tuple(range(54))},
    "hidden": {"range": (0, 1), "role": "ignore"},
    "ill": {"dtype": "integer", "values": (0, 1), "role": "label"},
    "kind": {"dtype": "text", "values": ("x", "y", "z"), "role": "label"},
    "value": {"range": (-3, 9), "role": "label"},
    "visits": {"dtype": "integer", "range": (0, 20), "role": "label"},
}
SCHEMA = TableSchema(name="test", columns={name: Column(**column) for name, column in COLUMNS.items()})
FEATURES = ["a", "colour", "b", "grade", "city"]
TARGETS = {
    "identity": "value", "logistic": "ill", "softmax": "kind", "exp": "visits", "probability": "ill",
    "isolation": "ill",
}  # fmt: skip


def spec(link: str = "logistic", **more: Any) -> dict[str, Any]:
    found = {"kind": "trees", "features": FEATURES, "categorical": ["colour", "city"], "target": TARGETS[link]}
    return {**found, "link": link, "num_trees": 4, "max_depth": 3, **more}


def grown(made: Trees, seed: int = 0) -> Any:
    """Weights of random trees."""
    random, weights = np.random.default_rng(seed), made.weights.copy()
    weights[: made.outputs] = random.normal(size=made.outputs)
    words = weights[made.outputs :].reshape(-1, made.settings.num_nodes, 5)
    names = made.settings.features
    for tree in words[: len(words) - made.outputs]:  # the last of each output is not in use
        pending = [0]
        while pending:
            at = pending.pop()
            if 2 * at + 1 >= len(tree) or (at and random.random() < 0.2):
                tree[at] = [-1, np.float32(random.normal()), 0, 0, random.integers(9)]
                continue
            f = int(random.integers(len(names)))
            column = SCHEMA.columns[names[f]]
            by_set = names[f] in made.settings.categorical
            told = random.integers(1, 2 ** len(column.values or ())) if by_set else random.integers(-4, 9)
            tree[at] = [f, told, random.integers(2), random.random(), random.integers(9)]
            pending += [2 * at + 1, 2 * at + 2]
    return weights


def rows(n: int = 200, gaps: float = 0.2) -> Table:
    random = np.random.default_rng(n)
    columns: dict[str, Any] = {}
    for name, column in SCHEMA.columns.items():
        if column.role == "ignore":
            continue
        cells: Any = random.choice(column.values, n) if column.values else None
        if cells is None:
            cells = random.integers(*column.bounds(), n, endpoint=True) if column.numeric else ["note"] * n
        columns[name] = np.array(cells, np.float64 if column.numeric else object)
        if column.role != "label":
            columns[name][random.random(n) < gaps] = np.nan if column.numeric else None
    return Table(SCHEMA, columns)


def margin(made: Trees, table: Table, row: int) -> list[float]:
    """As the module's text says, of one row."""
    found, names = made.weights[: made.outputs].tolist(), made.settings.features
    words = made.weights[made.outputs :].reshape(-1, made.settings.num_nodes, 5)
    for t, tree in enumerate(words):
        at = 0
        while tree[at][0] >= 0:
            name, told, default = names[int(tree[at][0])], tree[at][1], tree[at][2]
            cell = table[name][row]
            if cell is None or cell != cell:
                left = default == 1
            elif name in made.settings.categorical:
                left = not int(told) >> SCHEMA.columns[name].values.index(cell) & 1  # type: ignore[union-attr]
            else:
                left = np.float32(cell) < np.float32(told)
            at = 2 * at + (1 if left else 2)
        assert tree[at][0] == -1
        found[t % made.outputs] += tree[at][1]
    return found


def predicted(link: str, m: list[float]) -> Any:
    odds = np.exp(m)
    return {
        "identity": m[0], "logistic": 1 / (1 + np.exp(-m[0])), "softmax": odds / odds.sum(), "exp": np.exp(m[0]),
        "probability": min(max(m[0], 0), 1), "isolation": 2 ** -max(m[0], 0),
    }[link]  # fmt: skip


@pytest.mark.parametrize("link", TARGETS)
def test_prediction_is_what_the_layout_says(link: str) -> None:
    made: Any = make(spec(link), SCHEMA)
    fitted, table = made.with_weights(grown(made, 3)), rows()
    margins = np.array([margin(fitted, table, row) for row in range(len(table))])
    assert fitted.margins(fitted.inputs(table)).tobytes() == margins.tobytes()
    wanted = np.array([predicted(link, m) for m in margins.tolist()])
    found = fitted.predict(table)
    assert found.shape == wanted.shape
    assert np.allclose(found, wanted, rtol=1e-12, atol=0)
    assert (found.std(axis=0) > 0).all()
    assert fitted.predict(rows(0)).shape == wanted[:0].shape


def test_many_rows_are_predicted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = make(spec(), SCHEMA)
    fitted, table = made.with_weights(grown(made)), rows()
    whole, inputs = fitted.predict(table), fitted.inputs(table)
    monkeypatch.setattr("atoll.models.trees.BATCH_ROWS", 7)
    assert fitted.predict(table).tobytes() == whole.tobytes()
    assert fitted.inputs(table).tobytes() == inputs.tobytes()


def test_unfitted_trees_say_nothing() -> None:
    made = make(spec("softmax"), SCHEMA)
    assert made.weights.shape == (3 + 3 * 4 * 15 * 5,)
    assert made.layers == {"base": slice(0, 3), "trees": slice(3, 903)}
    assert made.predict(rows(4)).tolist() == [[1 / 3] * 3] * 4
    assert made.with_weights(made.weights).predict(rows(4)).tolist() == [[1 / 3] * 3] * 4
    assert make(made.spec(), SCHEMA).spec() == made.spec()


def test_values_are_compared_as_float32() -> None:
    made: Any = make(spec(features=["a"], categorical=[], num_trees=1, max_depth=1), SCHEMA)
    edge = np.float32(0.1)
    weights = np.concatenate([[0.0], [0, edge, 1, 0, 0], [-1, -1, 0, 0, 0], [-1, 1, 0, 0, 0]])
    cells = [0.1, float(edge), np.nextafter(float(edge), 0), np.nextafter(edge, np.float32(0)), 1e300, -1e300, NAN]
    table = Table(SCHEMA, {"a": np.array(cells)})
    fitted = made.with_weights(weights)
    assert fitted.margins(fitted.inputs(table))[:, 0].tolist() == [1, 1, 1, -1, 1, -1, -1]


def test_links_never_overflow() -> None:
    far = np.array([[-1e300, 1e300, 0.0], [1e300, -1e300, 0.0]])
    assert linked("softmax", far).tolist() == [[0, 1, 0], [1, 0, 0]]
    for link in ("logistic", "probability", "isolation", "exp"):
        found = linked(link, far[:, :1])  # type: ignore[arg-type]
        assert np.isfinite(found).all() and (found >= 0).all()
    assert linked("isolation", far[:, :1]).tolist() == [1, 0]


# -- what is refused


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"features": []}, "plan.bad-value"),
        ({"num_trees": 0}, "plan.bad-value"),
        ({"num_trees": 2001}, "plan.bad-value"),
        ({"max_depth": 13}, "plan.bad-value"),
        ({"link": "probit"}, "plan.bad-value"),
        ({"depth": 3}, "plan.unknown-key"),
        ({"num_trees": 300, "max_depth": 12}, "model.too-large"),
        ({"features": ["a", "no"], "categorical": []}, "plan.bad-column"),
        ({"features": ["a", "hidden"], "categorical": []}, "plan.bad-column"),
        ({"features": ["a", "colour"], "categorical": []}, "plan.bad-column"),
        ({"features": ["a", "a"], "categorical": []}, "plan.bad-column"),
        ({"features": ["a", "ill"], "categorical": []}, "plan.bad-column"),
        ({"features": ["a"], "categorical": ["colour"]}, "plan.bad-column"),
        ({"features": ["colour"], "categorical": ["colour", "colour"]}, "plan.bad-column"),
        ({"features": ["a"], "categorical": ["a"]}, "plan.too-many-codes"),
        ({"features": ["many"], "categorical": ["many"]}, "plan.too-many-codes"),
        ({"features": ["free"], "categorical": ["free"]}, "plan.too-many-codes"),
        ({"target": "value"}, "plan.bad-target"),
        ({"target": ["ill", "value"]}, "plan.bad-target"),
        ({"target": "kind"}, "plan.bad-column"),
        ({"link": "softmax"}, "plan.bad-target"),
        ({"link": "exp", "target": "value"}, "plan.bad-target"),
        ({"target": "no"}, "plan.bad-column"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(changed: dict[str, Any], code: str) -> None:
    with pytest.raises(PlanError) as caught:
        make({**spec(), **changed}, SCHEMA)
    assert caught.value.code == code
    assert caught.value.remedy or caught.value.code.startswith(("plan.bad-target", "plan.bad-value"))


SPLIT, LEFT, RIGHT = [0, 5, 1, 2, 9], [-1, 1, 0, 0, 4], [-1, -1, 0, 0, 5]
FURTHEST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({0: [NAN, 5, 1, 2, 9]}, id="feature is no number"),
        pytest.param({0: [0.5, 5, 1, 2, 9]}, id="feature is no whole number"),
        pytest.param({0: [2, 5, 1, 2, 9]}, id="feature out of range"),
        pytest.param({0: [1e18, 5, 1, 2, 9]}, id="feature far out of range"),
        pytest.param({0: [-3, 5, 1, 2, 9]}, id="feature below all marks"),
        pytest.param({0: [0, np.inf, 1, 2, 9]}, id="infinite threshold"),
        pytest.param({0: [0, 0.1, 1, 2, 9]}, id="threshold is no float32"),
        pytest.param({0: [0, 1e39, 1, 2, 9]}, id="threshold beyond float32"),
        pytest.param({0: [0, 5, 0.5, 2, 9]}, id="default neither way"),
        pytest.param({0: [0, 5, 2, 2, 9]}, id="default is 2"),
        pytest.param({0: [0, 5, 1, np.inf, 9]}, id="infinite gain"),
        pytest.param({0: [0, 5, 1, 2, NAN]}, id="cover is no number"),
        pytest.param({0: [0, 5, 1, 2, -1]}, id="cover below 0"),
        pytest.param({0: [1, 0, 1, 2, 9]}, id="set of no codes"),
        pytest.param({0: [1, 8, 1, 2, 9]}, id="code that does not exist"),
        pytest.param({0: [1, 2.5, 1, 2, 9]}, id="set is no whole number"),
        pytest.param({0: [1, -2, 1, 2, 9]}, id="set below 0"),
        pytest.param({1: [-1, 0.1, 0, 0, 4]}, id="value is no float32"),
        pytest.param({1: [-1, -np.inf, 0, 0, 4]}, id="infinite value"),
        pytest.param({0: [-1, 0, 0, 0, 0]}, id="children of a leaf in use"),
        pytest.param({2: [-2, 0, 0, 0, 0]}, id="child of a split not in use"),
        pytest.param({1: [-2, 0, 0, 0, 0], 2: [-2, 0, 0, 0, 0]}, id="children of a split not in use"),
        pytest.param({3: [-1, 0, 0, 0, 0], 4: [-1, 0, 0, 0, 0]}, id="grandchildren below a leaf"),
        pytest.param({3: [-2, 1, 0, 0, 0]}, id="value where no row comes"),
        pytest.param({n: [-2, 0, 0, 0, 0] for n in range(7)}, id="no root"),
        pytest.param({1: SPLIT, 3: SPLIT, 4: LEFT}, id="split on the last level"),
    ],
)
def test_weights_that_make_no_trees_are_refused(changed: dict[int, list[float]]) -> None:
    made: Any = make(spec(features=["a", "colour"], categorical=["colour"], num_trees=2, max_depth=2), SCHEMA)
    words = made.weights[1:].reshape(2, 7, 5).copy()
    words[1, :3] = SPLIT, LEFT, RIGHT
    assert made.with_weights(np.concatenate([[0], words.ravel()])).predict(rows(9)).std() > 0
    for node, told in changed.items():
        words[1, node] = told
    with pytest.raises(PlanError) as caught:
        made.with_weights(np.concatenate([[0], words.ravel()]))
    assert (caught.value.code, caught.value.field) == ("model.bad-trees", "weights")


def test_base_margins_are_finite_and_the_size_is_right() -> None:
    made = make(spec(), SCHEMA)
    weights = made.weights.copy()
    weights[0] = np.inf
    with pytest.raises(PlanError, match="do not make trees"):
        made.with_weights(weights)
    for other in (weights[1:], np.append(weights, 0), weights.reshape(1, -1)):
        with pytest.raises(PlanError) as caught:
            made.with_weights(other)
        assert caught.value.code == "model.shape"


def test_random_trees_are_sound_and_one_changed_word_is_seen_or_harmless() -> None:
    """Whatever passes can be walked: no row leaves its tree."""
    made: Any = make(spec(), SCHEMA)
    random, table = np.random.default_rng(4), rows(40)
    for seed in range(150):
        weights = grown(made, seed)
        made.with_weights(weights)
        weights[random.integers(1, len(weights))] = random.choice([-3, -2, -1, 0, 1, 4, 5, 2.0**53, 0.1, 1e40])
        try:
            fitted = made.with_weights(weights)
        except PlanError:
            continue
        assert np.isfinite(fitted.predict(table)).all()


def test_learning_by_gradients_is_refused() -> None:
    asked = spec()
    target = asked.pop("target")
    with pytest.raises(PlanError) as caught:
        LearnerParams(target=target, model=asked).unfitted(SCHEMA)
    assert caught.value.code == "model.not-averaged"


# -- a base


def test_a_base_gives_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_MODELS", str(tmp_path))
    made: Any = make(spec(), SCHEMA)
    fitted = made.with_weights(grown(made))

    def install(arrays: dict[str, Any]) -> dict[str, Any]:
        content = save(arrays)
        (tmp_path / "risk-1.safetensors").write_bytes(content)
        return {"name": "risk-1", "sha256": hashlib.sha256(content).hexdigest()}

    base = install(fitted.arrays())
    based: Any = make(spec(base=base), SCHEMA)
    assert based.predict(rows()).tobytes() == fitted.predict(rows()).tobytes()
    assert based.spec()["base"]["sha256"] == base["sha256"]
    assert based.with_weights(made.weights).spec() == made.spec()  # they are no longer the base's
    refused = {
        "model.shape": spec(base=base, num_trees=5),
        "model.bad-trees": spec(base=base, features=["a", "colour"], categorical=["colour"]),
        "model.base-unfit": spec(base={**base, "frozen": ["trees"]}),
        "model.base-changed": spec(base={**base, "sha256": "0" * 64}),
        "model.no-base": spec(base={**base, "name": "other"}),
    }
    for code, asked in refused.items():
        with pytest.raises((PlanError, IntegrityError)) as caught:
            make(asked, SCHEMA)
        assert caught.value.code == code
    for arrays in ({"head.weight": fitted.weights}, {"weights": fitted.weights.astype(np.float32)}):
        with pytest.raises(PlanError) as unfit:
            make(spec(base=install(arrays)), SCHEMA)
        assert unfit.value.code == "model.base-unfit"


# -- evaluated, stored, used


@pytest.mark.parametrize("link", TARGETS)
def test_evaluation_scores_rows_with_missing_features(link: str, drive: Any) -> None:
    made: Any = make(spec(link), SCHEMA)
    fitted, table = made.with_weights(grown(made, 3)), rows(300)
    holdouts = {"north": table.rows(np.arange(300) < 100), "south": table.rows(np.arange(300) >= 100)}
    asked = build("statistics.evaluation", {"model": fitted.spec()})
    steps = asked.coordinate(Cohort(tuple(holdouts), SCHEMA), {"weights": fitted.weights})
    found = drive(steps, holdouts, holdouts).result["pooled"]
    p, target = fitted.predict(table), TARGETS[link]
    if fitted.task in ("binary", "classes"):
        codes = table.codes("kind") if fitted.task == "classes" else table[target]
        losses = class_losses(codes, p) if fitted.task == "classes" else log_loss(codes, p)
        assert found["log_loss"] == pytest.approx(losses.mean(), rel=1e-9)
        chosen = p.argmax(1) if fitted.task == "classes" else p >= 0.5
        assert found["accuracy"] == pytest.approx(np.mean(chosen == codes))
    else:
        assert found["rmse"] == pytest.approx(mean_squared_error(table[target], p) ** 0.5, rel=1e-9)
    labels_missing = Table(SCHEMA, {**{n: table[n] for n in table.columns}, target: table[target].copy()})
    labels_missing[target][5] = None if target == "kind" else np.nan
    steps = asked.coordinate(Cohort(("north",), SCHEMA), {"weights": fitted.weights})
    with pytest.raises(SchemaError) as caught:
        drive(steps, {"north": table}, {"north": labels_missing})
    assert (caught.value.code, caught.value.field) == ("schema.missing", target)


def test_sites_refuse_weights_that_make_no_trees(drive: Any) -> None:
    made = make(spec(), SCHEMA)
    weights = made.weights.copy()
    weights[1] = 0.0  # a split whose children are not there: a walk without end
    asked = build("statistics.evaluation", {"model": made.spec()})
    steps = asked.coordinate(Cohort(("north",), SCHEMA), {"weights": weights})
    with pytest.raises(AtollError) as caught:
        drive(steps, {"north": rows()}, {"north": rows()})
    assert caught.value.code == "model.bad-trees"


@pytest.mark.parametrize("link", TARGETS)
def test_stored_trees_are_read_again_and_scikit_learn_knows_them(link: str, tmp_path: Path) -> None:
    made: Any = make(spec(link), SCHEMA)
    fitted, table = made.with_weights(grown(made, 3)), rows()
    about = {"model": {"spec": fitted.spec(), "layers": ["weights"]}, "schema": SCHEMA.model_dump(mode="json")}
    stored.save(tmp_path, about, fitted.arrays())
    again, schema, _ = stored.load(tmp_path)
    assert again.predict(table).tobytes() == fitted.predict(table).tobytes()
    assert from_spec(fitted.spec(), schema, fitted.arrays()).weights.tobytes() == fitted.weights.tobytes()
    assert restored(kept(fitted), SCHEMA, made).predict(table).tobytes() == fitted.predict(table).tobytes()
    loaded: Any = estimator.load(tmp_path)
    frame = pd.DataFrame({name: list(table[name]) for name in reversed(table.columns)})
    assert frame[["a", "colour"]].isna().to_numpy().any(axis=0).all()
    assert loaded.feature_names_in_.tolist() == FEATURES
    wanted = fitted.predict(table)
    if is_classifier(loaded):
        found = loaded.predict_proba(frame)
        assert np.array_equal(found[:, 1] if wanted.ndim == 1 else found, wanted)
        assert loaded.predict(frame).tolist() == [loaded.classes_[place] for place in found.argmax(1)]
    else:
        assert np.array_equal(loaded.predict(frame), wanted)
    matrix = np.column_stack([table[name] for name in FEATURES]).astype(object)
    assert loaded.predict(matrix).tolist() == loaded.predict(frame).tolist()
