"""What a site would have by itself: a model trained on its own rows alone, scored on its own held-out rows.

So that a site's director sees, in a real federation too, what it gains by taking part. A site whose policy shares
"metrics" trains once, from the same initial weights, as many passes as the federation's rounds had, and tells the
model's metrics to three digits; the model itself is forgotten. A site that does not share them is left out, and not
asked to train.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from atoll.contract.errors import PolicyError, ProtocolError
from atoll.contract.program import Cohort, SiteView, handler, handler_of
from atoll.contract.rounds import Gather, Reply, Round, Steps, Task, not_taken, real
from atoll.horizontal.local import Kept, Local, still
from atoll.models.model import Model
from atoll.statistics.evaluation import asked_of, own_metrics


class Alone:
    """What learners of the family take over. params: theirs; "alone" says whether the plan asks for it."""

    params: Any
    _kept: Kept

    def model(self, schema: Any) -> Model:
        raise NotImplementedError

    def compared(self, cohort: Cohort, rounds: int) -> Steps:
        """At the coordinator: {"alone": {site: metrics}}, or {} where the plan does not ask."""
        if not (self.params.alone and cohort.exact):
            return {}
        model = self.model(cohort.schema)
        sent = {"weights": model.initial(cohort.seed).astype(model.dtype), "rounds": np.array(rounds)}
        fields = {name: real() for name in own_metrics(model)}
        found = yield Round("alone", Gather(), fields, sent, optional=True)
        told = {site: {name: float(value) for name, value in found[site].items()} for site in found}
        return {"alone": {site: {n: v for n, v in own.items() if not np.isnan(v)} for site, own in told.items()}}

    @handler("alone", reduce="gather")
    def alone(self, site: SiteView, task: Task) -> Reply:
        """At the site: metrics, on its own held-out rows, of a model that it trains by itself; withheld unless its
        policy shares "metrics"."""
        p, model, asked = self.params, self.model(site.table.schema), task.arrays.get("rounds")
        if not site.shares("metrics"):
            raise PolicyError("policy.withheld", "the site does not share its own metrics", field="share")
        if not p.alone or "alone" in site.state:
            raise PolicyError(
                "policy.not-in-plan", "the plan does not ask what a site learns alone, or not again", field="alone",
                remedy="the coordinator does not keep the plan: do not go on with it",
            )  # fmt: skip
        if asked is None or asked.shape != () or asked.dtype != np.int64 or not 0 <= int(asked) <= p.rounds:
            raise not_taken("rounds")
        site.state["alone"] = np.array(1)
        weights, examples = task.take("weights", (len(model.weights),)), self._kept.examples(site.table)
        nothing = dict.fromkeys(own_metrics(model), np.nan)
        if not len(examples):
            return nothing
        at = Local(p, model, examples, site, task, still(model, p.freeze))
        try:
            trained = at.sgd(weights.astype(model.dtype), steps=int(asked) * at.steps).weights
        except ProtocolError as error:
            if error.code != "site.diverged":
                raise
            return nothing
        scoring = asked_of(model, exact=True, personal=False)
        own = Task(task.id, {"weights": np.asarray(trained, np.float64)}, task.seed)
        found = handler_of(scoring, "own").answer(scoring, site, own)
        return {name: float(f"{float(value):.3g}") if name != "rows" else value for name, value in found.items()}
