"""Examples of every statistic, rows like people's, and their rounds played without a runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from atoll.contract.disclosure import Rule, judged
from atoll.contract.fields import Field, as_arrays
from atoll.contract.program import Cohort, build, handler_of
from atoll.contract.rounds import Gathered, Round, Sum, Summed, Task, TaskId
from atoll.contract.sensitivity import Norms
from atoll.data.table import Table

COLUMNS: dict[str, dict[str, Any]] = {
    "a": {"range": [-5, 5]},
    "b": {"range": [0, 1000]},
    "far": {"range": [1e6, 1e6 + 3]},
    "binary": {"dtype": "integer", "values": [0, 1], "role": "label"},
    "count": {"dtype": "integer", "range": [0, 40], "role": "label"},
    "value": {"range": [-80, 80], "role": "label"},
    "kind": {"dtype": "text", "values": ["x", "y", "z"]},
    "seen": {"dtype": "date", "role": "time"},
}
ALL = ["a", "b", "far", "value"]
FULL = ["a", "b", "far"]


def _learner(family: str, target: str, **more: Any) -> dict[str, Any]:
    return {"family": family, "features": FULL, "target": target, **more}


# (program, params, whether a record's cells may be missing)
EXAMPLES: list[tuple[str, dict[str, Any], bool]] = [
    ("statistics.describe", {}, True),
    ("statistics.describe", {"columns": ["b"], "bins": 4, "tail_rows": 2}, True),
    ("statistics.several", {"ask": [{"program": "statistics.describe"}, {"program": "statistics.quantiles"}]}, True),
    ("statistics.preparation", {"reasons": ["duplicate rows"]}, True),
    ("statistics.quantiles", {"error": 1e-3, "bins": 16}, True),
    ("statistics.quantiles", {"probabilities": [0, 0.5, 1], "error": 0.01}, True),
    ("statistics.frequency", {"edges": {"a": [-1, 0, 0.5]}}, True),
    ("statistics.crosstab", {"pairs": [["binary", "kind"], ["kind", "kind"]]}, True),
    ("statistics.psi", {"columns": ["a", "kind"], "between": "periods", "date": "seen", "cut": "2021-01-01"}, True),
    ("statistics.correlation", {"columns": ALL}, True),
    ("statistics.correlation", {"columns": ALL, "missing": "listwise"}, True),
    ("statistics.correlation", {"method": "spearman", "bins": 64}, True),
    ("statistics.correlation", {"method": "spearman", "missing": "listwise", "bins": 64}, True),
    ("statistics.vif", {"columns": ALL}, True),
    ("statistics.pca", {"components": 2}, True),
    ("statistics.group_by", {"by": ["binary", "kind"]}, True),
    ("statistics.anova", {"column": "value", "by": "kind"}, True),
    ("statistics.ttest", {"column": "value", "by": "binary"}, True),
    ("statistics.ttest", {"column": "value", "by": "binary", "equal_variance": True}, True),
    ("statistics.ttest", {"column": "a", "mean": 0.5}, True),
    ("statistics.ttest", {"column": "a", "paired": "value"}, True),
    ("statistics.woe", {"target": "binary"}, True),
    ("statistics.woe", {"target": "binary", "binning": "equal"}, True),
    ("statistics.survival", {"duration": "count", "event": "binary"}, True),
    ("statistics.survival", {"duration": "b", "event": "binary", "group": "kind"}, True),
    ("statistics.quality", {}, True),
    ("horizontal.glm", _learner("logistic", "binary"), False),
    ("horizontal.glm", _learner("linear", "value", l2=0.5), False),
    ("horizontal.glm", _learner("poisson", "count"), False),
    ("trees.isolation", {"features": [*FULL, "kind"], "trees": 3, "max_depth": 3, "contamination": 0.2}, True),
]
OF_SITES: list[tuple[str, dict[str, Any], bool]] = [
    ("statistics.comparison", {}, True),
    ("statistics.psi", {"columns": ["a", "binary", "kind"]}, True),
]
"""Programs that are run under noise only where it hides whole sites."""
every_example = pytest.mark.parametrize(
    ("name", "params", "missing"), EXAMPLES, ids=[f"{i}-{name}" for i, (name, *_) in enumerate(EXAMPLES)]
)
REFUSED = {
    "statistics.correlation/rank_products",  # a row's rank also depends on the site's other rows
    "statistics.psi/drift",  # whether a site drifted: all of it may turn on one record
    "statistics.comparison/apart",
    "statistics.comparison/shares",
}
"""Handlers of Sum rounds that declare nothing, so that no noise is enough."""


def rows_of(random: np.random.Generator, n: int, missing: bool) -> dict[str, Any]:
    """Rows like people's, and among them ones at the ends of every range."""
    a, b = random.normal(0, 1, n).clip(-5, 5), random.uniform(0, 700, n)
    eta = 0.4 * a + b / 1000
    data: dict[str, Any] = {
        "a": a,
        "b": b,
        "far": 1e6 + random.uniform(0, 3, n),
        "binary": (random.random(n) < 1 / (1 + np.exp(-eta))).astype(float),
        "count": np.minimum(random.poisson(np.exp(eta)), 40).astype(float),
        "value": (eta * 10 + random.normal(0, 1, n)).clip(-80, 80),
        "kind": random.choice(["x", "y", "z"], n).astype(object),
        "seen": np.datetime64("2020-06-01", "D") + random.integers(0, 500, n),
    }
    ends = {"a": (-5, 5), "b": (0, 1000), "far": (1e6, 1e6 + 3), "binary": (0, 1), "count": (0, 40), "value": (-80, 80)}
    for row in range(0, n, 4):
        for name, pair in ends.items():
            data[name][row] = pair[random.integers(2)]
    if missing:
        for name in data:
            gone = random.random(n) < 0.15
            data[name][gone] = None if name == "kind" else np.datetime64("NaT") if name == "seen" else np.nan
    return data


def tables_of(federation: Any, missing: bool, sizes: tuple[int, ...] = (40, 15, 70), **schema: Any) -> dict[str, Table]:
    random = np.random.default_rng(11)
    return {f"s{i}": federation.table(rows_of(random, n, missing), COLUMNS, **schema) for i, n in enumerate(sizes)}


@dataclass
class Desk:
    """One site as a handler sees it, whose own numbers nobody sees (see ``atoll.contract.program.SiteView``)."""

    name: str
    table: Table
    holdout: Table
    state: dict[str, Any] = field(default_factory=dict)
    min_group_size: int = 1

    def progress(self, done: float, total: float) -> None:
        """Nobody watches."""

    def shares(self, what: str) -> bool:
        return True


Noise = Callable[[Field, Any, float], Any]


def played(
    name: str,
    params: Mapping[str, Any],
    tables: Mapping[str, Table],
    exact: bool,
    noise: Noise | None = None,
    smallest: int = 5,
) -> Any:
    """(result, rounds) of a program over *tables*; *noise* is added to each sum by its field and L2 norm."""
    schema = next(iter(tables.values())).schema
    steps = build(name, dict(params)).coordinate(Cohort(tuple(tables), schema, 7, smallest, exact=exact))
    empty = {n: t.rows(np.zeros(len(t), bool)) for n, t in tables.items()}
    desks = {n: Desk(n, t, empty[n]) for n, t in tables.items()}
    rounds: list[Round] = []
    value: Any = None
    while True:
        try:
            item = steps.send(value)
        except StopIteration as stop:
            return stop.value, rounds
        value = None
        if isinstance(item, Round):
            rounds.append(item)
            replies = {n: answered(item, desk) for n, desk in desks.items()}
            if not isinstance(item.reduce, Sum):
                value = Gathered(replies)
                continue
            sums: dict[str, Any] = {f: np.sum([r[f] for r in replies.values()], axis=0) for f in item.reply}
            if noise is not None:
                norms = norms_of(item, schema) if not exact else {}
                sums = {f: noise(declared, sums[f], norms[f].l2 if norms else 0) for f, declared in item.reply.items()}
            value = Summed(sums, tuple(desks))


def sent_of(item: Round) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in item.send.items()}


def answered(item: Round, desk: Desk) -> dict[str, np.ndarray]:
    made = build(item.program, item.params)
    handler = handler_of(made, item.name)
    task = Task(TaskId("0" * 32, 0, 0, "reply", desk.name), sent_of(item), (0,))
    return as_arrays(judged(handler.answer(made, desk, task), handler.cells, Rule()), item.reply)


def norms_of(item: Round, schema: Any) -> Mapping[str, Norms]:
    made = build(item.program, item.params)
    record = handler_of(made, item.name).record
    if record is None and f"{item.program}/{item.name}" in REFUSED:
        return {told: Norms(1, 1) for told in item.reply}  # a whole site's, of which each element is 0 or 1
    assert record is not None, f"{item.program}/{item.name} declares nothing"
    return record(made, schema, sent_of(item))
