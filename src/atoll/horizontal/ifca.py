"""IFCA: sites fall into clusters by themselves, and each cluster learns a model.

Source: Ghosh et al. 2020, An Efficient Framework for Clustered Federated Learning (NeurIPS), Algorithm 1, with model
averaging (option II): all clusters' weights go out, a site takes those of least loss on its rows, trains them, and says
which they are; each cluster averages its own sites' changes.

Parties: sites and coordinator. Messages: "weights", one cluster's after the other's; a site answers with its change in
its cluster's place, zeros elsewhere, and a one in its cluster's place of "members". What the coordinator learns: the
clusters' weighted sums and how much weight is in each; who is in which only under ``plain``. A cluster of one site
shows that site's mean change and rows, whatever hides its share of a sum; and a coordinator that breaks the protocol
can send clusters that part all sites. So a policy that holds to ``min_sites`` should not list this program. Sites learn
all clusters' weights. Dropout: as in FedAvg. Cost: as many times FedAvg's bytes as there are clusters, and one round
more. Where the clusters begin decides much: try several seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from atoll.aggregation.rule import MEAN
from atoll.contract.program import Cohort, program
from atoll.contract.wire import Array
from atoll.horizontal.fedavg import FedAvg
from atoll.horizontal.federated import OFFERS, FederatedParams, State
from atoll.horizontal.local import Local, layers_of
from atoll.models.linear import named
from atoll.models.model import Model

FEWEST = 1e-4
"""A cluster with less than this share of a round's weight stays as it is: it may be but rounding, or noise."""
PIECE = 1024
"""Rows whose loss is found at once."""


class IfcaParams(FederatedParams):
    """clusters: how many; with 1 this is FedAvg. spread: standard deviation of the weights that clusters begin with
    where the model itself begins alike for every seed (a linear one does)."""

    clusters: int = Field(default=2, ge=1, le=64)
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

    def extras(self, model: Model) -> Mapping[str, tuple[tuple[int, ...], float]]:
        """A one in the place of the site's cluster."""
        return {"members": ((self.params.clusters,), 1.0)}

    def local(self, at: Local, sent: State) -> Mapping[str, Any]:
        """The cluster of least loss, and its change by a round of SGD."""
        clusters = self._clusters(sent)
        change, members = np.zeros(clusters.shape), np.zeros(len(clusters))
        chosen = nearest(at, clusters)
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
        chosen: Array = clusters[nearest(at, clusters)]
        return chosen

    def _clusters(self, state: State) -> NDArray[np.float64]:
        return np.asarray(state["weights"], np.float64).reshape(self.params.clusters, -1)

    def _order(self, state: State) -> NDArray[np.int64]:
        return np.argsort(-state["members"], kind="stable")


def nearest(at: Local, clusters: NDArray[np.float64]) -> int:
    """The place of the weights, of [clusters, num_weights], with the least loss on all the site's rows."""
    pieces = [at.examples.take(slice(i, i + PIECE)) for i in range(0, len(at.examples), PIECE)]
    losses = []
    for number, weights in enumerate(clusters):
        at.site.progress(number, len(clusters))
        losses.append(sum(len(piece) * at.model.loss_and_gradient(weights, piece)[0] for piece in pieces))
    return int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))
