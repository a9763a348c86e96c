"""Bagging of local trees: each site boosts trees on its own rows, by the same code, and the coordinator averages them.

For slow links: after the bins' edges there is one round. The trees know nothing of the other sites' rows, so where
sites are small, or differ in what they hold, ``trees.boosted`` is the better model.

*trees* is the size of the whole model, shared out evenly: each of M sites boosts trees / M steps. The model's margin is
the mean of the sites', weighted by their rows (or evenly: *weighting* sites).

Parties: sites and coordinator. Messages: rounds of ``statistics.quantiles`` for the bins' edges (none where these are
given or even); "grow", one Gather of each site's base margins, trees and number of rows.
The coordinator learns every site's own trees (a protection that shows only sums is refused): their splits, at the edges
that all have, and the value, gain and summed Hessian of leaves, each of at least *min_rows* rows and at least the
fewest people that the site's policy lets be told of. Where all rows of a leaf have one label, its value tells that
label of all of them. Sites learn the averaged model when it is evaluated.
Threat model: an honest coordinator. A bad site's trees are its share of the model, whatever they say; such that are no
trees are refused. Dropout: the mean of those that answered, whose share of the trees stays what it was.
Cost: the rounds of ``statistics.quantiles``, and 40 · nodes bytes a tree, once: 5 KiB at depth 6, where
``trees.boosted`` sends 16 to 24 · cells bytes for each of about 32 nodes of a tree.

Sources: Breiman 1996, Bagging Predictors; Chen & Guestrin 2016, XGBoost (KDD).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field

from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, SiteView, handler, program
from atoll.contract.rounds import Gather, Gathered, Reply, Round, Steps, Task, count, not_taken, real
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.models.linear import feature_bounds
from atoll.models.trees import FEATURE, FURTHEST, LEAF, THRESHOLD, Trees
from atoll.statistics.quantiles import Quantiles
from atoll.trees.alone import Alone
from atoll.trees.binning import Bins, sizes_of, tidy
from atoll.trees.features import BoostingParams, edges_of
from atoll.trees.following import counted

SMALLEST = 2.0**-149
"""The least float32: no value is told any finer."""


class BaggedParams(BoostingParams):
    """As of ``trees.boosted``, but *trees*: of all sites together, of each output. binning: where edges come from, if
    not from *edges*. weighting: by sites' rows, or evenly."""

    max_bins: int = Field(default=64, ge=2, le=254)
    binning: Literal["quantiles", "even"] = "quantiles"
    weighting: Literal["rows", "sites"] = "rows"


@program(
    "trees.bagged", needs={"gather", "sum"}, offers={"bounded", "resolution"}, calls={"statistics.quantiles"}
)  # fmt: skip
class Bagged:
    """Boosted trees of each site's own rows, averaged, in one round."""

    Params = BaggedParams

    def __init__(self, params: BaggedParams) -> None:
        self.params = params
        kind = params.objective if isinstance(params.objective, str) else params.objective.get("kind")
        if kind == "cox":  # its predictions are no durations: nothing for evaluation to compare
            self.model = None  # type: ignore[assignment, method-assign]

    def model(self, schema: TableSchema) -> Trees:
        """The model it fits, before any fitting; what evaluation is then asked about."""
        return self.params.model(schema)

    # ---------------------------------------------------------------- at the coordinator

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"model", "rows": by site, as far as they tell, "iterations": steps of each site, "history": []}."""
        p, schema = self.params, cohort.schema
        model, steps = p.model(schema), p.trees // len(cohort.sites)
        if not steps:
            raise PlanError("trees.too-few", "there are fewer trees than sites to grow them", field="params.trees",
                            remedy="ask for more trees")  # fmt: skip
        columns, given = p.columns(schema), dict(p.edges)
        if p.binning == "quantiles":
            given |= yield from self._quantiles(cohort, [n for n in columns[0] if n not in {*columns[1], *given}])
        edges = yield from edges_of(cohort, columns, given, p.max_bins, even=True)
        bins = Bins(columns[0], edges, sizes_of(schema, *columns))
        shape = (steps * model.outputs, model.settings.num_nodes, 5)
        fields = {
            "base": real(model.outputs, bound=FURTHEST, step=SMALLEST),
            "words": real(shape, bound=FURTHEST, step=SMALLEST),
            "rows": count(bound=schema.max_rows),
        }
        send = {"bins": bins.told(), "steps": np.array(steps, np.int64)}
        gathered: Gathered = yield Round("grow", Gather(), fields, send)
        return {
            "model": self._averaged(model, gathered, steps),
            "rows": {site: int(gathered[site]["rows"]) for site in gathered},
            "iterations": steps,
            "history": [],
        }

    def _quantiles(self, cohort: Cohort, names: list[str]) -> Steps:
        """Edges of some features: quantiles, as far as they differ, by counts that also small sites may tell."""
        if not names:
            return {}
        probabilities = tuple(i / self.params.max_bins for i in range(1, self.params.max_bins))
        asked = Quantiles(Quantiles.Params(columns=tuple(names), probabilities=probabilities, error=1e-4, bins=32))
        found = (yield from asked.coordinate(cohort))["quantiles"]["columns"]
        edges = {}
        for name in names:
            known = np.array([value for value in found[name]["values"] if value is not None], np.float64)
            edges[name] = tuple(tidy(known, feature_bounds(cohort.schema, name)[0]).tolist())
        return edges

    def _averaged(self, model: Trees, gathered: Gathered, steps: int) -> Trees:
        """The sites' trees, one after another; raises PlanError "model.bad-trees" where one's are none."""
        rows = np.array([max(int(gathered[site]["rows"]), 1) for site in gathered], np.float64)
        shares = rows / rows.sum() if self.params.weighting == "rows" else np.full(len(rows), 1 / len(rows))
        size, words = steps * model.outputs, model.words.copy()
        base = np.zeros(model.outputs)
        for place, (site, share) in enumerate(zip(gathered, shares.tolist(), strict=True)):
            grown = words[place * size : (place + 1) * size]
            grown[:] = gathered[site]["words"]
            model.with_weights(np.append(base, words))  # trees, before anything is made of them
            leaves = grown[:, :, FEATURE] == LEAF
            grown[leaves, THRESHOLD] = (share * grown[leaves, THRESHOLD]).astype(np.float32)
            base += share * np.asarray(gathered[site]["base"])
        return model.with_weights(np.append(base, words))

    # ---------------------------------------------------------------- at the site

    @handler("grow", reduce="gather", groups=("rows",))
    def grow(self, site: SiteView, task: Task) -> Reply:
        """At the site: boosted trees of its own training rows."""
        from atoll.models.tree_splits import Rules

        p, schema = self.params, site.table.schema
        columns, objective = p.columns(schema), p.loss(schema)
        steps, told = task.arrays.get("steps"), task.arrays.get("bins")
        if steps is None or steps.dtype != np.int64 or steps.shape or not 1 <= int(steps) <= p.trees:
            raise not_taken("steps")
        if told is None or told.ndim != 1:
            raise not_taken("bins")
        bins = Bins.read(task.take("bins", told.shape), schema, *columns)
        fewest = max(p.min_rows, site.min_group_size)
        rules = Rules(
            p.l2, p.min_split_gain, p.min_child_weight, fewest, objective.gradient.unit, objective.hessian.unit
        )  # fmt: skip
        alone = Alone(objective, bins, rules, int(steps), p.max_depth, p.learning_rate, site.min_group_size)
        codes, labels = counted(objective, bins, site.table)
        base, words = alone.grow(codes, labels, site.progress)
        return {"base": base, "words": words, "rows": len(codes)}
