"""Bagged trees: each site's own, averaged, in one message."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from atoll.contract.errors import AtollError, DisclosureError, PlanError, ProtocolError
from atoll.contract.program import Cohort, build
from atoll.contract.rounds import Gather, Gathered, Round, Task, TaskId
from atoll.data.table import Table
from atoll.models.trees import COVER, FEATURE, LEAF, THRESHOLD
from atoll.runtime.policy import Policy

from .forest_rows import COLUMNS, rows


def tables_of(federation: Any, sizes: tuple[int, ...] = (150, 90, 120)) -> dict[str, Table]:
    return {f"s{i}": federation.table(rows(i, n), COLUMNS) for i, n in enumerate(sizes)}


def params_of(target: str, **more: Any) -> dict[str, Any]:
    basis = {"features": ["a", "b", "kind"], "trees": 12, "max_depth": 3, "max_bins": 8, "min_rows": 3}
    return {"target": target, "edges": {"a": [-1, 0, 1], "b": [200, 400, 600]}, **basis, **more}


def steps(params: dict[str, Any], tables: dict[str, Table], **cohort: Any) -> Any:
    schema = next(iter(tables.values())).schema
    return build("trees.bagged", params).coordinate(Cohort(tuple(tables), schema, **{"seed": 7, **cohort}))


OBJECTIVES: list[tuple[str, Any]] = [
    ("value", "auto"), ("binary", "auto"), ("class", "auto"), ("value", {"kind": "quantile", "alpha": 0.8}),
    ("time", {"kind": "cox", "event": "binary"}),
]  # fmt: skip


@pytest.mark.parametrize(("target", "objective"), OBJECTIVES, ids=["squared", "logistic", "softmax", "quantile", "cox"])
def test_of_one_site_it_is_boosting(federation: Any, drive: Any, target: str, objective: Any) -> None:
    """The same trees as ``trees.boosted`` grows by rounds."""
    tables = tables_of(federation, (200,))
    params = params_of(target, objective=objective, trees=4)
    bagged = drive(steps(params, tables), tables)
    boosted = build("trees.boosted", {**params, "binning": "even"})
    beside = drive(boosted.coordinate(Cohort(("s0",), tables["s0"].schema, seed=7)), tables)
    assert bagged.result["model"].weights.tobytes() == beside.result["model"].weights.tobytes()
    assert [item.name for item in bagged.rounds] == ["grow"]


@pytest.mark.parametrize("weighting", ["rows", "sites"])
def test_the_margin_is_the_weighted_mean_of_the_sites(federation: Any, drive: Any, weighting: str) -> None:
    tables = tables_of(federation)
    result = drive(steps(params_of("binary", weighting=weighting), tables), tables).result
    assert result["rows"] == {"s0": 150, "s1": 90, "s2": 120} and result["iterations"] == 4
    shares = [150 / 360, 90 / 360, 120 / 360] if weighting == "rows" else [1 / 3] * 3
    x = result["model"].inputs(tables["s0"])
    expected = np.zeros((150, 1))
    for share, (name, table) in zip(shares, tables.items(), strict=True):
        alone = drive(steps(params_of("binary", trees=4), {name: table}), {name: table}).result["model"]
        expected += share * alone.margins(x)
    np.testing.assert_allclose(result["model"].margins(x), expected, atol=1e-6)


def test_it_ranks_nearly_as_well_as_boosting_for_fewer_bytes_and_rounds(federation: Any, drive: Any) -> None:
    tables = tables_of(federation, (700, 700, 700))
    params = params_of("binary", trees=30, max_depth=4, edges={}, max_bins=32)
    bagged = drive(steps(params, tables), tables)
    boosted = build("trees.boosted", {**params, "trees": 10})
    beside = drive(boosted.coordinate(Cohort(tuple(tables), tables["s0"].schema, seed=7)), tables)
    rest = federation.table(rows(9, 1000), COLUMNS)
    labels = np.asarray(rest["binary"])
    auc = [roc_auc_score(labels, driven.result["model"].predict(rest)) for driven in (bagged, beside)]
    assert auc[0] > auc[1] - 0.01

    def sent(driven: Any) -> int:
        """Bytes of one site's own answers about trees."""
        replies = [reply["s0"] for item, reply in zip(driven.rounds, driven.replies, strict=True)
                   if item.program in ("trees.bagged", "trees.boosted")]  # fmt: skip
        return sum(array.nbytes for reply in replies for array in reply.values())

    assert sent(bagged) < sent(beside) / 2
    assert len(bagged.rounds) < len(beside.rounds) / 3


def test_no_leaf_of_fewer_people_than_the_policy_says_leaves_a_site(federation: Any) -> None:
    tables = tables_of(federation)
    policies = {name: Policy.sandbox().model_copy(update={"min_group_size": 20}) for name in tables}
    params, run = params_of("value", min_rows=1, max_depth=5, edges={}), {"min_group_size": 20}
    federation.run(federation.plan("trees.bagged", params, tables, run=run), tables, policies)
    words = federation.store.result(federation.run_id)[1]["weights"][1:].reshape(12, -1, 5)
    leaves = words[:, :, FEATURE] == LEAF
    assert words[leaves][:, COVER].min() >= 20, "of squared loss the cover is the number of rows"
    assert (words[:, 0, FEATURE] >= 0).all()
    few = tables_of(federation, (150, 90, 12))
    with pytest.raises(DisclosureError):
        federation.run(federation.plan("trees.bagged", {**params, "binning": "even"}, few, run=run), few, policies)


def test_it_is_refused_where_only_sums_may_be_seen(federation: Any) -> None:
    tables = tables_of(federation)
    with pytest.raises(PlanError) as caught:
        federation.run(federation.plan("trees.bagged", params_of("value"), tables, protection="secagg"), tables)
    assert "plan.illegal-combination" in (caught.value.code, *(part.code for part in caught.value.parts))


def test_a_site_that_is_away_is_left_out_of_the_mean(federation: Any, drive: Any) -> None:
    tables = tables_of(federation)
    away = drive(steps(params_of("value"), tables), tables, absent=lambda _: ["s1"]).result
    two = {name: tables[name] for name in ("s0", "s2")}
    beside = drive(steps(params_of("value", trees=8), two), two).result["model"]
    x = beside.inputs(tables["s0"])
    assert set(away["rows"]) == {"s0", "s2"}
    np.testing.assert_allclose(away["model"].margins(x), beside.margins(x), atol=1e-9)


@pytest.mark.parametrize("broken", [{"feature": 7.0}, {"threshold": np.nan}, {"threshold": 1e300}])
def test_trees_that_are_none_are_refused(federation: Any, drive: Any, broken: dict[str, float]) -> None:
    tables = tables_of(federation)
    made = steps(params_of("value"), tables)
    item = next(made)
    assert isinstance(item, Round) and isinstance(item.reduce, Gather)
    good = drive(steps(params_of("value"), tables), tables).replies[0]
    words = np.array(good["s1"]["words"])
    words[0, 0, FEATURE if "feature" in broken else THRESHOLD] = next(iter(broken.values()))
    with pytest.raises(AtollError) as caught:
        made.send(Gathered({**good, "s1": {**good["s1"], "words": words}}))
    assert caught.value.code in ("model.bad-trees", "reply.not-finite")


@pytest.mark.parametrize(
    "sent",
    [{"steps": np.array(0)}, {"steps": np.array(13)}, {"steps": np.array(2.0)}, {"bins": np.array([1.0, np.nan])},
     {"bins": np.array([3.0, 3.0, 0.0, 3.0, 2.0, 1.0, 0.0, 1.0, 2.0])}, {"bins": np.zeros((2, 2))}],
)  # fmt: skip
def test_a_site_takes_nothing_malformed(federation: Any, drive: Any, sent: dict[str, Any]) -> None:
    tables = tables_of(federation)
    driven = drive(steps(params_of("value"), tables), tables)
    arrays = {**driven.rounds[0].send, **sent}
    program = build("trees.bagged", params_of("value"))
    with pytest.raises(ProtocolError):
        program.grow(driven.desks["s0"], Task(TaskId("0" * 32, 0, 0, "reply", "s0"), arrays, ()))  # type: ignore[attr-defined]


def test_what_cannot_be_is_refused(federation: Any, drive: Any) -> None:
    tables = tables_of(federation)
    for params, code in (
        (params_of("value", trees=2), "trees.too-few"),
        (params_of("value", edges={"a": [2, 1]}), "plan.bad-edges"),
        (params_of("kind"), "plan.bad-column"),
        (params_of("value", objective="poisson"), "plan.bad-target"),
    ):
        with pytest.raises(PlanError) as caught:
            drive(steps(params, tables), tables)
        assert caught.value.code == code


def test_a_site_without_rows_weighs_nothing_and_breaks_nothing(federation: Any, drive: Any) -> None:
    tables = tables_of(federation, (150, 90, 0))
    found = drive(steps(params_of("binary"), tables), tables).result["model"]
    assert np.isfinite(found.weights).all()
