"""IFCA: sites fall into clusters by themselves, and each cluster learns a model.

Source: Ghosh et al. 2020, An Efficient Framework for Clustered Federated Learning (NeurIPS), Algorithm 1, with model
averaging (option II): all clusters' weights go out, a site takes those of least loss on its rows, trains them, and says
which they are; each cluster averages its own sites' changes. Here a cluster that fewer than ``min_cluster`` sites chose
is not trained in that round: its sites take the next best one (of all, the most chosen, where none has so many).

Parties: sites and coordinator. Messages: "choose" sends all clusters' weights, one's after the other's; a site answers
with a one in its cluster's place of "choosers". "train" says which clusters are trained; a site answers with its change
in its cluster's place, zeros elsewhere, and a one in its cluster's place of "members". What the coordinator learns: how
many sites chose each cluster, the trained ones' weighted sums and how much weight is in each; who is in which only
under ``plain``. Sites learn all clusters' weights and which are trained. Threat model: a curious coordinator. One that
breaks the protocol can say that all are trained, or send clusters that part all sites, and so have a sum of one:
``adversary: active`` is refused without ``privacy``. Over regions, choosers are all sites', and a region's
operator sees its own region's sums, where one may be alone. Dropout: as in FedAvg; sites that chose a cluster and are
lost before they trained may leave it with fewer. Cost: as many times FedAvg's bytes as there are clusters, a short
round more each time, and one in the end. Under ``privacy`` the noise hides every site's part of any sum: then each
trains its own choice at once. Where the clusters begin decides much: try several seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from atoll.aggregation.rule import MEAN
from atoll.contract.disclosure import check_groups
from atoll.contract.program import Cohort, SiteView, handler, program
from atoll.contract.rounds import Field as Declared
from atoll.contract.rounds import Reply, Round, Sum, Task, count, not_taken
from atoll.contract.updates import Update
from atoll.contract.wire import Array
from atoll.horizontal.fedavg import FedAvg
from atoll.horizontal.federated import OFFERS, Collecting, FederatedParams, State
from atoll.horizontal.local import Local, layers_of
from atoll.models.linear import named
from atoll.models.model import Model

FEWEST = 1e-4
"""A cluster with less than this share of a round's weight stays as it is: it may be but rounding, or noise."""
PIECE = 1024
"""Rows whose loss is found at once."""
MODEL = frozenset({"weights", "coded", "version", "digest"})
"""What all clusters' weights travel as."""
WORST = np.finfo(np.float64).max


class IfcaParams(FederatedParams):
    """clusters: how many; with 1 this is FedAvg. min_cluster: fewer sites than this train no cluster (1: also one does,
    and the coordinator has its change). spread: standard deviation of the weights that clusters begin with where the
    model itself begins alike for every seed (a linear one does)."""

    clusters: int = Field(default=2, ge=1, le=64)
    min_cluster: int = Field(default=3, ge=1)
    spread: float = Field(default=0.1, gt=0)

    @model_validator(mode="after")
    def _averaged(self) -> Self:
        if self.clusters > 1 and self.aggregate.rule != MEAN:  # the zeros of sites in other clusters are no outliers
            raise ValueError(
                "a rule of aggregate would weigh a cluster's sites against those of the others: use the mean"
            )
        return self


@program("horizontal.ifca", needs={"sum"}, offers=OFFERS)
class Ifca(FedAvg):
    """Clusters of sites, each with a model; a site chooses the one that fits its rows."""

    Params = IfcaParams
    personal: ClassVar[bool] = True

    @property
    def self_chosen(self) -> bool:
        """Sites choose of which sum they are: a coordinator that breaks the protocol could have sums of one."""
        return bool(self.params.clusters > 1)

    def size(self, model: Model) -> int:
        """All clusters' weights."""
        return int(self.params.clusters) * len(model.weights)

    def begin(self, model: Model, cohort: Cohort) -> State:
        """Every cluster from another seed, but for what is frozen. members: each one's share of the last round."""
        count, seed = self.params.clusters, cohort.seed
        first = np.stack([model.initial(seed + j) for j in range(count)])
        if count > 1 and np.array_equal(first[0], first[1]):
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, count, 2))))
            first = first + random.normal(0, self.params.spread, first.shape)
        frozen = layers_of(model, self.params.freeze)
        first[:, frozen] = first[0, frozen]
        return {"weights": first.ravel(), "members": np.full(count, 1 / count)}

    def collect(
        self, cohort: Cohort, fields: Mapping[str, Declared], sent: State, number: int, state: State
    ) -> Collecting:
        """Ask who would choose which cluster, then have those trained that enough sites chose."""
        p = self.params
        if p.clusters == 1 or p.min_cluster == 1 or not cohort.exact:
            return (yield from super().collect(cohort, fields, sent, number, state))
        asked = {"choosers": count(p.clusters, bound=1)}
        chosen = yield Round("choose", Sum(), asked, sent, self.link.apart, draw=p.sites_per_round)
        trained = chosen["choosers"] >= p.min_cluster
        trained[np.argmax(chosen["choosers"])] |= not trained.any()
        rest = {name: value for name, value in sent.items() if name not in MODEL}
        rest["trained"] = trained.astype(np.float64)
        sites, among = (chosen.sites, False) if chosen.cohort is None else (chosen.cohort, True)
        total = yield Round("train", Sum(), fields, rest, sites=sites, among=among, paced=True)
        return Update.from_sum(total, tuple(name for name in fields if name != "weight")), total.sites

    def extras(self, model: Model) -> Mapping[str, tuple[tuple[int, ...], float]]:
        """A one in the place of the site's cluster."""
        return {"members": ((self.params.clusters,), 1.0)}

    def local(self, at: Local, sent: State) -> Mapping[str, Any]:
        """The cluster of least loss, and its change by a round of SGD."""
        clusters = self._clusters(sent)
        change, members = np.zeros(clusters.shape), np.zeros(len(clusters))
        losses = at.site.state.pop("losses") if "losses" in at.site.state else losses_of(at, clusters)
        chosen = least(losses, self._trained(at.task))
        done = at.sgd(clusters[chosen])
        change[chosen], members[chosen] = done.weights - clusters[chosen], 1
        return {"weights": change.ravel(), "members": members, "loss": done.loss}

    def step(self, state: State, mean: Mapping[str, Array], share: float) -> None:
        """Each cluster by the mean change of its own sites."""
        members, weights, clip = np.asarray(mean["members"]), self._clusters(state).copy(), self.params.clip
        there = members > FEWEST
        change = np.asarray(mean["weights"]).reshape(weights.shape)
        weights[there] += np.clip(change[there] / members[there, None], -clip, clip)
        state.update(weights=weights.ravel(), members=members)

    def final(self, model: Model, state: State) -> Model:
        """The largest cluster's."""
        return model.with_weights(self._clusters(state)[self._order(state)[0]])

    def reported(self, model: Model, state: State) -> Mapping[str, Any]:
        """The clusters, largest first: each one's share of the last round's weight, and a linear model's coefficients.
        All their weights are stored with the model's as "clusters", [clusters, num_weights]."""
        order, clusters = self._order(state), self._clusters(state)
        shares = np.clip(state["members"], 0, 1)  # under noise they may be beyond
        told = [{"share": float(shares[j]), **named(model.with_weights(clusters[j]))} for j in order]
        return {"clusters": told, "arrays": {"clusters": clusters[order]}}

    def mine(self, at: Local, sent: State) -> Array:
        """The cluster of least loss."""
        clusters = self._clusters(sent)
        chosen: Array = clusters[least(losses_of(at, clusters), np.ones(len(clusters), bool))]
        return chosen

    # -- at a site

    @handler("choose")
    def choose(self, site: SiteView, task: Task) -> Reply:
        """Which cluster the site would train; it keeps them all until it is told which are trained."""
        at, sent = self._at(site, task)
        clusters, choosers = self._clusters(sent), np.zeros(self.params.clusters, np.int64)
        if len(at.examples):
            check_groups({"weight": np.array(len(at.examples))}, frozenset({"weight"}), site.min_group_size)
            site.state["losses"] = losses_of(at, clusters)
            choosers[least(site.state["losses"], choosers == 0)] = 1
        site.state["clusters"] = sent["weights"].astype(at.model.dtype)
        return {"choosers": choosers}

    @handler("train", site=FedAvg._per_site)
    def train(self, site: SiteView, task: Task) -> Reply:
        """As in FedAvg; a site that did not choose has nothing to train."""
        if "trained" in task.arrays and "clusters" not in site.state:
            self._counts(site, 0.0)
            return {**self.payload(site.table.schema).zeros(), "weight": 0.0}
        return super().train(site, task)

    def _sent(self, site: SiteView, task: Task, model: Model) -> State:
        if "trained" not in task.arrays:
            return super()._sent(site, task, model)
        return {"weights": site.state.pop("clusters").astype(np.float64)}

    def _trained(self, task: Task) -> NDArray[np.bool_]:
        """The clusters that may be trained: all, unless the task says which; raises ProtocolError for none."""
        if "trained" not in task.arrays:
            return np.ones(self.params.clusters, bool)
        trained: NDArray[np.bool_] = task.take("trained", (self.params.clusters,)) > 0
        if not trained.any():
            raise not_taken("trained")
        return trained

    def _clusters(self, state: State) -> NDArray[np.float64]:
        return np.asarray(state["weights"], np.float64).reshape(self.params.clusters, -1)

    def _order(self, state: State) -> NDArray[np.int64]:
        return np.argsort(-state["members"], kind="stable")


def losses_of(at: Local, clusters: NDArray[np.float64]) -> NDArray[np.float64]:
    """The loss of each cluster's weights, of [clusters, num_weights], on all the site's rows."""
    pieces = [at.examples.take(slice(i, i + PIECE)) for i in range(0, len(at.examples), PIECE)]
    losses = []
    for number, weights in enumerate(clusters):
        at.site.progress(number, len(clusters))
        losses.append(sum(len(piece) * at.model.loss_and_gradient(weights, piece)[0] for piece in pieces))
    return np.array(losses)


def least(losses: NDArray[np.float64], some: NDArray[np.bool_]) -> int:
    """The place of the least loss, of *some*."""
    return int(np.argmin(np.where(some, np.nan_to_num(losses, nan=WORST, posinf=WORST), np.inf)))
