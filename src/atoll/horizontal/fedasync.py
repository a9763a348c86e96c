"""FedAsync: the coordinator mixes each site's weights into its own as they come, the less the older they are.

Source: Xie, Koyejo & Gupta 2019, Asynchronous Federated Optimization, Algorithm 1: w ← (1 − α_τ)·w + α_τ·wₖ with
α_τ = α·s(τ), s by §5.2 (polynomial or hinge), and sites that take SGD steps on F_k(w) + ρ/2 · ‖w − w_sent‖².

Parties: sites and coordinator. Messages: "train_next" sends the weights to sites that have nothing to do, and
streams back the next change of them, with the site's mean loss and its weight. What the coordinator learns: every
site's change, one by one: no sum hides it, so the plan's protection must be ``plain``. Dropout: the site is asked again
when it comes back. Cost: one round trip of the model's size per step; the coordinator keeps the weights that each site
was sent. A site's rows do not count in the mix: one that answers more often is heard more often. Where the order of
arrival is another, so is the model: what came when is stored with the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from pydantic import Field, field_validator

from atoll.compression.update import Compression
from atoll.contract.capabilities import Capabilities
from atoll.contract.program import Cohort, SiteView, handler, program
from atoll.contract.rounds import Field as Declared
from atoll.contract.rounds import Reply, Round, Stream, Task
from atoll.contract.updates import Update
from atoll.contract.wire import Array
from atoll.horizontal.fedbuff import AsyncParams, came_back, sent_out
from atoll.horizontal.federated import OFFERS, Collecting, State
from atoll.horizontal.fedprox import FedProx, FedProxParams
from atoll.models.model import Model


class FedAsyncParams(AsyncParams, FedProxParams):
    """mixing: α, how much of a site's weights is mixed in that are not old. proximal: ρ, by which a site is drawn to
    the weights that it was sent."""

    mixing: float = Field(default=0.6, gt=0, le=1)
    proximal: float = Field(default=0.005, ge=0)

    @field_validator("compress")
    @classmethod
    def _whole(cls, compress: Compression) -> Compression:
        if compress.keep < 1:
            raise ValueError("weights that are mixed one by one are sent whole: choose keep: 1")
        return compress


@program("horizontal.fedasync", needs={"stream"}, offers=OFFERS)
class FedAsync(FedProx):
    """Asynchronous learning: every change is mixed in as it comes."""

    Params = FedAsyncParams
    gaps: ClassVar[bool] = True

    @property
    def capabilities(self) -> Capabilities:
        """No sum is enough."""
        return self.declared

    def begin(self, model: Model, cohort: Cohort) -> State:
        """Nobody has anything to do. sent, since: what each site was sent last, [num_sites, size], and after how many
        steps; last: who answered."""
        state, sites = super().begin(model, cohort), len(cohort.sites)
        return {
            **state, "idle": np.ones(sites, np.int64), "sent": np.zeros((sites, self.size(model)), model.dtype),
            "since": np.zeros(sites), "now": np.array(0.0), "from": np.array(0),
        }  # fmt: skip

    def collect(
        self, cohort: Cohort, fields: Mapping[str, Declared], sent: State, number: int, state: State
    ) -> Collecting:
        """The next change that comes."""
        asked = sent_out(cohort, state, number, self.params.sites_per_round)
        places = [cohort.sites.index(site) for site in asked]
        for name, value in (("sent", sent["weights"]), ("since", number)):
            state[name] = state[name].copy()
            state[name][places] = value
        arrival = yield Round("train_next", Stream(), fields, sent, sites=asked)
        came_back(cohort, state, (arrival.site,))
        state |= {"now": np.array(float(number)), "from": np.array(cohort.sites.index(arrival.site))}
        return Update.from_sum(arrival.values, tuple(n for n in fields if n != "weight")), (arrival.site,)

    def step(self, state: State, mean: Mapping[str, Array], share: float) -> None:
        """w ← w + α·s(τ) · (wₖ − w), with wₖ the site's change of what it was sent."""
        place, p = int(state["from"]), self.params
        if not mean["weight"] > 0:  # it has no rows
            return
        rate = p.mixing * p.staleness.of(float(state["now"] - state["since"][place]))
        state["weights"] = state["weights"] + rate * (state["sent"][place] + mean["weights"] - state["weights"])

    @handler("train_next", reduce="stream")
    def train_next(self, site: SiteView, task: Task) -> Reply:
        """At the site: as in FedAvg."""
        return self.train(site, task)
