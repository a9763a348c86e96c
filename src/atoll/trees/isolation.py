"""Isolation forest: rows that few random splits part from the others are anomalies. One Sum makes it.

The trees are drawn, not grown: from the plan's seed, every node of every tree gets a random feature and a threshold
drawn evenly from what is left of the feature's range there. Every site draws the same trees and counts its rows in
their leaves, which sum to the rows of every node. Where the n rows of a node come to one or fewer of a *sample* of ψ of
all N, n ψ / N ≤ 1, the tree ends; a leaf's path length is its depth plus c(n ψ / N), and a row's score 2^(−E h / c(ψ)),
where c(m) is the mean depth of an unsuccessful search among m. That is, in expectation, the forest of Liu et al., with
two differences: the sample is not drawn but counted, so that it has no error of its own; and a threshold comes from the
box of the splits above, not from the sample's range in it, so that the trees tell nothing of where single rows lie.
Some splits part nothing, so paths are longer and scores lower than theirs (a usual row has about 0.37): compare scores
with each other, or with the threshold, and not with 0.5.

The range at the root is a feature's 1% to 99% quantile and a quarter more on either side, within the schema's: what is
far out lies beyond all thresholds, on the side of few. (*binning* even: the schema's ranges, without a round.)

Needs no label. Where *target* names one (0 and 1), it is used to evaluate the scores on held-out rows, and for nothing
else. *contamination* asks, by one more Sum, for the score that this share of the training rows exceeds.

Parties: sites and coordinator. Messages: rounds of ``statistics.quantiles``; "leaves", a Sum of the rows in each leaf
of each tree; "scores", a Sum of the histogram of training rows' scores.
The coordinator learns, of the cohort's total: the quantiles, rows in each leaf, also of few rows, and the scores'
histogram. Sites learn the ranges and the model. Of a leaf with fewer rows than the plan's smallest group the model
tells no more than that: it counts as empty. Counts tell of single people where they are seen alone, so under ``plain``
a site answers only if its policy's smallest group is 1.
Threat model: as the plan's protection. A coordinator that does not keep the protocol may choose ranges and seed of one
forest a run, and so learn counts of boxes of rows, and then of one model's scores: a site refuses another, and a round
that is begun anew in other words (``budget.question``). Dropout: the survivors' counts.
Cost: 3 to 5 rounds; 8 · trees · 2^max_depth bytes a site.
Noise: a row is in one leaf of each tree and in one cell of the scores; ranges are the schema's.

Sources: Liu, Ting & Zhou 2008, Isolation Forest (ICDM), eq. 1 and 2; Tan, Ting & Liu 2011, Fast Anomaly Detection for
Streaming Data (IJCAI; half-space trees: structure drawn before data are seen).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.errors import PlanError, ProtocolError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, count, not_taken
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.models.linear import feature_bounds
from atoll.models.trees import COVER, FEATURE, FURTHEST, LEAF, THRESHOLD, UNUSED, Trees
from atoll.statistics.noise import only_summed, smallest
from atoll.statistics.quantiles import Quantiles
from atoll.trees.features import Columns, feature_columns, unfitted

Floats = NDArray[np.float64]
SCORES = 1000
"""Cells of the histogram of scores, which lie in 0 … 1."""
OUTER = (0.01, 0.99)
SOME = 16_384
"""Rows that are looked at together."""
EULER = 0.5772156649015329


class IsolationParams(ProgramParams):
    """features: default: all other numeric features, and those with code lists. target: a label to evaluate by. sample:
    ψ. contamination: share of rows that are to exceed the threshold; none is looked for by default. binning: where
    ranges come from."""

    features: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    target: str = ""
    trees: int = Field(default=100, ge=1, le=1000)
    max_depth: int = Field(default=8, ge=1, le=12)
    sample: int = Field(default=256, ge=2, le=1_000_000)
    contamination: float | None = Field(default=None, gt=0, lt=1)
    binning: Literal["quantiles", "even"] | None = None

    def columns(self, schema: TableSchema) -> Columns:
        """(features, those that are categorical) as the model has them."""
        return feature_columns(schema, (self.target,), self.features, self.categorical)


@program(
    "trees.isolation", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"}, calls={"statistics.quantiles"}
)
class Isolation:
    """Isolation forest: anomaly scores without labels, by one sum of counts."""

    Params = IsolationParams

    def __init__(self, params: IsolationParams) -> None:
        self.params = params
        if not params.target:  # nothing to evaluate by
            self.model = None  # type: ignore[assignment, method-assign]

    def model(self, schema: TableSchema) -> Trees:
        """The model it makes, before it is; what evaluation is then asked about."""
        return self._unfitted(schema)

    def _unfitted(self, schema: TableSchema) -> Trees:
        return unfitted(self.params, schema, "isolation")

    # ---------------------------------------------------------------- at the coordinator

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"model", "rows": N, "threshold": the score that *contamination* of the rows exceed, None if not
        asked, "iterations": trees, "history": []}."""
        p, schema, rows = self.params, cohort.schema, cohort.schema.max_rows
        model = self._unfitted(schema)
        ranges = yield from self._ranges(cohort, p.binning or ("quantiles" if cohort.exact else "even"))
        seed = np.array(cohort.seed, np.int64)
        fields = {"rows": count((p.trees, 2**p.max_depth), bound=rows)}
        total = yield Round("leaves", Sum(), fields, {"seed": seed, "ranges": ranges})
        words = drawn(model, ranges, int(seed))
        counts = counted(total["rows"])
        known = max(float(counts[:, 0].mean()), 1.0)
        words = pruned(words, counts, known, p.sample, smallest(cohort))
        fitted = model.with_weights(np.append(0.0, words))
        threshold = None
        if p.contamination is not None:
            cells = count(SCORES, bound=rows)
            scores = yield Round("scores", Sum(), {"scores": cells}, {"weights": fitted.weights})
            threshold = _exceeded(scores["scores"], p.contamination, smallest(cohort))
        told = {"rows": round(known), "threshold": threshold}
        return {"model": fitted, **told, "iterations": p.trees, "history": []}

    def _ranges(self, cohort: Cohort, way: str) -> Steps:
        """Of every feature at the roots, [num_features, 2]; of a categorical one 0, 0."""
        features, categorical = self.params.columns(cohort.schema)
        numeric = [name for name in features if name not in categorical]
        found = {name: feature_bounds(cohort.schema, name) for name in numeric}
        if way == "quantiles" and numeric:
            asked = Quantiles(Quantiles.Params(columns=tuple(numeric), probabilities=OUTER, error=1e-4))
            told = (yield from asked.coordinate(cohort))["quantiles"]["columns"]
            for name in numeric:
                low, high = told[name]["values"]
                if low is not None and high is not None and high > low:
                    margin, (least, most) = (high - low) / 4, found[name]
                    found[name] = max(low - margin, least), min(high + margin, most)
        return np.array([found.get(name, (0.0, 0.0)) for name in features])

    # ---------------------------------------------------------------- at the site

    def _leaves_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        return {"rows": touches(self.params.trees)}

    def _scores_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        return {"scores": touches()}

    @handler("leaves", record=_leaves_per_record)
    def leaves(self, site: SiteView, task: Task) -> Reply:
        """At the site: training rows in each leaf of each tree."""
        from atoll.models import tree_kernels

        only_summed(site)
        model, p = self._unfitted(site.table.schema), self.params
        ranges = task.take("ranges", (len(model.settings.features), 2))
        seed = task.arrays.get("seed")
        if seed is None or seed.dtype != np.int64 or seed.shape or int(seed) < 0:
            raise not_taken("seed")
        _once(site, "drawn", seed, ranges)
        trees = model.with_weights(np.append(0.0, drawn(model, ranges, int(seed))))
        nodes, x, size = trees.nodes, trees.inputs(site.table), 2**p.max_depth
        found = np.zeros(p.trees * size, np.int64)
        for first in range(0, len(x), SOME):
            site.progress(first, len(x))
            leaf = tree_kernels.leaf_of(
                x[first : first + SOME], nodes.feature, nodes.threshold, nodes.mask, nodes.default_left
            )  # fmt: skip
            places = _below(leaf, p.max_depth) + size * np.arange(p.trees)
            found += np.bincount(places.ravel(), minlength=len(found))
        return {"rows": found.reshape(p.trees, size)}

    @handler("scores", record=_scores_per_record)
    def scores(self, site: SiteView, task: Task) -> Reply:
        """At the site: histogram of training rows' scores."""
        only_summed(site)
        model = self._unfitted(site.table.schema)
        weights = task.take("weights", model.weights.shape)
        _once(site, "scored", weights)
        try:
            scores = model.with_weights(weights).predict(site.table)
        except PlanError:
            raise not_taken("weights") from None
        places = np.clip((scores * SCORES).astype(np.int64), 0, SCORES - 1)
        return {"scores": np.bincount(places, minlength=SCORES)}


# -------------------------------------------------------------------- trees


def average_path(rows: Floats) -> Floats:
    """c(m): the mean depth at which a search among m ends without success; 0 of one or fewer, straight from there to
    c(2) = 1."""
    m = np.maximum(rows, 2.0)
    found = 2 * (np.log(m - 1) + EULER) - 2 * (m - 1) / m
    return np.where(rows > 2, found, np.clip(rows - 1, 0, 1))


def drawn(model: Trees, ranges: Floats, seed: int) -> Floats:
    """The words of complete random trees, [num_trees, num_nodes, 5]: a function of the seed, the same everywhere. A
    node that no feature can split is a leaf. ranges: [num_features, 2], looked at as far as they are the schema's."""
    spec, schema = model.settings, model.schema
    bounds = [(0.0, 0.0) if n in spec.categorical else feature_bounds(schema, n) for n in spec.features]
    least, most = np.clip(np.array(bounds).T, -FURTHEST, FURTHEST)
    ranges = np.clip(np.sort(ranges, axis=1), least[:, None], most[:, None])
    codes = [len(schema.columns[n].values or ()) if n in spec.categorical else 0 for n in spec.features]
    points = [
        None if c else _points(schema, n, *r) for n, c, r in zip(spec.features, codes, ranges.tolist(), strict=True)
    ]
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 14))))
    words = np.zeros((spec.num_trees, spec.num_nodes, 5))
    words[:, :, FEATURE] = UNUSED
    words[:, 0, FEATURE] = LEAF
    low, high = ranges.T.copy()
    for f, known in enumerate(points):
        if known is not None:
            low[f], high[f] = 0, max(len(known) - 1, 0)
    low, high = (np.tile(side, (spec.num_trees, 1, 1)) for side in (low, high))
    listed = np.array([known is not None for known in points])
    for depth in range(spec.max_depth):
        width = 2**depth
        here = words[:, width - 1 : 2 * width - 1]
        mask, u, default = _draws(random, codes, (spec.num_trees, width))
        at = np.where(listed, low + 1 + np.floor(u[1] * (high - low)), low + u[1] * (high - low))
        at = np.where(listed, at, at.astype(np.float32))
        usable = np.where(np.array(codes) > 1, True, (at > low) & (at <= high))
        chosen = np.where(usable, u[0], -1.0).argmax(axis=2)
        splits = usable.any(axis=2) & (here[:, :, FEATURE] == LEAF)
        trees, nodes = np.nonzero(splits)
        f = chosen[trees, nodes]
        place = at[trees, nodes, f]
        told = np.array([
            mask[t, n, c] if codes[c] else points[c][int(x)] if listed[c] else x
            for t, n, c, x in zip(trees.tolist(), nodes.tolist(), f.tolist(), place.tolist(), strict=True)
        ]).reshape(-1)  # fmt: skip
        here[trees, nodes, :3] = np.column_stack([f, told, default[trees, nodes]])
        low, high = (np.repeat(side, 2, axis=1) for side in (low, high))
        high[trees, 2 * nodes, f] = np.where(listed[f], place - 1, place)
        low[trees, 2 * nodes + 1, f] = place
        below = words[:, 2 * width - 1 : 4 * width - 1, FEATURE]
        below[trees, 2 * nodes], below[trees, 2 * nodes + 1] = LEAF, LEAF
    return words


def _draws(random: np.random.Generator, codes: list[int], size: tuple[int, int]) -> tuple[Any, Floats, Floats]:
    """(sets of codes [*size, num_features], two even numbers each [2, *size, num_features], default sides [*size])."""
    most = np.array([max(2**c - 1, 2) for c in codes], np.int64)
    mask = random.integers(1, most, (*size, len(codes)))
    return mask, random.random((2, *size, len(codes))), random.integers(0, 2, size).astype(np.float64)


def _points(schema: TableSchema, name: str, low: float, high: float) -> Floats | None:
    """Values between which the thresholds of a column of whole or listed numbers lie, as float32; None of others."""
    column = schema.columns[name]
    if column.values is not None:
        found = np.unique(np.array(column.values, np.float64))
    elif column.dtype == "integer" and high - low < 10_000:
        found = np.arange(math.ceil(low), math.floor(high) + 1, dtype=np.float64)
    else:
        return None
    return np.unique(found[(found >= low) & (found <= high)].astype(np.float32)).astype(np.float64)


def _below(leaf: NDArray[np.int32], max_depth: int) -> NDArray[np.int64]:
    """The first place of the last level below each leaf, counted from 0."""
    depth = np.floor(np.log2(leaf + 1)).astype(np.int64)
    return (leaf + 1 - 2**depth) << (max_depth - depth)


def counted(leaves: Array) -> Floats:
    """Rows of every node, [num_trees, num_nodes], from those of the last level, [num_trees, 2^max_depth]."""
    levels = [np.asarray(leaves, np.float64)]
    while levels[0].shape[1] > 1:
        levels.insert(0, levels[0].reshape(len(leaves), -1, 2).sum(axis=2))
    return np.maximum(np.concatenate(levels, axis=1), 0)


def pruned(words: Floats, counts: Floats, rows: float, sample: int, fewest: int) -> Floats:
    """Drawn trees, ended where too few rows are left, with their leaves' values. counts: [num_trees, num_nodes]. Fewer
    than *fewest* rows count as none."""
    size = min(float(sample), max(rows, 2.0))
    told = np.where(counts >= fewest, counts, 0.0)
    expected = told * size / rows
    found = words.copy()
    num_trees, num_nodes, _ = words.shape
    unit = num_trees * float(average_path(np.array(size)))
    for node in range(num_nodes):
        ends = (found[:, node, FEATURE] >= 0) & (expected[:, node] <= 1)
        found[ends, node, :4] = LEAF, 0, 0, 0
        if 2 * node + 2 < num_nodes:
            gone = found[:, node, FEATURE] < 0
            for child in (2 * node + 1, 2 * node + 2):
                found[gone, child] = UNUSED, 0, 0, 0, 0
        leaf = found[:, node, FEATURE] == LEAF
        depth = math.floor(math.log2(node + 1))
        path = depth + average_path(expected[leaf, node])
        found[leaf, node, THRESHOLD] = (path / unit).astype(np.float32)
        found[leaf, node, COVER] = told[leaf, node]
    for node in reversed(range(num_nodes // 2)):  # of what is told below: a difference would tell of small leaves
        splits = found[:, node, FEATURE] >= 0
        found[splits, node, COVER] = found[splits, 2 * node + 1, COVER] + found[splits, 2 * node + 2, COVER]
    return found


def _exceeded(scores: Array, share: float, fewest: int) -> float | None:
    """The score that a share of the rows reach, at a cell's edge; None where these are too few to tell."""
    above = np.cumsum(np.maximum(np.asarray(scores, np.float64), 0)[::-1])[::-1]
    wanted = share * above[0]
    if above[0] < 1 or wanted < fewest:
        return None
    return float(np.flatnonzero(above >= wanted)[-1]) / SCORES


def _once(site: SiteView, what: str, *arrays: Array) -> None:
    """Raise ProtocolError where the site was asked of another forest in this run."""
    parts = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)  # of known shapes
    digest = np.frombuffer(hashlib.sha256(parts).digest(), np.uint8)
    if not np.array_equal(site.state.setdefault(what, digest), digest):
        raise ProtocolError(
            "trees.other-forest", "a site counts in one isolation forest in a run", field="weights",
            remedy="the coordinator does not keep the plan: do not go on with it",
        )  # fmt: skip
