"""Trees under differential privacy: the same rounds whatever the data, norms that hold, and use at a large budget."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError
from atoll.contract.fields import as_arrays
from atoll.contract.program import Cohort, build, handler_of
from atoll.contract.rounds import Metrics, Round, Summed, Task, TaskId
from atoll.data.table import Table
from atoll.models.trees import FEATURE

COLUMNS: dict[str, dict[str, Any]] = {
    "a": {"range": [-5, 5]},
    "b": {"range": [0, 1000]},
    "kind": {"dtype": "text", "values": ["x", "y", "z"]},
    "binary": {"dtype": "integer", "values": [0, 1], "role": "label"},
    "class": {"dtype": "text", "values": ["p", "q", "r"], "role": "label"},
    "count": {"dtype": "integer", "range": [0, 40], "role": "label"},
    "value": {"range": [-80, 80], "role": "label"},
    "weight": {"range": [0, 3]},
    "years": {"range": [0, 5]},
}
SORTS: list[dict[str, Any]] = [
    {"target": "value"},
    {"target": "binary", "splits": "random"},
    {"target": "class", "colsample": 0.67},
    {"target": "count", "objective": "poisson", "splits": "random", "binning": "quantiles"},
    {"target": "value", "objective": "quantile"},
    {"target": "count", "objective": {"kind": "cox", "event": "binary", "reach": 1.0}, "splits": "random"},
    {"target": "binary", "weight": "weight", "max_depth": 1},
    {"target": "count", "objective": {"kind": "poisson", "exposure": "years"}, "splits": "random"},
]


def rows(seed: int, n: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    a, b = random.normal(0, 1, n).clip(-5, 5), random.uniform(0, 1000, n)
    a[::7], b[::5] = 5, 0
    kind = random.choice(["x", "y", "z"], n).astype(object)
    eta = np.sin(2 * a) + b / 500 - 1 + (kind == "x")
    kind[::11] = None
    return {
        "a": a, "b": np.where(random.random(n) < 0.1, np.nan, b), "kind": kind,
        "binary": (random.random(n) < 1 / (1 + np.exp(-2 * eta))).astype(float),
        "class": np.array(["p", "q", "r"], object)[np.digitize(eta, [0, 1])],
        "count": random.poisson(np.exp(eta)).clip(0, 40).astype(float),
        "value": (10 * eta + random.normal(0, 2, n)).clip(-80, 80),
        "weight": np.where(np.arange(n) % 3 == 0, 3.0, random.uniform(0, 3, n)), "years": random.uniform(1, 5, n),
    }  # fmt: skip


class Desk:
    """One site as a handler sees it."""

    def __init__(self, name: str, table: Table) -> None:
        self.name, self.table, self.state = name, table, dict[str, Any]()
        self.holdout, self.min_group_size = table.rows(np.zeros(len(table), bool)), 1

    def progress(self, done: float, total: float) -> None:
        """Nobody watches."""


def answered(item: Round, desk: Desk, made: dict[Any, Any]) -> dict[str, np.ndarray]:
    program = made.setdefault((item.program, desk), build(item.program, item.params))
    sent = {name: np.asarray(value) for name, value in item.send.items()}
    reply = handler_of(program, item.name).answer(program, desk, Task(TaskId("0" * 32, 0, 0, "reply", "s"), sent, (0,)))
    return as_arrays(reply, item.reply)


def norms_of(item: Round, schema: Any) -> Any:
    program = build(item.program, item.params)
    record = handler_of(program, item.name).record
    assert record is not None
    return record(program, schema, {name: np.asarray(value) for name, value in item.send.items()})


def played(params: Mapping[str, Any], tables: Mapping[str, Table], times: float = 0.0, seed: int = 0) -> Any:
    """(result, rounds); Gaussian noise of *times* each field's norm is added."""
    schema, random = next(iter(tables.values())).schema, np.random.default_rng(seed)
    basis = {"features": ["a", "b", "kind"], "trees": 3, "max_depth": 2, "max_bins": 8}
    steps = build("trees.boosted", {**basis, **params}).coordinate(Cohort(tuple(tables), schema, 7, 5, exact=False))
    desks, made, rounds, value = {n: Desk(n, t) for n, t in tables.items()}, dict[Any, Any](), list[Round](), None
    while True:
        try:
            item = steps.send(value)
        except StopIteration as stop:
            return stop.value, rounds
        value = False if isinstance(item, Metrics) else None
        if isinstance(item, Round):
            rounds.append(item)
            replies, norms, sums = [answered(item, desk, made) for desk in desks.values()], norms_of(item, schema), {}
            for name, declared in item.reply.items():
                total = np.sum([np.asarray(reply[name], np.float64) for reply in replies], axis=0)
                noisy = total + random.normal(0, 1, total.shape) * times * norms[name].l2
                whole = np.dtype(declared.dtype).kind in "iu"
                sums[name] = np.maximum(np.rint(noisy), 0).astype(np.int64) if whole else noisy
            value = Summed(sums, tuple(desks))


def tables_of(federation: Any, sizes: tuple[int, ...] = (80, 30), seed: int = 0) -> dict[str, Table]:
    return {f"s{i}": federation.table(rows(seed + i, n), COLUMNS) for i, n in enumerate(sizes)}


@pytest.mark.parametrize("params", SORTS, ids=lambda p: str(p.get("objective", p["target"])))
def test_rounds_and_their_shapes_do_not_depend_on_data_or_noise(federation: Any, params: dict[str, Any]) -> None:
    def asked(tables: Any, times: float, seed: int) -> list[Any]:
        result, rounds = played(params, tables, times, seed)
        assert np.isfinite(result["model"].weights).all()
        return [(i.program, i.name, {n: (f.dtype, f.shape) for n, f in i.reply.items()}) for i in rounds]

    first = asked(tables_of(federation), 0.0, 0)
    for seed, times in enumerate((1.0, 50.0, 1e4)):
        assert asked(tables_of(federation, (40, 0), seed + 5), times, seed) == first


@pytest.mark.parametrize("params", SORTS, ids=lambda p: str(p.get("objective", p["target"])))
def test_no_row_changes_more_than_is_declared(federation: Any, params: dict[str, Any]) -> None:
    """And some row changes a good part of it: else noise is wasted."""
    tables = tables_of(federation)
    _, rounds = played(params, tables)
    table, most = tables["s0"], dict[str, float]()
    for left_out in itertools.chain(range(0, 30, 3), (35, 44, 77)):
        keep = np.arange(len(table)) != left_out
        made: dict[Any, Any] = {}
        whole, without = Desk("s0", table), Desk("s0", table.rows(keep))
        for number, item in enumerate(rounds):
            norms = norms_of(item, table.schema)
            assert set(norms) == set(item.reply)
            one, other = answered(item, whole, made), answered(item, without, made)
            for name in item.reply:
                change = np.abs(np.asarray(one[name], np.float64) - np.asarray(other[name], np.float64))
                where = f"{item.name}: {name}"
                assert change.sum() <= norms[name].l1 * (1 + 1e-9), where
                assert np.sqrt((change**2).sum()) <= norms[name].l2 * (1 + 1e-9), where
                key = f"{number} {name}"
                if norms[name].l2:
                    most[key] = max(most.get(key, 0.0), float(np.sqrt((change**2).sum())) / norms[name].l2)
    if params["target"] in ("binary", "class"):
        assert min(most.values()) > 0.2, "of bounded gradients"


@pytest.mark.parametrize(("splits", "times"), [("random", 3.0), ("best", 3.0)])
def test_many_rows_are_learned_from_through_noise(federation: Any, splits: str, times: float) -> None:
    tables = tables_of(federation, (20_000, 10_000), 3)
    params = {"target": "binary", "splits": splits, "trees": 20 if splits == "random" else 5, "max_depth": 4}
    model = played(params, tables, times, 1)[0]["model"]
    test = federation.table(rows(99, 4000), COLUMNS)
    p, y = model.predict(test), np.asarray(test["binary"])
    ranks = np.argsort(np.argsort(p))
    auc = (ranks[y == 1].mean() - (y.sum() - 1) / 2) / (len(y) - y.sum())
    assert auc > 0.8
    exact = played(params, tables, 0.0)[0]["model"].predict(test)
    assert np.abs(exact - p).mean() < 0.1


def test_edges_that_depend_on_data_are_refused(federation: Any) -> None:
    with pytest.raises(PlanError) as caught:
        played({"target": "value", "binning": "quantiles"}, tables_of(federation))
    assert caught.value.code == "trees.noisy-edges"


def test_a_plan_of_differential_privacy_runs(federation: Any) -> None:
    tables = tables_of(federation, (3000, 2000, 2500))
    params = {"target": "binary", "features": ["a", "b", "kind"], "splits": "random", "trees": 10, "max_depth": 3}
    privacy = {"unit": "record", "epsilon": 8.0, "delta": 1e-5}
    plan = federation.plan(
        "trees.boosted", params, tables, protection="secagg", privacy=privacy, cohort={"min_sites": 3},
        run={"holdout": 0.3, "seed": 3},
    )  # fmt: skip
    outcome = federation.run(plan, tables)
    assert outcome["evaluation"]["pooled"]["auc"] > 0.7
    assert (outcome["result"]["model"].words[:, :, FEATURE] >= 0).any()
