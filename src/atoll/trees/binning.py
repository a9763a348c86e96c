"""Bins: what of a value the trees see, fixed once for a run and alike at all sites.

A numeric feature has edges, float32 and rising; a cell's code is 1 + the number of edges that are ≤ float32(x), and 0
where it is missing. A split between two codes is then "x < edge", which any reader of the model can apply to raw
values. A categorical feature's code is 1 + its place in the schema's code list.

Edges come from the plan, from the cohort's rows (``edges.py``), or are even over the schema's range, which
costs no round and, under differential privacy, no budget.

Source: Chen & Guestrin 2016, XGBoost (KDD), §3.2 (candidate splits by percentiles).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import PlanError, ProtocolError
from atoll.contract.program import Cohort, TableView
from atoll.contract.rounds import Steps
from atoll.contract.schema import TableSchema
from atoll.models.linear import feature_bounds
from atoll.trees.edges import Edges

MOST_EDGES = 253
"""A code is a byte: missing, and at most 254 bins."""
FURTHEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Bins:
    """edges: by feature, float32; none of a categorical one. codes: how many a categorical feature has; 0 of others.
    offsets: where a feature's cells begin among all features', int64 [num_features + 1]."""

    features: tuple[str, ...]
    edges: tuple[NDArray[np.float32], ...]
    codes: NDArray[np.int64]

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """See the class."""
        sizes = [1 + (int(n) or len(e) + 1) for e, n in zip(self.edges, self.codes, strict=True)]
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @cached_property
    def thresholds(self) -> tuple[NDArray[np.float64], ...]:
        """By feature, where its values may be parted: missing ones from all others, and at its edges."""
        return tuple(np.concatenate([[-FURTHEST], edges.astype(np.float64)]) for edges in self.edges)

    @property
    def categorical(self) -> NDArray[np.bool_]:
        """Which features are, [num_features]."""
        return self.codes > 0

    def coded(self, table: TableView) -> NDArray[np.uint8]:
        """All rows' codes, [num_rows, num_features]."""
        from atoll.models import tree_kernels

        found = np.empty((len(table), len(self.features)), np.uint8)
        for i, (name, edges) in enumerate(zip(self.features, self.edges, strict=True)):
            if self.codes[i]:
                found[:, i] = table.codes(name) + 1
            else:
                found[:, i] = tree_kernels.to_codes(np.asarray(table[name], np.float64), edges)
        return found

    def told(self) -> NDArray[np.float64]:
        """As numbers: of each feature how many edges, then all edges."""
        sizes = [float(len(edges)) for edges in self.edges]
        return np.concatenate([np.array(sizes), *(edges.astype(np.float64) for edges in self.edges)])

    @staticmethod
    def read(
        numbers: NDArray[np.float64], schema: TableSchema, features: Sequence[str], categorical: Sequence[str]
    ) -> Bins:
        """Inverse of :meth:`told`, at a site; raises ProtocolError for anything but rising float32 edges."""
        size = len(features)
        counts = numbers[:size]
        sound = len(counts) == size and np.isin(counts, np.arange(MOST_EDGES + 1)).all()
        if not sound or len(numbers) != size + int(counts.sum()):
            raise unsound()
        edges = np.split(numbers[size:], np.cumsum(counts.astype(np.int64))[:-1])
        for i, found in enumerate(edges):
            with np.errstate(over="ignore"):
                exact = np.array_equal(found.astype(np.float32).astype(np.float64), found)
            rising = (np.diff(found) > 0).all() and (np.abs(found) <= FURTHEST).all()
            if not (exact and rising) or (features[i] in categorical and len(found)):
                raise unsound()
        return Bins(
            tuple(features), tuple(found.astype(np.float32) for found in edges), sizes_of(schema, features, categorical)
        )


def sizes_of(schema: TableSchema, features: Sequence[str], categorical: Sequence[str]) -> NDArray[np.int64]:
    """How many codes each feature has, 0 of those that are numbers."""
    return np.array([len(schema.columns[n].values or ()) if n in categorical else 0 for n in features], np.int64)


def split_codes(
    bins: Bins, feature: NDArray[np.int64], threshold: NDArray[np.float64]
) -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
    """(code, mask) of nodes as kernels take them, from their words, [num_nodes] each; feature: −1 at a leaf, whose
    threshold is not looked at. Raises ProtocolError where a threshold is no edge, or a mask names no category."""
    code, mask = np.zeros(len(feature), np.int32), np.zeros(len(feature), np.uint64)
    for f in sorted(set(feature[feature >= 0].tolist())):
        here = feature == f
        told = threshold[here]
        if bins.codes[f]:
            if not ((told >= 1) & (told < 2.0 ** bins.codes[f]) & (told == np.floor(told))).all():
                raise unsound()
            mask[here] = told.astype(np.uint64)
            continue
        edges = bins.thresholds[f]
        places = np.searchsorted(edges, told)
        if not np.array_equal(edges[np.minimum(places, len(edges) - 1)], told):
            raise unsound()
        code[here] = places
    return code, mask


def even_edges(schema: TableSchema, name: str, max_bins: int) -> NDArray[np.float32]:
    """Edges that part the schema's range of a column evenly; of few whole or listed values, between all of them."""
    low, high = feature_bounds(schema, name)
    column = schema.columns[name]
    if column.values is not None:
        points = np.unique(np.array(column.values, np.float64))[1:]
    elif column.dtype == "integer" and high - low < max_bins:
        points = np.arange(np.ceil(low) + 1, np.floor(high) + 1)
    else:
        points = np.empty(0)
    if len(points) >= max_bins or not len(points):
        points = low + (high - low) * np.arange(1, max_bins) / max_bins
    return tidy(points, low)


def quantile_edges(cohort: Cohort, names: Sequence[str], max_bins: int) -> Steps:
    """Rounds of ``trees.edges``; returns edges by feature, float32: at most max_bins − 1 of each."""
    if not names:
        return {}
    asked = Edges(Edges.Params(columns=tuple(names), max_bins=max_bins))
    found = yield from asked.coordinate(cohort)
    return {name: tidy(found[name], feature_bounds(cohort.schema, name)[0]) for name in names}


def tidy(values: NDArray[np.float64], low: float) -> NDArray[np.float32]:
    """Rising float32 edges, without such that no value is below."""
    found = np.unique(np.clip(values, -FURTHEST, FURTHEST).astype(np.float32))
    return np.asarray(found[found > np.float32(low)] + np.float32(0), np.float32)


def check_given(given: Mapping[str, Sequence[float]], features: Sequence[str], categorical: Sequence[str]) -> None:
    """Raise PlanError where a plan's own edges are not rising, or of no numeric feature."""
    for name, edges in given.items():
        found: NDArray[Any] = np.asarray(edges, np.float64)
        if name not in features or name in categorical:
            raise PlanError("plan.bad-column", f"{name!r} is no numeric feature of the trees", field=f"edges.{name}",
                            remedy="name a feature that is split by thresholds")  # fmt: skip
        with np.errstate(over="ignore"):
            rounded = found.astype(np.float32)
        if len(found) > MOST_EDGES or not np.isfinite(rounded).all() or not (np.diff(rounded) > 0).all():
            raise PlanError("plan.bad-edges", f"the edges of {name!r} do not rise, or are more than {MOST_EDGES}",
                            field=f"edges.{name}", remedy="give rising numbers that differ as float32")  # fmt: skip


def unsound() -> ProtocolError:
    return ProtocolError(
        "trees.bad-record", "what a site was told of the trees so far does not make trees", field="records",
        remedy="the coordinator does not keep the protocol, or has another version: compare versions",
    )  # fmt: skip
