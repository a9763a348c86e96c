"""WOE and IV equal pandas on the pooled rows at the reported edges, and no answers tell a small group apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.disclosure import Rule
from atoll.contract.errors import PlanError, ProtocolError
from atoll.contract.program import Cohort, build
from atoll.contract.rounds import Task, TaskId
from atoll.data.table import concatenate
from atoll.runtime.policy import Policy

COLUMNS: dict[str, dict[str, Any]] = {
    "amount": {"range": [0, 1e6]},
    "age": {"dtype": "integer", "range": [0, 90]},
    "code": {"dtype": "integer", "values": [5, 1, 2]},
    "town": {"dtype": "text", "values": ["east", "north", "south", "west"]},
    "single": {"range": [0, 10]},
    "empty": {"range": [0, 1]},
    "y": {"dtype": "integer", "values": [0, 1], "role": "label"},
    "note": {"dtype": "text"},
}
FEATURES = ["amount", "age", "code", "town", "single", "empty"]
BINNINGS = ["equal", "quantile", "monotone", "optimal"]


def site(
    federation: Any, random: np.random.Generator, n: int, shift: float, holes: float, unlabelled: float, town: str = ""
) -> Any:
    amount, age = np.clip(random.lognormal(8 + shift, 1.5, n), 0, 1e6), random.integers(0, 91, n).astype(float)
    y = (random.random(n) < 1 / (1 + np.exp(-(np.log(amount) - 9 + age / 90)))).astype(float)
    data = {"amount": amount, "age": age, "code": random.choice([5.0, 1.0, 2.0], n), "single": np.full(n, 3.0)}
    for values in data.values():
        values[random.random(n) < holes] = np.nan
    y[random.random(n) < unlabelled] = np.nan
    towns = random.choice([town] if town else ["east", "south", None], n)
    rest = {"town": towns, "empty": np.full(n, np.nan), "note": [None] * n, "y": y}
    return federation.table({**data, **rest}, COLUMNS)


def sites(
    federation: Any, seed: int, sizes: list[int], holes: float = 0.1, unlabelled: float | None = None
) -> dict[str, Any]:
    random, few = np.random.default_rng(seed), holes / 4 if unlabelled is None else unlabelled
    made = {f"s{i}": site(federation, random, n, random.random(), holes, few) for i, n in enumerate(sizes)}
    return {**made, "far": site(federation, random, max(sizes), 0.0, holes, few, town="north")}


def woe(drive: Any, tables: dict[str, Any], smallest: int = 1, **params: Any) -> Any:
    schema = next(iter(tables.values())).schema
    steps = build("statistics.woe", {"target": "y", **params}).coordinate(Cohort(tuple(tables), schema, 0, smallest))
    driven = drive(steps, tables, rule=Rule(smallest))
    return driven.result["woe"], driven


def frame(tables: dict[str, Any]) -> pd.DataFrame:
    rows = concatenate(list(tables.values()))
    return pd.DataFrame({name: rows[name] for name in [*FEATURES, "y"]}).dropna(subset=["y"])


def reference(rows: pd.DataFrame, name: str, found: dict[str, Any], smoothing: float = 0.5) -> pd.DataFrame:
    """Counts, WOE and IV of pandas at the reported edges, one line a bin, missing cells last."""
    labels, bins = rows["y"], found["bins"]
    if "values" in [*bins, found["missing"]][0]:
        home = {value: i for i, part in enumerate(bins) for value in part["values"]}
        places = rows[name].map(home)
    elif len(bins) > 0:
        edges = [-math.inf, *(part["to"] for part in bins[:-1]), math.inf]
        if found["missing"] and "to" in found["missing"]:
            edges[0] = found["missing"]["to"]
        places = pd.cut(rows[name], edges, labels=False)
    else:
        places = pd.Series(np.nan, rows.index)
    table = pd.crosstab(places.fillna(len(bins)), labels).reindex(
        index=range(len(bins) + 1), columns=[0, 1], fill_value=0
    )
    table.columns = ["negatives", "positives"]
    smooth = table.add(smoothing * (table == 0).any(axis=1), axis=0)
    share = smooth / table.sum()
    table["woe"] = np.log(share["negatives"] / share["positives"])
    table["iv"] = (share["negatives"] - share["positives"]) * table["woe"]
    return table


def check(rows: pd.DataFrame, name: str, found: dict[str, Any]) -> None:
    wanted, total = reference(rows, name, found), 0.0
    told = [*found["bins"], found["missing"] or {"positives": 0, "negatives": 0, "count": 0}]
    for part, (_, line) in zip(told, wanted.iterrows(), strict=True):
        assert (part["positives"], part["negatives"]) == (line.positives, line.negatives)
        assert part["count"] == line.positives + line.negatives
        if part["count"]:
            assert part["woe"] == pytest.approx(line.woe, rel=1e-9, abs=1e-12)
            assert part["iv"] == pytest.approx(line.iv, rel=1e-9, abs=1e-12)
            assert part["share"] == pytest.approx(part["count"] / len(rows))
            assert part["rate"] == pytest.approx(part["positives"] / part["count"])
            total += line.iv
    assert found["iv"] == pytest.approx(total, rel=1e-9, abs=1e-12)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.sampled_from([0, 1, 30, 200, 700]), min_size=1, max_size=4),
    holes=st.sampled_from([0.0, 0.1, 0.6]),
    binning=st.sampled_from(BINNINGS),
    smallest=st.sampled_from([1, 5]),
)
def test_equals_pandas_at_the_reported_edges(
    federation: Any, drive: Any, seed: int, sizes: list[int], holes: float, binning: str, smallest: int
) -> None:
    tables = sites(federation, seed, [*sizes, 60], holes)
    result, driven = woe(drive, tables, smallest, binning=binning)
    told = [name for name, reply in driven.replies[-1].items() if reply["telling"]]
    assert result["withheld_sites"] == len(tables) - len(told)
    rows = frame({name: tables[name] for name in told} or {"none": federation.table({n: [] for n in COLUMNS}, COLUMNS)})
    if result["positives"] is None or not 0 < rows["y"].mean() < 1:
        assert all(found["iv"] is None and found["note"] for found in result["features"].values())
        return
    assert (result["positives"], result["negatives"]) == (rows["y"].sum(), (1 - rows["y"]).sum())
    if smallest == 1:
        assert result["unlabelled"] == sum(map(len, tables.values())) - len(rows)
    assert list(result["features"]) == FEATURES
    for name, found in result["features"].items():
        check(rows, name, found)
        for part in [*found["bins"], *([found["missing"]] if found["missing"] else [])]:
            assert all(part[key] == 0 or part[key] >= smallest for key in ("positives", "negatives"))
    ivs = [result["features"][name]["iv"] for name in result["ranking"]]
    assert ivs == sorted(ivs, reverse=True)


def test_through_the_whole_federation(federation: Any) -> None:
    tables = sites(federation, 1, [500, 800])
    outcome = federation.run(federation.plan("statistics.woe", {"target": "y"}, tables), tables)
    for name, found in outcome["result"]["woe"]["features"].items():
        check(frame(tables), name, found)
    assert all(body["clipped"] == 0 for body in federation.releases())


def test_quantile_edges_are_near_the_quantiles(federation: Any, drive: Any) -> None:
    """Within 2 · resolution of the range; of an integer column at the quantile, or its neighbour."""
    tables = sites(federation, 2, [3000, 1500], holes=0.0)
    result, _ = woe(drive, tables, binning="quantile", bins=10, resolution=1e-4)
    rows = concatenate(list(tables.values()))
    for name, step in (("amount", 2e-4 * 1e6), ("age", 1.0)):
        edges = [part["to"] for part in result["features"][name]["bins"][:-1]]
        wanted = np.quantile(rows[name], np.arange(1, 10) / 10, method="inverted_cdf")
        assert len(edges) == 9
        assert np.abs(np.array(edges) - wanted).max() <= step * (1 + 1e-9)


# ---------------------------------------------------------------- how bins are merged


@pytest.mark.parametrize("params", [{"binning": "monotone"}, {"binning": "optimal", "monotone": True}])
def test_monotone_binning_is_monotone_and_keeps_the_smallest_share(
    federation: Any, drive: Any, params: dict[str, Any]
) -> None:
    result, _ = woe(drive, sites(federation, 3, [900, 700]), bins=5, min_share=0.1, **params)
    for name in ("amount", "age", "code"):
        bins = result["features"][name]["bins"]
        steps = np.diff([part["woe"] for part in bins])
        assert len(bins) <= 5
        assert (steps > 0).all() or (steps < 0).all()
        assert all(part["count"] >= 0.1 * sum(other["count"] for other in bins) for part in bins)
    assert len(result["features"]["amount"]["bins"]) > 2


def test_text_codes_are_merged_by_their_rate(federation: Any, drive: Any) -> None:
    random = np.random.default_rng(4)
    town = random.choice(["east", "north", "south", "west"], 4000)
    rate = pd.Series(town).map({"east": 0.5, "north": 0.1, "south": 0.5, "west": 0.1}).to_numpy()
    y = (random.random(4000) < rate).astype(float)
    table = federation.table({"town": town, "y": y}, {"town": COLUMNS["town"], "y": COLUMNS["y"]})
    result, _ = woe(drive, {"a": table}, binning="optimal", bins=2)
    assert [sorted(part["values"]) for part in result["features"]["town"]["bins"]] == [
        ["east", "south"], ["north", "west"],
    ]  # fmt: skip


# ---------------------------------------------------------------- small groups


@pytest.mark.parametrize("binning", BINNINGS)
def test_what_a_site_tells_counts_no_small_group(federation: Any, drive: Any, binning: str) -> None:
    tables = sites(federation, 5, [150, 300, 4], holes=0.02, unlabelled=0.0)
    result, driven = woe(drive, tables, 5, binning=binning)
    assert result["withheld_sites"] == 1
    sizes = build("statistics.woe", {"target": "y", "binning": binning})._sizes(tables["s0"].schema)
    for reply in driven.replies[-1].values():
        for end, size in zip(np.cumsum(sizes), sizes, strict=True):
            part = slice(end - size, end)
            told = reply["told"][part] == 1
            assert (reply["below"][:, part][:, ~told] == 0).all()
            groups = np.diff(reply["below"][:, part][:, told], axis=1, prepend=0, append=reply["labels"][:, None])
            assert ((groups == 0) | (groups >= 5)).all()
    assert not driven.replies[-1]["s2"]["labels"].any()


@pytest.mark.parametrize(("unlabelled", "parts"), [(2, 0), (10, 2), (100, 4)])
def test_rows_without_a_label_cannot_be_had_from_all_rows(
    federation: Any, drive: Any, unlabelled: int, parts: int
) -> None:
    """The counts of all rows at the same edges (a frequency table's) less the labelled ones: nobody or k rows."""
    random = np.random.default_rng(3)
    x, y = np.sort(random.uniform(0, 100, 4000)), (random.random(4000) < 0.5).astype(float)
    y[:: 4000 // unlabelled] = np.nan
    table = federation.table({"x": x, "y": y}, {"x": {"range": [0, 100]}, "y": COLUMNS["y"]})
    result, driven = woe(drive, {"a": table}, 5, binning="equal", bins=5)
    reply = driven.replies[0]["a"]
    assert (result["withheld_sites"], int(reply["telling"])) == ((1, 0) if unlabelled < 5 else (0, 1))
    cuts = np.flatnonzero(reply["told"][1:]) * 20.0 + 20
    assert len(cuts) >= parts - 1 if parts else not len(cuts)
    everyone = np.array([(x <= cut).sum() for cut in cuts], int)
    labelled = reply["below"].sum(axis=0)[1:][reply["told"][1:] == 1]
    if parts:
        gaps = np.diff(everyone - labelled, prepend=0, append=np.isnan(y).sum())
        assert ((gaps == 0) | (gaps >= 5)).all()
    else:
        assert not reply["labels"].any()
        assert not reply["below"].any()


def test_extremes_are_not_told(federation: Any, drive: Any) -> None:
    random, told = np.random.default_rng(8), []
    x, y = random.uniform(40, 60, 400), (random.random(400) < 0.4).astype(float)
    for low, high in ((1.0, 99.0), (33.0, 66.0)):
        x[0], x[1] = low, high
        table = federation.table({"x": x, "y": y}, {"x": {"range": [0, 100]}, "y": COLUMNS["y"]})
        result, driven = woe(drive, {"a": table}, 5, binning="equal", bins=50)
        bins = result["features"]["x"]["bins"]
        assert bins[0]["count"] >= 5
        assert bins[-1]["count"] >= 5
        assert result["features"]["x"]["missing"] is None
        told.append((bins, driven.replies[0]["a"]["below"].tolist()))
    assert told[0] == told[1]


def test_few_missing_cells_are_not_told_apart(federation: Any, drive: Any) -> None:
    random = np.random.default_rng(6)
    x, y = random.uniform(0, 10, 400), (random.random(400) < 0.4).astype(float)
    x[:3] = np.nan
    table = federation.table({"x": x, "y": y}, {"x": {"range": [0, 10]}, "y": COLUMNS["y"]})
    found = woe(drive, {"a": table}, 5, binning="equal", bins=4)[0]["features"]["x"]
    assert found["missing"]["count"] == 3 + (x <= found["missing"]["to"]).sum()
    assert "missing cells" in found["note"]
    assert woe(drive, {"a": table}, 1, binning="equal", bins=4)[0]["features"]["x"]["missing"]["count"] == 3


def test_a_site_cannot_be_asked_around_its_earlier_answers(federation: Any) -> None:
    """Edges sent later, by a coordinator that does not keep the protocol, cut no small group off the earlier ones."""
    x = np.arange(200) / 20
    table = federation.table({"x": x, "y": np.arange(200) % 2}, {"x": {"range": [0, 10]}, "y": COLUMNS["y"]})
    desk = type("Site", (), {"table": table, "state": {}, "min_group_size": 5, "progress": lambda *_: None})()
    asked = build("statistics.woe", {"target": "y", "binning": "quantile", "bins": 2})
    counts = {}
    for edge in (5.0, 5.2, 5.05, 9.9, 0.3, 2.0):
        task = Task(TaskId("0" * 32, 0, 0, "reply", "a"), {"edges": np.array([[edge]])}, (0,))
        reply = asked.labels(desk, task)
        if reply["told"][1]:
            counts[edge] = reply["below"][:, 1]
    assert sorted(counts) == [2.0, 5.0]
    with pytest.raises(ProtocolError):
        asked.labels(desk, Task(TaskId("0" * 32, 0, 0, "reply", "a"), {"edges": np.zeros((1, 99))}, (0,)))


def test_policies_are_kept_in_a_real_federation(federation: Any) -> None:
    tables = sites(federation, 7, [400, 600], unlabelled=0.0)
    strict = Policy.sandbox().model_copy(update={"min_group_size": 10})
    plan = federation.plan("statistics.woe", {"target": "y"}, tables, run={"min_group_size": 10})
    outcome = federation.run(plan, tables, dict.fromkeys(tables, strict))
    for name, found in outcome["result"]["woe"]["features"].items():
        check(frame(tables), name, found)
        assert all(part["positives"] == 0 or part["positives"] >= 10 for part in found["bins"])


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({"target": "age"}, "plan.bad-target"),
        ({"target": "none"}, "plan.bad-target"),
        ({"target": "y", "features": ["note"]}, "plan.bad-column"),
        ({"target": "y", "features": ["y"]}, "plan.bad-column"),
    ],
)
def test_bad_columns_are_refused(federation: Any, drive: Any, params: dict[str, Any], code: str) -> None:
    with pytest.raises(PlanError) as caught:
        woe(drive, sites(federation, 8, [20]), **params)
    assert caught.value.code == code
