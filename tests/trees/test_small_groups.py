"""What a released model of boosted trees, and its losses, tell of few rows: nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, build
from atoll.contract.wire import Message
from atoll.data.table import Table
from atoll.models.trees import COVER, FEATURE, LEAF, THRESHOLD
from atoll.runtime.policy import Policy
from atoll.transport.base import Endpoint, Progress
from atoll.trees.replica import Log, _packed
from atoll.trees.rounds import large

COLUMNS: dict[str, dict[str, Any]] = {
    "x": {"range": [0, 100]},
    "z": {"range": [0, 100]},
    "y": {"range": [0, 1000], "role": "label"},
    "event": {"dtype": "integer", "values": [0, 1], "role": "label"},
}
QUANTILE = {"kind": "quantile", "alpha": 0.5}
OBJECTIVES: tuple[Any, ...] = ("squared", QUANTILE)


def tables_of(federation: Any, aside: int = 1) -> dict[str, Table]:
    """Three sites of 30 rows with x below 40, but for so many people of the first, whose y is 873."""
    found = {}
    for seed, name in enumerate("abc"):
        random = np.random.default_rng(seed)
        x, y = random.uniform(0, 40, 30), random.uniform(0, 50, 30)
        if name == "a":
            x[:aside], y[:aside] = 99.0, 873.0
        event = (np.arange(30) % 2).astype(float)
        found[name] = federation.table({"x": x, "z": random.uniform(0, 100, 30), "y": y, "event": event}, COLUMNS)
    return found


def params_of(**more: Any) -> dict[str, Any]:
    basis = {"target": "y", "features": ["x"], "edges": {"x": [50.0]}, "trees": 1, "max_depth": 1}
    return {**basis, "splits": "random", "learning_rate": 1.0, "l2": 0.0, **more}


def steps(params: Mapping[str, Any], tables: Mapping[str, Table], group: int = 10, **cohort: Any) -> Any:
    schema = next(iter(tables.values())).schema
    made = Cohort(tuple(tables), schema, **{"seed": 7, "min_group_size": group, **cohort})
    return build("trees.boosted", params).coordinate(made)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["squared", "quantile"])
@pytest.mark.parametrize("more", [{}, {"min_rows": 10}], ids=["group", "min_rows"])
def test_a_drawn_leaf_of_few_tells_neither_value_nor_cover(
    federation: Any, drive: Any, objective: Any, more: dict[str, Any]
) -> None:
    tables = tables_of(federation)
    group = 1 if more else 10
    model = drive(steps(params_of(objective=objective, **more), tables, group), tables).result["model"]
    assert (model.words[0, 1:, THRESHOLD] == 0).all(), "the other leaf's would be the difference to the base margin"
    assert (model.words[0, :, COVER] == 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["squared", "quantile"])
def test_a_drawn_leaf_of_a_whole_group_is_told_as_it_is(federation: Any, drive: Any, objective: Any) -> None:
    tables = tables_of(federation, 10)
    model = drive(steps(params_of(objective=objective), tables), tables).result["model"]
    assert model.words[0, :, COVER].tolist() == [90, 80, 10]
    assert model.predict(tables["a"])[0] == pytest.approx(873, rel=0.1)


def test_covers_of_drawn_trees_are_of_what_is_told(federation: Any, drive: Any) -> None:
    tables = tables_of(federation)
    params = params_of(features=["x", "z"], edges={"x": [10, 20, 30, 50], "z": [20, 50, 80]}, trees=6, max_depth=4)
    words = drive(steps(params, tables), tables).result["model"].words
    leaves, splits = words[:, :, FEATURE] == LEAF, words[:, :, FEATURE] >= 0
    cover = words[:, :, COVER]
    assert not ((cover > 0) & (cover < 10)).any() and (cover[leaves] > 0).any() and (cover[leaves] == 0).any()
    assert (words[leaves & (cover == 0)][:, THRESHOLD] == 0).all()
    below = cover[:, 1::2] + cover[:, 2::2]
    assert (cover[:, : below.shape[1]] == below)[splits[:, : below.shape[1]]].all()
    hidden = 90 - (cover * leaves).sum(axis=1)
    assert ((hidden == 0) | (hidden >= 10)).all()


def test_another_leaf_is_withheld_where_the_difference_would_tell() -> None:
    rows = np.array([[3, 20, 0, 30], [6, 6, 12, 30], [0, 10, 11, 12], [4, 0, 0, 0], [0, 0, 0, 0]])
    expected = [[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert large(rows, 10).astype(int).tolist() == expected
    assert large(rows, 1).tolist() == (rows > 0).tolist()


def test_an_extreme_quantile_is_learned_and_its_base_margin_is_nobodys(federation: Any, drive: Any) -> None:
    """Most gradients are alike then, and no sign of a constant label."""
    tables = tables_of(federation)
    extreme = params_of(objective={"kind": "quantile", "alpha": 0.999}, splits="best", edges={"x": [10, 20, 30]})
    model = drive(steps(extreme, tables), tables).result["model"]
    assert model.base[0] < 60
    assert (model.predict(tables["a"]) < 120).all()


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("objective", ["squared", QUANTILE, {"kind": "cox", "event": "event"}], ids=str)
@pytest.mark.parametrize("splits", ["best", "random"])
def test_losses_of_few_held_out_rows_are_not_told(federation: Any, drive: Any, objective: Any, splits: str) -> None:
    tables = tables_of(federation)
    params = params_of(objective=objective, splits=splits)
    for size, told in ((3, False), (4, True)):
        held = {name: table.rows(np.arange(30) < size) for name, table in tables.items()}
        result = drive(steps(params, tables, 12), tables, held).result
        assert np.isfinite(result["held_out"]).all() == told == (not np.isnan(result["held_out"]).all())
        assert np.isfinite(result["history"]).all()
    assert np.isnan(drive(steps(params, tables, 91), tables, held).result["history"]).all()


def test_losses_of_few_do_not_end_a_run(federation: Any, drive: Any) -> None:
    tables = tables_of(federation)
    held = {name: table.rows(np.arange(30) < 3) for name, table in tables.items()}
    with pytest.raises(PlanError) as caught:
        drive(steps(params_of(stop={"patience": 1}), tables), tables, held)
    assert caught.value.code == "plan.no-holdout"


# ---------------------------------------------------------------- a round that is begun anew


def test_another_attempt_at_a_round_asks_what_the_first_did(federation: Any) -> None:
    """It replaces what the site was told in the round, so that other splits would be told of the same tree."""
    told: list[Message] = []

    def another(name: str, endpoint: Endpoint) -> Endpoint:
        def handle(message: Message, progress: Progress) -> Message:
            answer = endpoint(message, progress)
            if name == "a" and message.meta.get("name") == "level" and answer.kind == "release" and not told:
                before, after = message.arrays["version"].tolist()
                state = federation.journals["a"].state(federation.run_id, "trees.boosted")
                records = Log.of(state).records[:after]
                log = Log([*records[:-1], records[-1] * np.array([1, 0, 1, 1, 1]) + np.array([0, 20.0, 0, 0, 0])])
                digest = np.frombuffer(log.digests[-1], np.uint8)
                other = {**message.arrays, **_packed(log.records[before:]), "digest": digest}
                for attempt, arrays in ((7, message.arrays), (8, other)):
                    meta = {**message.meta, "attempt": attempt, "id": str(attempt)}
                    told.append(endpoint(Message(message.kind, meta, arrays), progress))
            return answer

        return handle

    tables = tables_of(federation)
    params = params_of(splits="best", max_depth=2, edges={"x": [10.0, 20.0, 30.0]})
    policies = dict.fromkeys(tables, Policy.sandbox())
    plan = federation.plan("trees.boosted", params, tables)
    federation.run(plan, tables, policies, wrap=another)
    same, other = told
    assert same.kind == "release"
    assert other.meta["code"] == "budget.question" and not other.arrays
