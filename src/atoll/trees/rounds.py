"""The coordinator's half of boosting: the rounds of one step after another (see ``boosted.py``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import PlanError, SchemaError
from atoll.contract.program import Cohort
from atoll.contract.rounds import Field as Declared
from atoll.contract.rounds import Metrics, Round, Steps, Sum, Summed, count, real
from atoll.contract.wire import Array
from atoll.models.trees import COVER, FEATURE, LEAF, THRESHOLD
from atoll.statistics.noise import coarse, smallest
from atoll.trees import objective as losses
from atoll.trees.binning import FURTHEST, Bins, check_given, sizes_of
from atoll.trees.grown import Grown, Shape, leaf_places
from atoll.trees.growth import Batch, Floats, Growing, Ints, drawn
from atoll.trees.noisy import mended
from atoll.trees.patience import Watched
from atoll.trees.replica import Replica

if TYPE_CHECKING:
    from atoll.models.tree_splits import Rules
    from atoll.trees.boosted import BoostedParams

MOST_HELD = 1 << 31
"""Bytes that the histograms of one level may take at the coordinator."""
NOISY_STEP = 1.0
"""Under noise no leaf's weight is beyond it: a quotient of sums near zero would be mostly noise."""
NOISY_WEIGHT = 1e-3
"""Under noise a child's Σ Hessian is at least this."""


class Run:
    """One run at the coordinator. grown: the model as far as all know it, or will with the next round."""

    def __init__(self, params: BoostedParams, shape: Shape, cohort: Cohort) -> None:
        self.params, self.shape, self.cohort = params, shape, cohort
        self.replica, self.watched = Replica(cohort.sites), Watched(params.stop)
        self.grown = Grown(shape)

    # -- refused before data is read

    def check(self) -> None:
        """Raise PlanError for what cannot be."""
        p, shape = self.params, self.shape
        check_given(p.edges, shape.features, shape.categorical)
        if unknown := sorted(set(p.monotone) - set(shape.features)):
            raise PlanError("plan.bad-column", f"{unknown[0]!r} is not a feature of the trees", field="monotone",
                            remedy="name it among the features, too")  # fmt: skip
        if ordered := sorted(set(p.monotone) & set(shape.categorical)):
            raise PlanError("plan.bad-column", f"{ordered[0]!r} has no order to be monotone in", field="monotone",
                            remedy="leave it out, or do not split it by categories")  # fmt: skip
        if (
            not self.cohort.exact
            and p.splits == "best"
            and p.binning == "quantiles"
            and len(p.edges) < len([n for n in shape.features if n not in shape.categorical])
        ):
            raise PlanError("trees.noisy-edges", "under noise the number of edges must not depend on data",
                            field="params.binning", remedy="choose binning: even, or give edges")  # fmt: skip
        sizes = sizes_of(shape.schema, shape.features, shape.categorical)
        most = np.where(sizes > 0, 1 + sizes, 1 + p.max_bins)
        for name, edges in p.edges.items():
            most[shape.features.index(name)] = len(edges) + 2
        cells = int(most.sum())
        if cells > p.max_cells:
            raise PlanError("trees.too-many-cells", f"one node's histogram has up to {cells} cells, and {p.max_cells} "
                            "are the most", field="params.max_cells",
                            remedy="use fewer features or bins, or raise max_cells")  # fmt: skip
        nodes = shape.objective.outputs * 2 ** (p.max_depth - 1)
        if p.splits == "best" and nodes * cells * 24 > MOST_HELD:
            raise PlanError("trees.too-many-cells", f"a level's histograms take up to {nodes * cells * 24 >> 20} MiB, "
                            f"and {MOST_HELD >> 20} are the most", field="params.max_depth",
                            remedy="use a smaller max_depth, fewer features or bins")  # fmt: skip

    # -- checkpoints

    def arrays(self) -> dict[str, Array]:
        """Between two steps."""
        return {**self.replica.arrays(), **self.watched.arrays()}

    def restore(self, state: Mapping[str, Array]) -> None:
        """As :meth:`arrays` was made."""
        self.replica.restore(state)
        self.watched.restore(state)
        for record in self.replica.log.records:
            self.grown.take(record)

    # -- rounds

    def tell(self, record: Floats) -> None:
        """What all are to know."""
        self.replica.add(record)
        self.grown.take(np.asarray(record, np.float64).reshape(-1))

    def ask(self, name: str, fields: Mapping[str, Declared], **sent: Array) -> Steps:
        """One Sum of sites that know all that was told."""
        told, apart = self.replica.sent()
        total: Summed = yield Round(name, Sum(), fields, {**told, **sent}, apart)
        self.replica.answered(total.sites)
        return total

    def begin(self, edges: tuple[NDArray[np.float32], ...]) -> Steps:
        """Base margins, and with the edges the first record."""
        shape, schema = self.shape, self.shape.schema
        total = yield Round("begin", Sum(), losses.fields(shape.objective.begins, schema))
        if self.params.weight and self.cohort.exact and total["counted"] == 0:
            raise SchemaError("schema.no-weight", "no row of the cohort has a weight above 0", field=self.params.weight,
                              remedy="mend the weights, or leave weight out")  # fmt: skip
        bins = Bins(shape.features, edges, sizes_of(schema, shape.features, shape.categorical))
        self.tell(np.concatenate([shape.objective.base(total, smallest(self.cohort)), bins.told()]))

    def step(self) -> Steps:
        """One step of boosting; returns whether it was time to end before it, or is now."""
        grown, objective, step = self.grown, self.shape.objective, len(self.grown.batches)
        if objective.shares:
            total = yield from self.ask("share", losses.fields(objective.shares, self.shape.schema))
            self.tell(objective.shared(total))
        over = (yield from self._random()) if self.params.splits == "random" else (yield from self._best())
        if over:
            return True
        if grown.expects == "renew" and grown.batch is not None:
            yield from self._renew(grown.batch)
        values = {}
        if self.watched.history:
            values = {"loss": self.watched.history[-1], "held-out loss": self.watched.held_out[-1]}
        used_up = yield Metrics(step, {name: value for name, value in values.items() if not math.isnan(value)})
        return bool(used_up)

    def end(self) -> Steps:
        """The last losses."""
        if self.cohort.exact and len(self.watched.history) <= len(self.grown.batches):
            total = yield from self.ask("losses", self._losses())
            self._note(total)
            if not math.isnan(self.watched.history[-1]):
                yield Metrics(len(self.grown.batches), {"loss": self.watched.history[-1]})

    def _losses(self) -> dict[str, Declared]:
        declared = losses.fields(self.shape.objective.losses, self.shape.schema)
        return {f"{what} {name}": field for what in ("train", "held") for name, field in declared.items()}

    def _note(self, total: Summed) -> bool:
        """Watch the losses that came with a round, NaN of too few rows; is it time to end?"""
        objective, fewest = self.shape.objective, smallest(self.cohort)
        found = [
            objective.loss({n: total[f"{what} {n}"] for n in objective.losses})
            if round(float(total[f"{what} rows"])) >= fewest
            else math.nan
            for what in ("train", "held")
        ]
        if self.params.stop.asked and math.isnan(found[1]):
            raise PlanError("plan.no-holdout", "there are no or too few held-out rows whose loss could end the run",
                            field="params.stop", remedy="set run.holdout or raise it, or leave stop out")  # fmt: skip
        return self.watched.enough(*found)

    # -- a step with the best splits

    def _rules(self) -> Rules:
        from atoll.models.tree_splits import Rules

        p, objective, exact = self.params, self.shape.objective, self.cohort.exact
        return Rules(
            p.l2, p.min_split_gain, p.min_child_weight if exact else max(p.min_child_weight, NOISY_WEIGHT),
            max(p.min_rows, self.cohort.min_group_size) if exact else 1,
            objective.gradient.unit, objective.hessian.unit,
        )  # fmt: skip

    def _furthest(self) -> float:
        furthest = self.shape.objective.max_step
        return furthest if self.cohort.exact else min(furthest, NOISY_STEP)

    def _best(self) -> Steps:
        p, grown, shape = self.params, self.grown, self.shape
        batch = Batch(shape.objective.outputs, p.max_depth, grown.bins)
        monotone = np.array([p.monotone.get(name, 0) for name in shape.features], np.int8)
        growing = Growing(
            batch, self._rules(), p.learning_rate, monotone=monotone, furthest=self._furthest(),
            subtract=self.cohort.exact,
        )  # fmt: skip
        columns = self._drawn_columns(len(grown.batches))
        for level in range(p.max_depth):
            if not self.cohort.exact:
                yield from self._noisily(growing, level, columns)
                continue
            while len(places := growing.wanted()):
                for some in np.split(places, range(self._at_once(), len(places), self._at_once())):
                    total = yield from self._asked(growing, some, columns, root=level == 0)
                    if level == 0 and self._note(total):
                        return True
            if not growing.done:
                self.tell(growing.decide())
        if not growing.done:
            self.tell(growing.decide())
        return False

    def _at_once(self) -> int:
        """So many nodes are asked in one round; all outputs' roots always."""
        cells = int(self.grown.bins.offsets[-1])
        return max(self.params.max_cells // cells, 1) if self.grown.growing.level else self.shape.objective.outputs

    def _asked(self, growing: Growing, places: Ints, columns: Ints | None, *, root: bool) -> Steps:
        """One round of histograms."""
        shape, rows, bins = self.shape, self.shape.schema.max_rows, self.grown.bins
        size = (len(places), self._cells(columns))
        fields = {"g": count(size, bound=rows * shape.objective.gradient.most)}
        if not shape.objective.constant:
            fields["h"] = count(size, bound=rows * shape.objective.hessian.most)
        fields["n"] = count(size, bound=rows)
        if root:
            fields |= self._losses()
        total = yield from self.ask(
            "root" if root else "level", fields, nodes=growing.batch.open[places], **self._sent(columns)
        )
        sums = np.stack([total["g"], total["n"] if shape.objective.constant else total["h"], total["n"]], axis=-1)
        if root and not self.grown.batches and shape.objective.telling:
            self._check_label(sums)
        growing.told(places, widened(sums, bins, columns), total.sites)
        return total

    def _noisily(self, growing: Growing, level: int, columns: Ints | None) -> Steps:
        """A level under noise: all nodes, whether they are open or not."""
        objective, rows, bins = self.shape.objective, self.shape.schema.max_rows, self.grown.bins
        width = 2**level
        nodes = level_nodes(objective.outputs, level)
        size = (len(nodes), self._cells(columns))
        most = {"g": objective.gradient.most, "h": objective.hessian.most}
        fields = {name: real(size, bound=rows * each, step=coarse(each)) for name, each in most.items()}
        total = yield from self.ask("noisy level", fields, nodes=nodes, **self._sent(columns))
        if growing.done:
            return
        sizes = np.diff(bins.offsets)[slice(None) if columns is None else columns]
        sums = mended(total["g"], total["h"], np.concatenate([[0], np.cumsum(sizes)]))
        trees, places = growing.batch.open.T
        here = widened(sums, bins, columns)[trees * width + places - (width - 1)]
        growing.told(np.arange(len(here)), here, total.sites)
        self.tell(growing.decide())

    def _cells(self, columns: Ints | None) -> int:
        sizes = np.diff(self.grown.bins.offsets)
        return int(sizes.sum() if columns is None else sizes[columns].sum())

    @staticmethod
    def _sent(columns: Ints | None) -> dict[str, Array]:
        return {} if columns is None else {"columns": columns}

    def _drawn_columns(self, step: int) -> Ints | None:
        """Features of a step's trees, drawn from the plan's seed; None: all."""
        features = len(self.shape.features)
        size = max(1, round(self.params.colsample * features))
        if size == features:
            return None
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.cohort.seed, step, 11))))
        return np.sort(random.choice(features, size, replace=False)).astype(np.int64)

    def _check_label(self, sums: Ints) -> None:
        """Raise SchemaError where all rows have the same gradients though some feature tells them apart: then every
        cell's sum is its share of rows."""
        n, g = sums[..., 2], sums[..., 0]
        occupied = n[0][n[0] > 0]
        if not (occupied < occupied.max(initial=0)).any():
            return
        for output in range(len(sums)):
            biggest = int(n[output].argmax())
            each, of = int(g[output, biggest]), int(n[output, biggest])
            if any(int(a) * of != int(b) * each for a, b in zip(g[output], n[output], strict=True)):
                return
        raise SchemaError(
            "schema.constant-label",
            f"the target {self.params.target!r} has the same value in every row of the cohort",
            field=self.params.target, remedy="choose another target, or more sites",
        )  # fmt: skip

    # -- a step with drawn splits

    def _random(self) -> Steps:
        p, objective, exact = self.params, self.shape.objective, self.cohort.exact
        depth, rows, grown = p.max_depth, self.shape.schema.max_rows, self.grown
        random = np.random.Generator(
            np.random.Philox(np.random.SeedSequence((self.cohort.seed, len(grown.batches), 12)))
        )
        batch = Batch(objective.outputs, depth, grown.bins)
        for words in drawn(batch, random):
            self.tell(words)
        size, most = (objective.outputs * 2**depth,), objective.gradient.most
        if exact:
            fields = {"g": count(size, bound=rows * most), "n": count(size, bound=rows), **self._losses()}
            if not objective.constant:
                fields["h"] = count(size, bound=rows * objective.hessian.most)
        else:
            each = {"g": most, "h": objective.hessian.most}
            fields = {name: real(size, bound=rows * top, step=coarse(top)) for name, top in each.items()}
        total = yield from self.ask("leaves" if exact else "noisy leaves", fields)
        if exact and self._note(total):
            return True
        self.tell(self._leaves(batch, total))
        return False

    def _leaves(self, batch: Batch, total: Summed) -> Floats:
        """Words of all open nodes as leaves; of small groups of rows they tell nothing."""
        from atoll.models import tree_splits

        g = np.asarray(total["g"], np.float64)
        h = np.maximum(np.asarray(total["n" if "h" not in total else "h"], np.float64), 0)
        sums = np.rint(np.stack([g, h, h], axis=-1)).astype(np.int64)
        rules, furthest = self._rules(), self._furthest()
        words = np.zeros((len(batch.open), 5))
        words[:, 0] = LEAF
        if len(words) != len(sums):  # no feature has an edge
            return words
        values = self.params.learning_rate * tree_splits.weights_of(
            sums, rules, np.tile([-furthest, furthest], (len(g), 1))
        )
        words[:, THRESHOLD] = np.clip(values, -FURTHEST, FURTHEST).astype(np.float32)
        words[:, COVER] = sums[:, 1] * rules.h_unit
        if self.cohort.exact:
            told = large(np.asarray(total["n"]).reshape(len(batch), -1), rules.min_rows).ravel()
            words[~told, THRESHOLD] = words[~told, COVER] = 0
        return words

    def _renew(self, batch: Batch) -> Steps:
        """The leaves' values anew, but of leaves that were told as empty."""
        objective, (places, leaves) = self.shape.objective, leaf_places(batch)
        if not self.cohort.exact or self.params.splits == "random":
            leaves = 2**batch.max_depth
        fields = losses.fields(objective.renews(leaves), self.shape.schema)
        total = yield from self.ask("renew", fields, leaves=np.array(leaves))
        values = self.params.learning_rate * objective.renewed(total, smallest(self.cohort))
        if self.cohort.exact:
            trees, nodes = np.nonzero((batch.words[:, :, FEATURE] == LEAF) & (batch.words[:, :, COVER] == 0))
            values[trees, places[trees, nodes]] = batch.words[trees, nodes, THRESHOLD]
        self.tell(np.clip(values, -FURTHEST, FURTHEST).astype(np.float32).astype(np.float64))


def large(rows: Ints, fewest: int) -> NDArray[np.bool_]:
    """Which of the trees' leaves are told, by their rows, [num_trees, leaves]: those of at least *fewest*. Where all
    others together have fewer, the smallest of the told ones joins them: else their sums would be the difference to
    all rows', of which base margins and other trees tell."""
    told = rows >= fewest
    for tree, here in zip(told, rows, strict=True):
        if 0 < here[~tree].sum() < fewest and tree.any():
            tree[np.where(tree, here, here.max() + 1).argmin()] = False
    return told


def level_nodes(outputs: int, level: int) -> Ints:
    """(tree, node) of all nodes of a level, [outputs · 2^level, 2]."""
    width = 2**level
    return np.column_stack([np.repeat(np.arange(outputs), width), np.tile(np.arange(width) + width - 1, outputs)])


def widened(sums: Ints, bins: Bins, columns: Ints | None) -> Ints:
    """Histograms of some features' cells, [num_nodes, cells, 3], as of all: all rows count as missing in others."""
    if columns is None:
        return sums
    offsets, found = bins.offsets, np.zeros((len(sums), int(bins.offsets[-1]), 3), np.int64)
    sizes = np.diff(offsets)
    found[:, offsets[:-1]] = sums[:, : sizes[columns[0]]].sum(axis=1, keepdims=True)
    start = 0
    for column in columns.tolist():
        found[:, offsets[column] : offsets[column + 1]] = sums[:, start : start + sizes[column]]
        start += sizes[column]
    return found
