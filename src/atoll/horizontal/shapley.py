"""FedAvg that finds out what each site adds to the model: Shapley values, round by round.

Sources: Liu et al. 2022, GTG-Shapley (see ``aggregation/contribution.py``); Song, Tong & Wei 2019, Profit Allocation
for Federated Learning (a coalition's model is rebuilt from the round's changes, and nobody trains again).

In each round the coordinator has every site's change Δᵢ of the weights w and its rows nᵢ. A coalition's model is w + Σ
nᵢΔᵢ / Σ nᵢ over its sites; its worth is how good that is on rows that the sites hold back from training, all sites'
together: the share it is right about (of values: how near it is), or the loss, negative. A site's value is the sum of
its values over the rounds; exact ones, and those by ``gtg`` without truncation, sum to what the run gained. Values can
be negative: the model is better without the site.

Parties: sites and coordinator. Messages: as in FedAvg, with single changes; then coalitions' models go out, several at
a time, and each time one Sum of how right each is comes back. The coordinator learns every site's change in every
round, so that the plan's protection must be ``plain``; sites learn coalitions' models, and so something of single
sites' changes: take part only where that is agreed. Threat model: honest sites; one that lies about what is right on
its rows moves values by its share of the rows. Dropout: a round values those that are in it. Cost: FedAvg's, and per
round (coalitions / models_per_round) round trips, each of that many models to every site: 2ⁿ − 2 coalitions when exact,
n when one is left out, about n² · passes by gtg, fewer the sooner worths settle, and next to none in a round that
changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from atoll.aggregation.contribution import Coalition, Method, Valuing, Worths, exact, gtg, leave_one_out, shares
from atoll.aggregation.rule import MEAN
from atoll.compression.update import Compression
from atoll.contract.capabilities import Capabilities
from atoll.contract.disclosure import check_groups
from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, SiteView, handler, program
from atoll.contract.rounds import Field as Declared
from atoll.contract.rounds import Gather, Gathered, Reply, Round, Steps, Sum, Task, count, real
from atoll.contract.updates import Update
from atoll.contract.wire import Array
from atoll.horizontal.fedavg import FedAvg
from atoll.horizontal.federated import Collecting, FederatedParams, State
from atoll.horizontal.local import Local
from atoll.horizontal.validation import Parts, labels, losses, right
from atoll.models.model import Model
from atoll.statistics.noise import fine
from atoll.statistics.scores import LOSS_CAP

MOST_EXACT = 8
"""Sites: 256 coalitions a round."""


class ShapleyParams(FederatedParams):
    """method: "gtg", "exact" (for at most 8 sites) or "leave_one_out". worth: "accuracy" or "loss". between, within:
    gtg's truncation, in units of the worth: rounds that change less, and coalitions that are nearer to all, count
    nothing more. passes: of gtg, at most; in one, a permutation begins with each site. validation: share of a site's
    training rows that models are judged by. models_per_round: coalitions' models sent at once."""

    method: Method = "gtg"
    worth: str = Field(default="accuracy", pattern="^(accuracy|loss)$")
    between: float = Field(default=1e-3, ge=0)
    within: float = Field(default=1e-3, ge=0)
    passes: int = Field(default=20, ge=1)
    validation: float = Field(default=0.2, gt=0, lt=1)
    models_per_round: int = Field(default=16, ge=1, le=256)

    @model_validator(mode="after")
    def _all_changes(self) -> Self:
        if self.aggregate.rule != MEAN:
            raise ValueError("values are those of the mean of changes: leave aggregate out")
        if self.compress != Compression():
            raise ValueError("values are those of whole changes: leave compress out")
        return self


@program("horizontal.shapley", needs={"gather", "sum"}, offers={"bounded", "resolution", "bounded-weight"})
class ShapleyFedAvg(FedAvg):
    """FedAvg with each site's contribution to the model: GTG-Shapley, exact Shapley, or leave-one-out."""

    Params = ShapleyParams

    @property
    def capabilities(self) -> Capabilities:
        """Single changes are needed."""
        return self.declared

    # -- at the coordinator

    def begin(self, model: Model, cohort: Cohort) -> State:
        """Nobody has added anything yet."""
        return {**super().begin(model, cohort), "values": np.zeros(len(cohort.sites)), "asked": np.zeros(())}

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """As FedAvg's, with {"contribution": {"method", "worth", "sites": {site: {"value", "share"}}, "gained": the sum
        of all values, "negative": sites without which the model is better, "coalitions": how many were judged}}."""
        if self.params.method == "exact" and len(cohort.sites) > MOST_EXACT:
            raise PlanError(
                "contribution.too-many-sites", f"exact values of {len(cohort.sites)} sites need all their coalitions",
                field="params.method", remedy="choose gtg or leave_one_out",
            )  # fmt: skip
        result = yield from super().coordinate(cohort, start)
        found = dict(zip(cohort.sites, result.pop("values").tolist(), strict=True))
        share = shares(found)
        result["contribution"] = {
            "method": self.params.method, "worth": self.params.worth,
            "sites": {site: {"value": found[site], "share": share[site]} for site in cohort.sites},
            "gained": sum(found.values()), "negative": [site for site, value in found.items() if value < 0],
            "coalitions": int(result.pop("asked")),
        }  # fmt: skip
        return result

    def reported(self, model: Model, state: State) -> Mapping[str, Any]:
        """For :meth:`coordinate`."""
        return {"values": state["values"], "asked": state["asked"]}

    def collect(
        self, cohort: Cohort, fields: Mapping[str, Declared], sent: State, number: int, state: State
    ) -> Collecting:
        """Every site's change; then what each is worth."""
        p, names = self.params, tuple(name for name in fields if name != "weight")
        found = yield Round("train_single", Gather(), fields, sent, draw=p.sites_per_round, paced=True)
        total = sum((Update.from_sum(found[site], names) for site in found), start=_nothing(fields, names))
        values, asked = yield from self._valued(cohort, found, state, number)
        state["values"] = state["values"] + [values.get(site, 0.0) for site in cohort.sites]
        state["asked"] = state["asked"] + asked
        return total, found.sites

    def _valued(self, cohort: Cohort, found: Gathered, state: State, number: int) -> Steps:
        """(value by site of one round, coalitions judged)."""
        p, model = self.params, self.model(cohort.schema)
        places = self.payload(cohort.schema).moving

        def made(coalition: Coalition) -> Array:
            """w + Σ nᵢΔᵢ / Σ nᵢ."""
            weights = np.array(state["weights"], np.float64)
            mass = sum(float(found[site]["weight"]) for site in coalition)
            if mass > 0:
                changes = [np.asarray(found[site]["weights"], np.float64) for site in sorted(coalition)]
                weights[places] += np.sum(changes, 0) / mass
            return weights.astype(model.dtype)

        valuing, judged = self._method(found.sites, cohort.seed, number), 0
        asked = next(valuing)
        while True:
            worths: Worths = {}
            for first in range(0, len(asked), p.models_per_round):
                some = asked[first : first + p.models_per_round]
                judged += len(some)
                worths |= yield from self._judged(cohort, model, some, [made(coalition) for coalition in some])
            try:
                asked = valuing.send(worths)
            except StopIteration as stop:
                return stop.value, judged

    def _method(self, sites: tuple[str, ...], seed: int, number: int) -> Valuing:
        p = self.params
        if p.method == "exact":
            return exact(sites)
        if p.method == "leave_one_out":
            return leave_one_out(sites)
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, number, 6))))
        return gtg(sites, random, between=p.between, within=p.within, most=p.passes)

    def _judged(self, cohort: Cohort, model: Model, some: list[Coalition], weights: list[Array]) -> Steps:
        """The worth of several coalitions' models, by one Sum."""
        rows = cohort.schema.max_rows
        most = rows * self._each()
        fields = {"rows": count(bound=rows), "worth": real(len(some), bound=most, step=fine(most))}
        total = yield Round("judge", Sum(), fields, {"models": np.stack(weights)})
        rows_in_all = max(int(total["rows"]), 1)
        return {each: float(worth) / rows_in_all for each, worth in zip(some, total["worth"], strict=True)}

    def _each(self) -> float:
        """What one row is worth at most."""
        return 1.0 if self.params.worth == "accuracy" else LOSS_CAP

    # -- at a site

    @handler("train_single", reduce="gather")
    def train_single(self, site: SiteView, task: Task) -> Reply:
        """At the site: the change of the weights by its own training, on the rows that are not held back."""
        return self.train(site, task)

    @handler("judge", groups=("rows",))
    def judge(self, site: SiteView, task: Task) -> Reply:
        """At the site: of each of several models, how right it is on rows that are held back, summed; and how many."""
        model, sent = self.model(site.table.schema), task.arrays.get("models")
        number = len(sent) if sent is not None and sent.ndim == 2 else 0
        models = task.take("models", (min(number, self.params.models_per_round), len(model.weights)))
        rows = Parts.of(site.table, site.name, self.params.validation).rows
        check_groups({"rows": np.array(len(rows))}, frozenset({"rows"}), site.min_group_size)
        found = np.zeros(len(models))
        if len(rows):
            y = labels(model, rows)
            for place, weights in enumerate(models):
                p = model.with_weights(weights).predict(rows)
                good = right(model, y, p, rows.schema) if self.params.worth == "accuracy" else -losses(model, y, p)
                found[place] = good.sum()
                site.progress(place, len(models))
        return {"rows": len(rows), "worth": found}

    def _at(self, site: SiteView, task: Task) -> tuple[Local, State]:
        at, sent = super()._at(site, task)
        kept = Parts.of(site.table, site.name, self.params.validation).kept
        return Local(at.params, at.model, at.examples.take(kept), site, task, at.fixed), sent


def _nothing(fields: Mapping[str, Declared], names: tuple[str, ...]) -> Update:
    return Update.zero_like({name: np.zeros([size or 0 for size in fields[name].shape]) for name in names})
