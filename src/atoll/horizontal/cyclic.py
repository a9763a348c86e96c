"""Cyclic weight transfer: one model goes from site to site, each trains it on, and then it goes round again.

Source: Chang et al. 2018, Distributed Deep Learning Networks among Institutions for Medical Imaging (JAMIA), "cyclical
weight transfer"; the order drawn anew in each cycle as in FLamby (Ogier du Terrail et al. 2022), ``Cyclic``.

Parties: sites and coordinator, which carries the model from one to the next. Messages: the weights go to one site; its
change of them comes back, and its mean loss. The coordinator learns every site's change: no sum hides it, so the plan's
protection must be ``plain``; sites learn the model as the one before left it. Dropout: the site is skipped. Cost: one
round trip of the model's size per site and cycle, one after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field

from atoll.compression.update import FINE
from atoll.contract.disclosure import check_groups
from atoll.contract.program import Cohort, SiteView, handler, program
from atoll.contract.rounds import Checkpoint, Gather, Metrics, Reply, Round, Steps, Task, real
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.horizontal.local import Kept, Local, LocalParams, layers_of, still
from atoll.models.linear import named
from atoll.models.model import Model
from atoll.statistics.evaluation import scored


class CyclicParams(LocalParams):
    """rounds: cycles through all sites. order: "random", drawn anew for each cycle by the plan's seed, or "fixed", the
    cohort's. clip: a site's change of any one weight is clipped to it. evaluate_every: score on held-out rows after so
    many cycles."""

    rounds: int = Field(default=20, ge=1)
    order: Literal["random", "fixed"] = "random"
    clip: float = Field(default=10.0, gt=0)
    evaluate_every: int | None = Field(default=None, ge=1)
    checkpoint_every: int = Field(default=10, ge=1)


@program("horizontal.cyclic", needs={"gather"}, offers={"bounded", "resolution"})
class Cyclic:
    """A model that learns at one site after the other, in cycles."""

    Params = CyclicParams
    personal = False

    def __init__(self, params: CyclicParams) -> None:
        self.params, self._kept = params, Kept(params)

    def model(self, schema: TableSchema) -> Model:
        """The model it fits, before any fitting; what evaluation is then asked about."""
        return self._kept.model(schema)

    def order(self, cohort: Cohort, cycle: int) -> tuple[str, ...]:
        """The sites as the model comes to them."""
        if self.params.order == "fixed":
            return cohort.sites
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((cohort.seed, cycle, 3))))
        return tuple(cohort.sites[place] for place in random.permutation(len(cohort.sites)))

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"model", "history": mean of the sites' losses by cycle, and a linear model's "coefficients"}."""
        model, p = self.model(cohort.schema), self.params
        layers_of(model, p.freeze)
        weights, history = model.initial(cohort.seed), []
        if start is not None:
            weights, history = start["weights"], start["history"].tolist()
        fields = {"weights": real(len(weights), bound=p.clip, step=FINE), "loss": real(bound=p.clip, step=FINE)}
        for cycle in range(len(history), p.rounds):
            losses = []
            for site in self.order(cohort, cycle):
                found = yield Round("train", Gather(), fields, {"weights": weights.astype(model.dtype)}, sites=(site,))
                if site in found:
                    weights = weights + found[site]["weights"]
                    losses.append(float(found[site]["loss"]))
            history.append(sum(losses) / max(len(losses), 1))
            used_up = yield Metrics(cycle, {"loss": history[-1]})
            done = cycle + 1
            if p.evaluate_every and done % p.evaluate_every == 0 and done < p.rounds:
                yield from scored(self, cohort, weights, cycle)
            if used_up:
                break
            if done % p.checkpoint_every == 0:
                yield Checkpoint({"weights": weights, "history": np.array(history)})
        model = model.with_weights(weights)
        return {"model": model, "history": history, "iterations": len(history), **named(model)}

    @handler("train", reduce="gather")
    def train(self, site: SiteView, task: Task) -> Reply:
        """At the site: its own training's change of the weights that the sites before left, and the mean loss."""
        p, model = self.params, self.model(site.table.schema)
        weights, examples = task.take("weights", (len(model.weights),)), self._kept.examples(site.table)
        if not len(examples):
            return {"weights": np.zeros(len(weights)), "loss": 0.0}
        check_groups({"weight": np.array(len(examples))}, frozenset({"weight"}), site.min_group_size)
        done = Local(p, model, examples, site, task, still(model, p.freeze)).sgd(weights)
        return {
            "weights": np.clip(done.weights - weights, -p.clip, p.clip),
            "loss": np.clip(done.loss, -p.clip, p.clip),
        }
