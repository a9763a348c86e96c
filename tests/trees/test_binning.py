"""Edges near the cohort's quantiles, codes, and what a plan or a coordinator may say of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from atoll.contract.errors import PlanError, ProtocolError
from atoll.contract.program import Cohort, build
from atoll.contract.rounds import Round, Task, TaskId
from atoll.contract.schema import Column, TableSchema
from atoll.models.tree_splits import threshold_of
from atoll.trees.binning import Bins, check_given, even_edges, split_codes, tidy
from atoll.trees.edges import CELLS, Edges

COLUMNS: dict[str, dict[str, Any]] = {
    "real": {"range": [-10, 10]},
    "tail": {"range": [0, 1e8]},
    "zeros": {"range": [-1e6, 1e6]},
    "few": {"range": [0, 1]},
    "whole": {"dtype": "integer", "range": [0, 120]},
    "listed": {"values": [1, 2, 5, 10]},
    "gone": {"range": [0, 1]},
}


def rows(seed: int, n: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "real": random.normal(0, 1, n).clip(-10, 10),
        "tail": np.exp(random.normal(3, 2, n)).clip(0, 1e8),
        "zeros": np.where(random.random(n) < 0.6, 0.0, random.normal(0, 2e5, n)).clip(-1e6, 1e6),
        "few": random.choice([0.0, 0.1, 0.25, 1.0], n),
        "whole": random.integers(0, 121, n).astype(float),
        "listed": random.choice([1.0, 2, 5, 10], n),
        "gone": np.full(n, np.nan),
    }


def found(drive: Any, tables: Mapping[str, Any], columns: tuple[str, ...], max_bins: int) -> Any:
    schema = next(iter(tables.values())).schema
    asked = build("trees.edges", {"columns": list(columns), "max_bins": max_bins})
    return drive(asked.coordinate(Cohort(tuple(tables), schema)), tables)


@pytest.mark.parametrize("max_bins", [8, 64, 254])
def test_bins_hold_about_as_many_rows_as_each_other(federation: Any, drive: Any, max_bins: int) -> None:
    tables = {f"s{i}": federation.table(rows(i, n), COLUMNS) for i, n in enumerate((4000, 1000, 3000))}
    driven = found(drive, tables, tuple(COLUMNS), max_bins)
    for name, edges in driven.result.items():
        assert len(edges) < max_bins
        assert (np.diff(edges) > 0).all()
        values = np.concatenate([np.asarray(t[name]) for t in tables.values()])
        values = values[~np.isnan(values)]
        distinct, each = np.unique(values, return_counts=True)
        if len(distinct) <= max_bins:
            separated = np.searchsorted(edges, distinct, "right")
            assert len(np.unique(separated)) == len(distinct), f"{name}: every value has its own bin"
            continue
        held = np.bincount(np.searchsorted(edges, values, "right"), minlength=len(edges) + 1)
        assert held.max() <= max(1.6 * len(values) / max_bins + 1, each.max() + len(values) / max_bins), name
    assert len(driven.result["gone"]) == 0
    assert len(driven.rounds) <= 6


def test_edges_do_not_depend_on_who_has_which_rows(federation: Any, drive: Any) -> None:
    parts = [rows(i, n) for i, n in enumerate((300, 50, 0, 200))]
    apart = {f"s{i}": federation.table(part, COLUMNS) for i, part in enumerate(parts)}
    whole = {"all": federation.table({n: np.concatenate([p[n] for p in parts]) for n in COLUMNS}, COLUMNS)}
    one, other = (found(drive, tables, tuple(COLUMNS), 32).result for tables in (whole, apart))
    for name in COLUMNS:
        assert one[name].tobytes() == other[name].tobytes()


@pytest.mark.parametrize(
    ("name", "array"),
    [("level", np.array(6)), ("level", np.array(0)), ("level", np.array([1])), ("places", np.array([-1])),
     ("places", np.array([CELLS])), ("places", np.array([1.0])), ("of", np.array([2])), ("of", np.array([1, 0]))],
)  # fmt: skip
def test_a_site_refuses_parts_that_there_are_not(federation: Any, name: str, array: Any) -> None:
    table = federation.table(rows(1, 50), COLUMNS)
    made = Edges(Edges.Params(columns=("real",)))
    sent = {"level": np.array(1), "places": np.array([5]), "of": np.array([1])}

    class Site:
        min_group_size = 1

    Site.table = table  # type: ignore[attr-defined]
    ask = lambda arrays: made.refined(Site(), Task(TaskId("", 0, 0, "", ""), arrays, ()))  # type: ignore[arg-type]  # noqa: E731
    ask(sent)
    with pytest.raises(ProtocolError):
        ask({**sent, name: array})
    with pytest.raises(ProtocolError):
        ask({**sent, "places": np.array([5, 5]), "of": np.array([2])})


# ---------------------------------------------------------------- codes


SCHEMA = TableSchema(
    name="t",
    columns={
        "x": Column(range=(-100, 100)),
        "n": Column(dtype="integer", range=(0, 5)),
        "k": Column(dtype="text", values=("p", "q", "r")),
    },
)
numbers = st.floats(-100, 100, width=32)


@given(arrays.arrays(np.float32, st.integers(0, 30), elements=numbers, unique=True), st.integers(0, 30))
def test_a_split_code_is_read_back_from_its_threshold(edges: Any, code: int) -> None:
    bins = Bins(("x",), (np.sort(edges),), np.zeros(1, np.int64))
    code = min(code, len(edges))
    told = threshold_of(bins.edges[0], code)
    codes, masks = split_codes(bins, np.array([0, -1]), np.array([told, 0.5]))
    assert codes.tolist() == [code, 0]
    assert masks.tolist() == [0, 0]


@given(arrays.arrays(np.float64, st.integers(0, 40), elements=st.floats(-1e300, 1e300)))
def test_tidied_edges_rise_as_float32(values: Any) -> None:
    edges = tidy(values, -5.0)
    assert (np.diff(edges) > 0).all()
    assert np.isfinite(edges).all()
    assert (edges > -5).all()


def test_bins_are_read_back_as_they_were_told() -> None:
    bins = Bins(("x", "k"), (np.array([0.5, 1.5], np.float32), np.empty(0, np.float32)), np.array([0, 3]))
    read = Bins.read(bins.told(), SCHEMA, ("x", "k"), ("k",))
    assert [e.tolist() for e in read.edges] == [[0.5, 1.5], []]
    assert read.offsets.tolist() == [0, 4, 8]
    assert read.categorical.tolist() == [False, True]


def test_even_edges_part_the_range_or_the_values() -> None:
    assert even_edges(SCHEMA, "n", 16).tolist() == [1, 2, 3, 4, 5]
    assert even_edges(SCHEMA, "n", 2).tolist() == [2.5]
    assert even_edges(SCHEMA, "x", 4).tolist() == [-50, 0, 50]


@pytest.mark.parametrize("given_edges", [[1.0, 1.0], [2.0, 1.0], [0.0, 1e-60], [1e39], list(range(300))])
def test_given_edges_must_rise_as_float32(given_edges: list[float]) -> None:
    with pytest.raises(PlanError) as caught:
        check_given({"x": given_edges}, ("x",), ())
    assert caught.value.code == "plan.bad-edges"


def test_rounds_are_few_where_rows_are_spread_out(federation: Any, drive: Any) -> None:
    tables = {"s": federation.table({**rows(1, 500), "real": np.linspace(-10, 10, 500)}, COLUMNS)}
    driven = found(drive, tables, ("real", "whole", "listed"), 16)
    assert [item.name for item in driven.rounds if isinstance(item, Round)] == ["cells"]
