"""What handlers declare of one record is true, and what coordinators are given under noise does not break them.

For every example of a program: its rounds are asked of a real table and of the same table without one record
(often an extreme one), and the difference of each field is measured. And noise as large as the record's norm asks
for is added to every field of every round.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from atoll.contract.disclosure import Rule, judged
from atoll.contract.errors import DisclosureError, ProtocolError
from atoll.contract.program import REGISTRY, Cohort, build, handler_of
from atoll.contract.rounds import Field, Gathered, Round, Sum, Summed, Task, TaskId, as_arrays
from atoll.contract.sensitivity import Norms
from atoll.data.table import Table
from atoll.privacy.fixed_point import width_of

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


def changed(item: Round, whole: Desk, without: Desk) -> Iterator[tuple[str, float, float]]:
    one, other = answered(item, whole), answered(item, without)
    for told in item.reply:
        change = np.abs(one[told].astype(np.float64) - other[told].astype(np.float64))
        yield told, float(change.sum()), math.sqrt(float((change**2).sum()))


def adversarial(item: Round, random: np.random.Generator) -> Round:
    """The same round with other arrays of the coordinator's choice."""
    send = {}
    for name, value in sent_of(item).items():
        made = value * random.uniform(0.5, 2, value.shape) + random.normal(0, 1, value.shape)
        send[name] = np.abs(made) if name == "scale" else np.sort(made, axis=-1) if name == "edges" else made
        if name == "grades":
            send[name] = np.clip(made, -1, 1)
    return Round(item.name, item.reduce, item.reply, send, program=item.program, params=item.params)


# ---------------------------------------------------------------- what one record changes


@pytest.mark.parametrize("exact", [True, False])
@every_example
def test_no_record_changes_more_than_is_declared(
    federation: Any, name: str, params: dict[str, Any], missing: bool, exact: bool
) -> None:
    tables = tables_of(federation, missing)
    _, rounds = played(name, params, tables, exact)
    random, table = np.random.default_rng(5), tables["s0"]
    for turned in (None, 1, 2):
        asked = [adversarial(item, random) if turned else item for item in rounds]
        for left_out in itertools.chain(range(0, 16, 4), random.integers(0, len(table), 4)):
            keep = np.arange(len(table)) != left_out
            empty = table.rows(np.zeros(len(table), bool))
            whole, without = Desk("s0", table, empty), Desk("s0", table.rows(keep), empty)
            for item in asked:
                if not isinstance(item.reduce, Sum) or f"{item.program}/{item.name}" in REFUSED:
                    continue
                try:
                    changes = list(changed(item, whole, without))
                except ProtocolError:
                    assert turned, "an honest round is refused"
                    continue
                norms = norms_of(item, table.schema)
                assert set(norms) == set(item.reply)
                for element, l1, l2 in changes:
                    told = norms[element]
                    where = f"{item.program}/{item.name}: {element}"
                    assert l1 <= told.l1 * (1 + 1e-7) + 1e-7, f"{where}: L1 {l1} > {told.l1}"
                    assert l2 <= told.l2 * (1 + 1e-7) + 1e-7, f"{where}: L2 {l2} > {told.l2}"


@every_example
def test_what_is_declared_is_not_far_above_what_happens(
    federation: Any, name: str, params: dict[str, Any], missing: bool
) -> None:
    """Of all records at the ends of ranges, some change each field by a good part of its norm: else noise is wasted."""
    tables = tables_of(federation, missing=False)
    _, rounds = played(name, params, tables, exact=False)
    table, most = tables["s0"], dict[tuple[int, str], float]()
    empty = table.rows(np.zeros(len(table), bool))
    for left_out in range(40):
        whole, without = Desk("s0", table, empty), Desk("s0", table.rows(np.arange(40) != left_out), empty)
        for number, item in enumerate(rounds):
            for told_field, _, l2 in changed(item, whole, without):
                most[number, told_field] = max(most.get((number, told_field), 0.0), l2)
    for (number, told_field), found in most.items():
        item = rounds[number]
        told = norms_of(item, table.schema)[told_field].l2
        small = {"dropped", "flags", "apart", "single", "left_out", "unlabelled", "months", "timed"}
        if told and told_field not in small:
            assert found > told / 12, f"{item.program}/{item.name}: {told_field} {found} of {told}"


def test_what_declares_nothing_is_known() -> None:
    quiet = {
        f"{name}/{asked}"
        for name, cls in REGISTRY.items()
        if cls.__module__.startswith("atoll.statistics") or name == "horizontal.glm"
        for asked, handler in cls.handlers.items()
        if handler.reduce == "sum" and handler.record is None
    }
    assert quiet - {"statistics.evaluation/scores", "statistics.evaluation/personal"} == REFUSED


def test_the_achieved_anonymity_is_not_declared(federation: Any) -> None:
    tables = tables_of(federation, missing=True)
    made = build("statistics.preparation", {"reasons": ["duplicate rows"], "anonymity": True})
    record = handler_of(made, "left out").record
    assert record is not None
    assert not record(made, tables["s0"].schema, {})


CELLS = {"statistics.frequency", "statistics.woe", "statistics.survival", "horizontal.glm"}


@every_example
def test_cells_are_not_told_where_others_see_a_sites_own(
    federation: Any, name: str, params: dict[str, Any], missing: bool
) -> None:
    """What is asked under noise alone would, beside merged counts, tell small groups."""
    tables = tables_of(federation, missing)
    table, refused = tables["s0"], 0
    seen = {(item.program, item.name) for item in played(name, params, tables, exact=True)[1]}
    for item in played(name, params, tables, exact=False)[1]:
        if (item.program, item.name) not in seen:
            with pytest.raises(DisclosureError) as caught:
                answered(item, Desk("s0", table, table.rows(np.zeros(len(table), bool)), min_group_size=5))
            assert caught.value.code == "disclosure.cells"
            refused += 1
    assert refused or (name not in CELLS and params.get("method") != "spearman")


def test_edges_that_do_not_rise_are_refused(federation: Any) -> None:
    """Differences of counts at such edges would change in many places with one record."""
    tables = tables_of(federation, missing=True)
    _, (item, _) = played("statistics.correlation", {"method": "spearman", "bins": 64}, tables, exact=False)
    edges = np.asarray(item.send["edges"])[:, ::-1].copy()
    turned = Round(item.name, item.reduce, item.reply, {"edges": edges}, program=item.program, params=item.params)
    desk = Desk("s0", tables["s0"], tables["s0"])
    for ask in (lambda: answered(turned, desk), lambda: norms_of(turned, tables["s0"].schema)):
        with pytest.raises(ProtocolError) as caught:
            ask()
        assert (caught.value.code, caught.value.field) == ("task.array", "edges")


# ---------------------------------------------------------------- noise


def gaussian(seed: int, times: float) -> Noise:
    random = np.random.default_rng(seed)

    def add(field: Field, total: Any, l2: float) -> Any:
        noisy = np.asarray(total, np.float64) + random.normal(0, times * l2, np.shape(total)) * (l2 > 0)
        if np.dtype(field.dtype).kind in "iu":
            return np.maximum(np.rint(noisy), 0).astype(np.int64)
        return noisy

    return add


@pytest.mark.parametrize("times", [3.0, 1000.0])
@pytest.mark.parametrize(("name", "params", "missing"), [*EXAMPLES, *OF_SITES])
def test_noise_breaks_no_coordinator(
    federation: Any, name: str, params: dict[str, Any], missing: bool, times: float
) -> None:
    tables = tables_of(federation, missing)
    _, quiet = played(name, params, tables, exact=False)
    zeros: Noise = lambda field, total, l2: np.zeros_like(total)  # noqa: E731
    _, dry = played(name, params, tables, exact=False, noise=zeros)
    for seed in range(4):
        result, rounds = played(name, params, tables, exact=False, noise=gaussian(seed, times))
        assert result
        asked = [(item.program, item.name) for item in rounds]
        assert asked == [(item.program, item.name) for item in quiet] == [(item.program, item.name) for item in dry]


def _weights(found: Any) -> Any:
    return found["model"].weights


# what is compared, and how far noise of three times a record's norm may move it, of 60,000 rows
CLOSE: list[tuple[str, dict[str, Any], Callable[[Any], Any], float]] = [
    ("statistics.describe", {"columns": ["a"]}, lambda r: [r["columns"]["a"][k] for k in ("mean", "std")], 0.01),
    (
        "statistics.quantiles",
        {"columns": ["a"], "error": 1e-3, "bins": 32},
        lambda r: r["quantiles"]["columns"]["a"]["values"][1:-1],
        0.2,
    ),
    (
        "statistics.frequency",
        {"columns": ["a", "kind"]},
        lambda r: np.concatenate([c["counts"] for c in r["frequency"]["columns"].values()]) / 6e4,
        0.001,
    ),
    (
        "statistics.crosstab",
        {"pairs": [["binary", "kind"]]},
        lambda r: np.array(r["crosstab"]["tables"][0]["counts"]) / 6e4,
        0.001,
    ),
    (
        "statistics.psi",
        {"columns": ["a", "kind"], "between": "periods", "date": "seen", "cut": "2021-01-01"},
        lambda r: [c["psi"] for c in r["psi"]["columns"].values()],
        0.01,
    ),
    ("statistics.correlation", {"columns": ["a", "b", "value"]}, lambda r: r["correlation"]["matrix"], 0.02),
    (
        "statistics.correlation",
        {"columns": ["a", "b", "value"], "method": "spearman", "bins": 256},
        lambda r: r["correlation"]["matrix"],
        0.03,
    ),
    (
        "statistics.vif",
        {"columns": ["a", "b", "value"]},
        lambda r: [c["vif"] for c in r["vif"]["columns"].values()],
        0.5,
    ),
    ("statistics.pca", {"columns": ["a", "b", "value"]}, lambda r: r["pca"]["eigenvalues"], 0.05),
    (
        "statistics.group_by",
        {"by": ["kind"], "columns": ["a"]},
        lambda r: [g["columns"]["a"]["mean"] for g in r["group_by"]["groups"][:3]],
        0.01,
    ),
    ("statistics.anova", {"column": "value", "by": "binary"}, lambda r: r["anova"]["eta_squared"], 0.01),
    ("statistics.ttest", {"column": "value", "by": "binary"}, lambda r: r["ttest"]["difference"], 0.2),
    (
        "statistics.ttest",
        {"column": "a", "mean": 0.5},
        lambda r: [r["ttest"][k] for k in ("difference", "cohens_d")],
        0.01,
    ),
    (
        "statistics.woe",
        {"target": "binary", "features": ["a", "kind"]},
        lambda r: [f["iv"] for f in r["woe"]["features"].values()],
        0.02,
    ),
    (
        "statistics.survival",
        {"duration": "count", "event": "binary"},
        lambda r: r["survival"]["curves"]["all"]["survival"][:20],
        0.02,
    ),
    ("statistics.quality", {}, lambda r: r["quality"]["score"], 0.02),
    ("horizontal.glm", _learner("logistic", "binary"), _weights, 0.02),
    ("horizontal.glm", _learner("linear", "value"), _weights, 0.3),
    ("horizontal.glm", _learner("poisson", "count"), _weights, 0.02),
]


@pytest.mark.parametrize(("name", "params", "of", "tolerance"), CLOSE, ids=[f"{i}-{c[0]}" for i, c in enumerate(CLOSE)])
def test_of_many_rows_noise_changes_little(
    federation: Any, name: str, params: dict[str, Any], of: Callable[[Any], Any], tolerance: float
) -> None:
    tables = tables_of(federation, missing=False, sizes=(20_000, 30_000, 10_000))
    exact, _ = played(name, params, tables, exact=True, smallest=1)
    for times in (0.0, 3.0):
        noisy, _ = played(name, params, tables, exact=False, noise=gaussian(1, times))
        off = np.abs(np.array(of(exact), np.float64) - np.array(of(noisy), np.float64)).max()
        print(name, times, off, tolerance)
        assert off <= tolerance


# ---------------------------------------------------------------- fixed point


@pytest.mark.parametrize("exact", [True, False])
@every_example
def test_the_sum_of_a_hundred_sites_of_a_hundred_million_rows_fits_a_ring(
    federation: Any, name: str, params: dict[str, Any], missing: bool, exact: bool
) -> None:
    """With noise (and so with room for it), in one of 64 bits."""
    tables = tables_of(federation, missing, max_rows=100_000_000)
    for item in played(name, params, tables, exact)[1]:
        if isinstance(item.reduce, Sum):
            for told, declared in item.reply.items():
                assert width_of(told, declared, 100) <= (128 if exact else 64)
                assert declared.bound is not None and declared.step
                assert 200 * declared.bound / declared.step < (2.0**126 if exact else 2.0**63)


@every_example
def test_fixed_point_keeps_the_digits(federation: Any, name: str, params: dict[str, Any], missing: bool) -> None:
    """Sums of ten sites, each rounded to the step that a schema of ten million rows leads to."""
    tables = tables_of(federation, missing, sizes=(400, 150, 700))
    exact, _ = played(name, params, tables, exact=True, smallest=1)

    def rounded(declared: Field, total: Any, _: float) -> Any:
        step = 10 * (declared.step or 0)
        return np.rint(total / step) * step if np.dtype(declared.dtype).kind == "f" else total

    found, _ = played(name, params, tables, exact=True, noise=rounded, smallest=1)
    other = dict(numbers(found))
    for path, value in numbers(exact):
        if not math.isnan(value) and not path.startswith(("/history", "/iterations")):
            assert other[path] == pytest.approx(value, rel=1e-9, abs=1e-10), path


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a result, by where it stands."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from numbers(inner, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from numbers(inner, f"{path}/{i}")
    elif isinstance(value, np.ndarray):
        yield from numbers(value.tolist(), path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)
