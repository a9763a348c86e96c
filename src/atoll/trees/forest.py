"""Random forests whose only communication is sums of (label, weight, rows) histograms.

Every tree is grown on a bootstrap of all sites' rows: each site counts each of its rows Poisson(1) times (at most
MOST_TIMES) in each tree, which is, together, the bootstrap of the pooled rows but for the size of the sample (Oza &
Russell 2001). A node looks at *max_features* features, drawn from the plan's seed, and at all others only where none of
those splits it. A split is the one that reduces the squared error most; of a label of 0 and 1 that is Gini's. A leaf is
the mean of its rows' labels, and the forest the mean of its trees. With K > 2 classes each "tree" is K trees, one for
each class against the others, on the same bootstrap, and the K means are scaled to sum to 1.

Trees do not need each other, so *batch* of them grow in the same rounds: a forest of T trees takes T / batch · depth
rounds at most.

Parties: sites and coordinator. Messages: rounds of ``trees.edges`` for the bins' edges; "level", a Sum of the
histograms of open nodes, of all trees of the batch; below the root only the smaller child of each split is asked, its
sibling is parent less child. With every round sites are sent what the trees became since the last (see ``replica.py``).

What each party learns: as of ``trees.boosted``. The coordinator learns the cohort's edges and histograms, sites the
edges and the model; leaves hold at least ``min_rows`` rows and the plan's smallest group; a site answers only where its
own histograms are not seen alone. How often a row counts is drawn from a secret of the site: were it known, every tree
would be another equation about the same rows' labels, and enough trees would tell them.
With ``bootstrap: false`` all rows count once, and the forest is, to the bit, that of the pooled rows.
Threat model, dropout: as of ``trees.boosted``.
Cost: for a batch and level, half of the open nodes · cells · 24 bytes a site, cells = features · bins.
Noise (``Cohort.exact`` is False): every row counts once, trees are drawn from the plan's seed at even edges, and "noisy
leaves" asks the sums of their leaves, a batch a round: a row is in one leaf of each tree. The fewer trees, the less
noise is in each; a leaf of few rows is drawn to the mean of all.

Sources: Breiman 2001, Random Forests; Oza & Russell 2001, Online Bagging and Boosting, §2 (Poisson bootstrap);
Jagannathan, Pillaipakkamnatt & Wright 2009, A Practical Differentially Private Random Decision Tree Classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Checkpoint, Metrics, Reply, Round, Steps, Sum, Task, count, real
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.models.model import Goal
from atoll.models.trees import COVER, FEATURE, LEAF, THRESHOLD, Trees
from atoll.statistics.noise import coarse, only_summed
from atoll.trees.binning import Bins, sizes_of
from atoll.trees.boosted import asked_nodes
from atoll.trees.bootstrap import MOST_TIMES, Bootstrapped, Means, once, poisson_times
from atoll.trees.features import edges_of, feature_columns, unfitted
from atoll.trees.following import Kept
from atoll.trees.grown import Grown, Shape
from atoll.trees.growth import WORDS, Batch, Growing, drawn
from atoll.trees.objective import Floats, Ints
from atoll.trees.replica import Replica, received
from atoll.trees.rounds import MOST_HELD

if TYPE_CHECKING:  # numba takes long to load
    from atoll.models.tree_splits import Splits

LINKS = {"binary": "probability", "classes": "shares", "regression": "identity"}
PRIOR = 10.0
"""Under noise a leaf's mean is as if so many rows of the mean of all were in it, too."""


class ForestParams(ProgramParams):
    """features: default: all other numeric features, and those with code lists. trees: of the forest. max_features: so
    many are looked at in a node; by default √features for classes, a third of them for values. min_rows: fewest rows
    of a leaf. bootstrap: false: every row counts once in each tree. max_bins: of a feature, beside missing. edges: of
    some features, in place of quantiles. batch: trees that grow at the same time. max_cells: most cells in one
    message."""

    target: str
    features: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    trees: int = Field(default=100, ge=1, le=2000)
    max_depth: int = Field(default=8, ge=1, le=12)
    max_features: int | None = Field(default=None, ge=1)
    min_rows: int = Field(default=1, ge=1)
    bootstrap: bool = True
    max_bins: int = Field(default=64, ge=2, le=254)
    edges: Mapping[str, tuple[float, ...]] = Field(default_factory=dict)
    batch: int = Field(default=20, ge=1)
    max_cells: int = Field(default=1 << 20, ge=1)

    def columns(self, schema: TableSchema) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(features, those that are categorical) as the model has them."""
        return feature_columns(schema, (self.target,), self.features, self.categorical)

    @property
    def batches(self) -> int:
        """How often trees are grown at the same time."""
        return -(-self.trees // self.batch)

    @property
    def at_once(self) -> int:
        """How many, in every batch; of the last, some may be too many."""
        return -(-self.trees // self.batches)


@program("trees.forest", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"}, calls={"trees.edges"})
class Forest:
    """A random forest of all sites' rows, for classes or values, by sums of histograms."""

    Params = ForestParams

    def __init__(self, params: ForestParams) -> None:
        self.params, self._kept = params, Kept(Bootstrapped)
        self._shape: tuple[TableSchema, Shape] | None = None

    def model(self, schema: TableSchema) -> Trees:
        """The model it fits, before any fitting; what evaluation is then asked about."""
        return unfitted(self.params, schema, LINKS[Goal.of(schema, (self.params.target,)).task])

    def shape(self, schema: TableSchema) -> Shape:
        """What the plan says of the trees."""
        if self._shape is None or self._shape[0] is not schema:
            p, means = self.params, Means.of(self.params.target, schema, self.params.at_once)
            self._shape = (schema, Shape(schema, *p.columns(schema), means, p.batches, p.max_depth))
        return self._shape[1]

    def _means(self, schema: TableSchema) -> Means:
        return Means.of(self.params.target, schema, self.params.at_once)

    # ---------------------------------------------------------------- at the coordinator

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"model", "iterations": trees grown, "history": []}."""
        p, schema = self.params, cohort.schema
        model, shape, replica = self.model(schema), self.shape(schema), Replica(cohort.sites)
        grown = Grown(shape)
        self._check(shape)
        if start is None:
            columns = (shape.features, shape.categorical)
            edges = yield from edges_of(cohort, columns, p.edges, p.max_bins, even=not cohort.exact)
            bins = Bins(shape.features, edges, sizes_of(schema, shape.features, shape.categorical))
            _tell(replica, grown, np.concatenate([grown.base, bins.told()]))
        else:
            replica.restore(start)
            for record in replica.log.records:
                grown.take(record)
        while len(grown.batches) < p.batches:
            yield from (self._best if cohort.exact else self._drawn)(cohort, replica, grown)
            yield Metrics(len(grown.batches), {"trees": float(min(len(grown.batches) * p.at_once, p.trees))})
            yield Checkpoint(replica.arrays())
        return {"model": model.with_weights(self._weights(model, grown)), "iterations": p.trees, "history": []}

    def _check(self, shape: Shape) -> None:
        """Raise PlanError for what would be too large, or cannot be."""
        p = self.params
        sizes = sizes_of(shape.schema, shape.features, shape.categorical)
        cells = int(np.where(sizes > 0, 1 + sizes, 1 + p.max_bins).sum())
        held = shape.objective.outputs * 2 ** (p.max_depth - 1) * cells * 24
        if cells > p.max_cells or held > MOST_HELD:
            raise PlanError("trees.too-many-cells", f"a level's histograms take up to {held >> 20} MiB, and "
                            f"{MOST_HELD >> 20} are the most", field="params.batch",
                            remedy="use a smaller batch or max_depth, fewer features or bins")  # fmt: skip

    def _best(self, cohort: Cohort, replica: Replica, grown: Grown) -> Steps:
        """The rounds of one batch of trees with the best splits."""
        from atoll.models.tree_splits import Rules

        p, means, rows = self.params, self._means(cohort.schema), cohort.schema.max_rows
        rules = Rules(0.0, 0.0, 0.0, max(p.min_rows, cohort.min_group_size), means.gradient.unit, 1.0)
        batch = Batch(means.outputs, p.max_depth, grown.bins)
        looks = _Looks(grown.bins, rules, self._max_features(cohort.schema), cohort.seed, len(grown.batches))
        growing = Growing(batch, rules, 1 / p.trees, search=looks.search)
        cells = int(grown.bins.offsets[-1])
        at_once = max(p.max_cells // cells, 1)
        while not growing.done:
            while len(places := growing.wanted()):
                for some in np.split(places, range(at_once, len(places), at_once)):
                    size = (len(some), cells)
                    fields = {
                        "label": count(size, bound=rows * MOST_TIMES * means.gradient.most),
                        "weight": count(size, bound=rows * MOST_TIMES),
                        "rows": count(size, bound=rows),
                    }
                    told, apart = replica.sent()
                    total = yield Round("level", Sum(), fields, {**told, "nodes": batch.open[some]}, apart)
                    replica.answered(total.sites)
                    sums = np.stack([-total["label"], total["weight"], total["rows"]], axis=-1)
                    growing.told(some, sums, total.sites)
            _tell(replica, grown, growing.decide())

    def _drawn(self, cohort: Cohort, replica: Replica, grown: Grown) -> Steps:
        """The round of one batch of drawn trees, under noise."""
        means, rows = self._means(cohort.schema), cohort.schema.max_rows
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((cohort.seed, len(grown.batches), 15))))
        batch = Batch(means.outputs, self.params.max_depth, grown.bins)
        for level in drawn(batch, random):
            _tell(replica, grown, level)
        size, most = len(batch.open), means.gradient.most
        fields = {
            "label": real(size, bound=rows * most, step=coarse(most)),
            "weight": real(size, bound=rows, step=coarse(1)),
        }
        told, apart = replica.sent()
        total = yield Round("noisy leaves", Sum(), fields, told, apart)
        replica.answered(total.sites)
        label, weight = means.gradient.reals(total["label"]), np.maximum(np.asarray(total["weight"], np.float64), 0)
        tree = batch.open[:, 0] % means.classes
        mean = np.bincount(tree, label) / np.maximum(np.bincount(tree, weight), 1)  # of each class's trees
        words = np.zeros((size, WORDS))
        words[:, FEATURE] = LEAF
        values = (label + PRIOR * mean[tree]) / (weight + PRIOR)
        words[:, THRESHOLD] = (np.clip(values, 0, means.gradient.bound) / self.params.trees).astype(np.float32)
        words[:, COVER] = weight
        _tell(replica, grown, words)

    def _max_features(self, schema: TableSchema) -> int:
        features = len(self.shape(schema).features)
        usual = features / 3 if Goal.of(schema, (self.params.target,)).task == "regression" else features**0.5
        return min(self.params.max_features or max(round(usual), 1), features)

    def _weights(self, model: Trees, grown: Grown) -> Floats:
        """The trees asked for, of all batches; margins begin at the bottom of the target's range."""
        means = self._means(grown.shape.schema)
        words = np.concatenate([batch.words for batch in grown.batches])[: len(model.words)]
        return np.concatenate([np.full(model.outputs, means.low), words.ravel()])

    # ---------------------------------------------------------------- at the site

    def _level_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        """One cell of each feature in each tree, as often as it counts; a label in the tree of its class."""
        means, features = self._means(schema), len(self.shape(schema).features)
        return {
            "label": touches(features * means.size, MOST_TIMES * means.gradient.most),
            "weight": touches(features * means.outputs, MOST_TIMES),
            "rows": touches(features * means.outputs),
        }

    def _leaves_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        means = self._means(schema)
        return {"label": touches(means.size, means.gradient.most), "weight": touches(means.outputs)}

    @handler("level", record=_level_per_record)
    def level(self, site: SiteView, task: Task) -> Reply:
        """At the site: histograms of nodes of the level that is open."""
        sums = self._at(site, task, bootstrap=self.params.bootstrap).histograms(asked_nodes(task.arrays))
        return {"label": -sums[..., 0], "weight": sums[..., 1], "rows": sums[..., 2]}

    @handler("noisy leaves", record=_leaves_per_record)
    def noisy_leaves(self, site: SiteView, task: Task) -> Reply:
        """At the site: sums of all open nodes, of rows that count once."""
        label, weight = self._at(site, task, bootstrap=False).totals()
        return {"label": label, "weight": weight}

    def _at(self, site: SiteView, task: Task, *, bootstrap: bool) -> Bootstrapped:
        """The site's rows, as far as the task tells the trees."""
        only_summed(site)
        state = site.state
        if bootstrap and "seed" not in state:
            state["seed"] = np.frombuffer(task.secret("rows").bytes(16), np.uint32).copy()
        log = received(task, state)
        draw = partial(poisson_times, tuple(state["seed"].tolist())) if bootstrap else once
        found = self._kept.at(site, self.shape(site.table.schema), log, draw)
        state.update(log.arrays())
        return found


class _Looks:
    """Which features the nodes of a batch look at."""

    def __init__(self, bins: Bins, rules: Any, size: int, *seed: int) -> None:
        self._bins, self._rules, self._size, self._seed = bins, rules, size, seed

    def search(self, hist: Ints, nodes: Ints, bounds: Floats) -> Splits:
        """The best split by some features of each node; by all where these do not split it."""
        features = len(self._bins.features)
        if self._size >= features:
            return self._best(hist, None)
        allowed = np.zeros((len(nodes), features), np.bool_)
        for row, (tree, node) in enumerate(nodes.tolist()):
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence((*self._seed, tree, node, 13))))
            allowed[row, random.choice(features, self._size, replace=False)] = True
        found = self._best(hist, allowed)
        if len(none := np.flatnonzero(found.feature < 0)):
            again = self._best(hist[none], None)
            for name in found.__slots__:
                getattr(found, name)[none] = getattr(again, name)
        return found

    def _best(self, hist: Ints, allowed: NDArray[np.bool_] | None) -> Splits:
        from atoll.models.tree_splits import best_splits

        bins = self._bins
        return best_splits(hist, bins.offsets, self._rules, categorical=bins.categorical, allowed=allowed)


def _tell(replica: Replica, grown: Grown, record: Floats) -> None:
    replica.add(record)
    grown.take(np.asarray(record, np.float64).reshape(-1))
