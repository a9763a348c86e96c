"""Gradient boosting of decision trees whose only communication is sums of (gradient, Hessian, rows) histograms.

The trees are those that the same code grows on the pooled rows: gradients and Hessians are rounded to integers row by
row, so sums of histograms are exact, and do not depend on who holds which rows. Every exact protection gives the same
bits (where *subsample* is 1: else every site draws its own rows).

Parties: sites and coordinator. Messages: rounds of ``trees.edges`` for the bins' edges (none where these are
given or even); "begin", a Sum from which the base margins follow; for each step of boosting one Sum a level, "root" and
then "level": the histograms of the nodes asked, of all outputs' trees together. Below the root only the smaller child
of each split is asked, its sibling is parent less child. Leaves of the last level follow from the sums above: a tree of
depth D takes D rounds at most. The loss of the trees so far, on training and held-out rows, rides on "root", and comes
once more in the end, "losses". ``splits: random`` draws trees from the plan's seed and asks only the sums of their
leaves, "leaves": one round for each step. Some objectives add a Sum before a step ("share") or after it ("renew"). With
every round sites are sent what the trees became since the last (see ``replica.py``).

What each party learns. The coordinator learns, of the cohort's total: the edges, histograms of the nodes asked and
loss sums; also those of few rows, since a node's size is known only to their sum. Leaves hold at least ``min_rows``
rows and the plan's smallest group, so the *model* tells of no smaller group (leaves of drawn trees that hold fewer
count as empty, with another leaf where they would still follow from the rest); nor do the losses that are reported. The
sums behind it do. Sites learn the edges and the model. Single cells tell of single people where replies are seen alone,
so under ``plain`` a site answers only if its policy's smallest group is 1.
Threat model: as the plan's protection. What a coordinator sends is checked: edges stand for the whole run, splits are
at edges, levels come in order, and what a site was once told of the trees does not change, so that no level of a tree
is asked twice with other splits above it. A round that is begun anew replaces what was told in it, and so may only ask
what it asked before: the site's journal charges a round for one question, and lets no answer to another out
(``budget.question``). A coordinator that does not keep the protocol may still choose bad splits and bad edges: every
tree then tells it sums of up to D conditions of its choice, of as few rows as it likes, as many as the plan has trees.
The data set's quota of exact releases bounds how many rounds, of all runs together; differential privacy, what they
tell.
Dropout: a round is of the survivors. Where the sites of a sum are not those of its parent's, siblings are asked too. A
site that was away is sent what it lacks, and takes part again. A restarted one rebuilds all from its journal.
Cost: for a step, about half of the nodes of each level · cells · (12 to 24 bytes) a site, cells = features · bins; 40
bytes a node to every site.

Noise (``Cohort.exact`` is False): "noisy level" asks the sums of all nodes of every level of every tree, whether they
were split or not, so that neither number nor shape of the rounds depends on data, and no counts; a row is in one cell
for each feature, so few features and few bins mean little noise. "noisy leaves", of random splits, asks one round for
each tree, a row in one leaf of each: by far the better use of a small budget (Maddock et al. 2022, §4 and §5).
There are no losses, and edges are even over the schema's ranges where no others are given.

Sources: Friedman 2001, Greedy Function Approximation; Chen & Guestrin 2016, XGBoost (KDD); Ke et al. 2017, LightGBM
(NeurIPS), §2.1; Maddock et al. 2022, Federated Boosted Decision Trees with Differential Privacy (CCS).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.errors import ProtocolError
from atoll.contract.program import Cohort, SiteView, handler, program
from atoll.contract.rounds import Checkpoint, Reply, Steps, Task, not_taken
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.models.trees import Trees
from atoll.statistics.noise import only_summed
from atoll.trees import objective as losses
from atoll.trees.features import BoostingParams, edges_of
from atoll.trees.following import Following, Kept
from atoll.trees.grown import Shape, leaf_places
from atoll.trees.growth import Ints
from atoll.trees.patience import Patience
from atoll.trees.replica import received
from atoll.trees.rounds import Run, level_nodes

Floats = NDArray[np.float64]


class BoostedParams(BoostingParams):
    """objective: a kind, or a kind with settings; by default what suits the target. features: by default all other
    numeric features, and those with code lists. trees: steps of boosting (each grows one for every output). l2, gamma
    (min_split_gain), min_child_weight: as in XGBoost. min_rows: fewest rows of a leaf. max_bins: of a feature, beside
    missing. binning: where edges come from, if not from *edges*. subsample, colsample: shares of rows (drawn by each
    site) and features for each step. monotone: +1 where predictions must not fall as the feature rises, −1. stop: end
    early. splits: "best", or drawn at "random". max_cells: most cells in one message."""

    max_bins: int = Field(default=254, ge=2, le=254)
    binning: Literal["quantiles", "even"] | None = None
    subsample: float = Field(default=1.0, gt=0, le=1)
    colsample: float = Field(default=1.0, gt=0, le=1)
    monotone: dict[str, Literal[-1, 1]] = Field(default_factory=dict)
    stop: Patience = Patience()
    splits: Literal["best", "random"] = "best"
    max_cells: int = Field(default=1 << 20, ge=1)
    checkpoint_every: int = Field(default=10, ge=1)


@program("trees.boosted", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"}, calls={"trees.edges"})
class Boosted:
    """Gradient-boosted trees, equal to those of the pooled rows, by sums of histograms."""

    Params = BoostedParams

    def __init__(self, params: BoostedParams) -> None:
        self.params, self._kept = params, Kept(Following)
        self._shape: tuple[TableSchema, Shape] | None = None
        kind = params.objective if isinstance(params.objective, str) else params.objective.get("kind")
        if kind == "cox":  # its predictions are no durations: nothing for evaluation to compare
            self.model = None  # type: ignore[assignment, method-assign]

    def model(self, schema: TableSchema) -> Trees:
        """The model it fits, before any fitting; what evaluation is then asked about."""
        return self.params.model(schema)

    def shape(self, schema: TableSchema) -> Shape:
        """What the plan says of the trees."""
        if self._shape is None or self._shape[0] is not schema:
            p, (features, categorical) = self.params, self.params.columns(schema)
            self._shape = (schema, Shape(schema, features, categorical, p.loss(schema), p.trees, p.max_depth))
        return self._shape[1]

    # ---------------------------------------------------------------- at the coordinator

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"model", "history": mean training loss before each step and in the end, "held_out": the same of
        held-out rows, "iterations": steps made, "kept": of which the model is}."""
        model = self.params.model(cohort.schema)
        run = Run(self.params, self.shape(cohort.schema), cohort)
        run.check()
        if start is None:
            p, way = self.params, self.params.binning or ("quantiles" if cohort.exact else "even")
            edges = yield from edges_of(cohort, p.columns(cohort.schema), p.edges, p.max_bins, even=way == "even")
            yield from run.begin(edges)
        else:
            run.restore(start)
        ended = False
        while len(run.grown.batches) < self.params.trees and not ended:
            ended = yield from run.step()
            done = len(run.grown.batches)
            if not ended and done % self.params.checkpoint_every == 0:
                yield Checkpoint(run.arrays())
        yield from run.end()
        watched, done = run.watched, len(run.grown.batches)
        kept = watched.best if self.params.stop.asked and watched.history else done
        return {
            "model": model.with_weights(run.grown.weights(kept)),
            "iterations": done,
            "kept": kept,
            "history": watched.history,
            "held_out": watched.held_out,
        }

    # ---------------------------------------------------------------- what one row changes

    def _begin_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        return losses.norms(self.shape(schema).objective.begins)

    def _share_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        return losses.norms(self.shape(schema).objective.shares)

    def _renew_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        return losses.norms(self.shape(schema).objective.renews(asked_leaves(sent, self.params.max_depth)))

    def _cells_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        """One cell of each feature, in the tree of each output."""
        shape = self.shape(schema)
        columns = asked_columns(sent, len(shape.features))
        places = shape.objective.outputs * (len(shape.features) if columns is None else len(columns))
        return {"g": touches(places, shape.objective.gradient.most), "h": touches(places, shape.objective.hessian.most)}

    def _level_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        shape = self.shape(schema)
        found = self._cells_per_record(schema, sent)
        if shape.objective.constant:
            del found["h"]
        columns = asked_columns(sent, len(shape.features))
        return {**found, "n": touches(shape.objective.outputs * len(shape.features if columns is None else columns))}

    def _losses_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        declared = losses.norms(self.shape(schema).objective.losses)
        return {f"{what} {name}": norms for what in ("train", "held") for name, norms in declared.items()}

    def _root_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        return {**self._level_per_record(schema, sent), **self._losses_per_record(schema, sent)}

    def _sums_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        objective, found = self.shape(schema).objective, self._leaves_per_record(schema, sent)
        if objective.constant:
            del found["h"]
        return {**found, "n": touches(objective.outputs), **self._losses_per_record(schema, sent)}

    def _leaves_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        objective = self.shape(schema).objective
        outputs = objective.outputs
        return {"g": touches(outputs, objective.gradient.most), "h": touches(outputs, objective.hessian.most)}

    # ---------------------------------------------------------------- at the site

    def _at(self, site: SiteView, task: Task) -> Following:
        """The site's rows, as far as the task tells the trees."""
        only_summed(site)
        shape, state = self.shape(site.table.schema), site.state
        share = self.params.subsample
        if share < 1 and "seed" not in state:
            state["seed"] = np.frombuffer(task.secret("rows").bytes(16), np.uint32).copy()
        log = received(task, state, self._kept.log(site))
        words = tuple(state["seed"].tolist()) if share < 1 else ()

        def draw(step: int, rows: int) -> NDArray[np.bool_] | None:
            if share == 1:
                return None
            return np.random.Generator(np.random.Philox(np.random.SeedSequence((*words, step)))).random(rows) < share

        found = self._kept.at(site, shape, log, draw)
        if len(log) > len(state.get("sizes", ())):  # else nothing is to be written
            state.update(log.arrays())
        return found

    @handler("begin", record=_begin_per_record)
    def begin(self, site: SiteView, task: Task) -> Reply:
        """At the site: sums of labels."""
        only_summed(site)
        objective = self.shape(site.table.schema).objective
        return objective.begin_sums(objective.labels(site.table))

    @handler("share", record=_share_per_record)
    def share(self, site: SiteView, task: Task) -> Reply:
        """At the site: what the objective needs to know of all rows before a tree."""
        at = self._at(site, task)
        if at.expects != "share":
            raise not_now()
        return at.shape.objective.share_sums(at.train.margins, at.train.labels)

    @handler("root", record=_root_per_record)
    def root(self, site: SiteView, task: Task) -> Reply:
        """At the site: histograms of the roots, and losses of the trees so far."""
        at = self._at(site, task)
        if at.growing.level != 0:
            raise not_now()
        return {**self._histograms(at, task), **self._losses(at)}

    @handler("level", record=_level_per_record)
    def level(self, site: SiteView, task: Task) -> Reply:
        """At the site: histograms of nodes of the level that is open."""
        return self._histograms(self._at(site, task), task)

    @handler("noisy level", record=_cells_per_record)
    def noisy_level(self, site: SiteView, task: Task) -> Reply:
        """At the site: histograms of all nodes of a level, also of such that are not open."""
        found = self._histograms(self._at(site, task), task, only_open=False)
        return {"g": found["g"], "h": found.get("h", found["n"])}

    @handler("leaves", record=_sums_per_record)
    def leaves(self, site: SiteView, task: Task) -> Reply:
        """At the site: sums of the last level's nodes, and losses of the trees so far."""
        at = self._at(site, task)
        return {**self._totals(at), **self._losses(at)}

    @handler("noisy leaves", record=_leaves_per_record)
    def noisy_leaves(self, site: SiteView, task: Task) -> Reply:
        """At the site: sums of the last level's nodes."""
        found = self._totals(self._at(site, task))
        return {"g": found["g"], "h": found.get("h", found["n"])}

    @handler("renew", record=_renew_per_record)
    def renew(self, site: SiteView, task: Task) -> Reply:
        """At the site: what the objective makes new values of leaves of."""
        at = self._at(site, task)
        if at.expects != "renew" or at.batch is None:
            raise not_now()
        places, most = leaf_places(at.batch)
        wanted = asked_leaves(task.arrays, self.params.max_depth)
        if wanted < most:
            raise not_now()
        leaf = np.stack([places[tree][at.rows.node[tree]] for tree in range(len(places))], axis=1)
        if at.rows.included is not None:
            leaf[~at.rows.included.T] = -1
        return at.shape.objective.renew_sums(at.train.margins, at.train.labels, leaf, wanted)

    @handler("losses", record=_losses_per_record)
    def losses(self, site: SiteView, task: Task) -> Reply:
        """At the site: losses of the trees so far, over training and held-out rows."""
        return self._losses(self._at(site, task))

    def _histograms(self, at: Following, task: Task, *, only_open: bool = True) -> dict[str, Any]:
        nodes, columns = asked_nodes(task.arrays), asked_columns(task.arrays, len(at.bins.features))
        outputs, size = at.shape.objective.outputs, 2 ** (at.shape.max_depth + 1) - 1
        if only_open:
            batch = at.growing
            known = set(map(tuple, batch.open.tolist()))
            if batch.level >= batch.max_depth or not known.issuperset(map(tuple, nodes.tolist())):
                raise not_now()
        elif (nodes[:, 0] >= outputs).any() or (nodes[:, 1] >= size // 2).any() or self.params.splits == "random":
            raise not_now()
        rows, offsets = at.rows, at.bins.offsets
        if columns is not None:
            rows, sizes = at.only(columns), np.diff(offsets)[columns]
            offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        if at.expects != "level":  # the step's trees are done, and the rounds go on for nobody to see it
            return self._told(at, np.zeros((len(nodes), int(offsets[-1]), 3), np.int64))
        g, h = at.gradients
        sums = rows.sums(offsets, nodes, g, h, size)
        return self._told(at, sums)

    def _totals(self, at: Following) -> dict[str, Any]:
        batch, depth = at.growing, at.shape.max_depth
        if self.params.splits != "random":
            raise not_now()
        nodes = level_nodes(len(batch), depth)
        g, h = at.gradients
        return self._told(at, at.rows.totals(nodes, g, h, batch.words.shape[1]))

    @staticmethod
    def _told(at: Following, sums: Ints) -> dict[str, Any]:
        told = {"g": sums[..., 0], "h": sums[..., 1], "n": sums[..., 2]}
        if at.shape.objective.constant:
            del told["h"]  # it is the rows
        return told

    @staticmethod
    def _losses(at: Following) -> dict[str, Any]:
        objective, found = at.shape.objective, dict[str, Any]()
        for what, part in (("train", at.train), ("held", at.held)):
            sums = objective.loss_sums(part.margins, part.labels)
            found |= {f"{what} {name}": value for name, value in sums.items()}
        return found


def _whole(arrays: Mapping[str, Array], name: str, dims: int) -> Ints | None:
    """An array of whole numbers that are not negative; None where there is none. Raises ProtocolError for another."""
    found = arrays.get(name)
    if found is None:
        return None
    if found.dtype != np.int64 or found.ndim != dims or (found < 0).any():
        raise not_taken(name)
    return found


def asked_nodes(arrays: Mapping[str, Array]) -> Ints:
    """(tree, node) pairs that are asked, each once: what is asked twice would cost a site memory without end."""
    found = _whole(arrays, "nodes", 2)
    if found is None or found.shape[1] != 2 or len(set(map(tuple, found.tolist()))) < len(found):
        raise not_taken("nodes")
    return found


def asked_columns(arrays: Mapping[str, Array], features: int) -> Ints | None:
    """The features whose cells are asked, rising; None: all."""
    found = _whole(arrays, "columns", 1)
    if found is not None and (not len(found) or (np.diff(found) <= 0).any() or found[-1] >= features):
        raise not_taken("columns")
    return found


def asked_leaves(arrays: Mapping[str, Array], max_depth: int) -> int:
    """How many leaves of a tree the coordinator has room for."""
    found = _whole(arrays, "leaves", 0)
    if found is None or not 1 <= int(found) <= 2**max_depth:
        raise not_taken("leaves")
    return int(found)


def not_now() -> ProtocolError:
    return ProtocolError(
        "trees.out-of-turn", "a site was asked what the trees so far do not lead to", field="nodes",
        remedy="the coordinator does not keep the protocol, or has another version: compare versions",
    )  # fmt: skip
