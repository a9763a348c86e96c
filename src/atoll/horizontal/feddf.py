"""FedDF: FedAvg, after which the coordinator's model learns what the sites' models predict on public rows.

Source: Lin, Kong, Stich & Jaggi 2020, Ensemble Distillation for Robust Model Fusion in Federated Learning (NeurIPS),
Algorithm 1; with sites of several architectures Algorithm 3: those alike average their weights into a prototype, and
each prototype learns what *all* sites' models say. A site sends, beside the change of its weights, its own model's
scores of the public rows; their mean is AvgLogits: softmax does not see what a row's logits have in common. As the
change of the weights it is weighted by rows; with ``weighting: sites`` both are of sites alike.

Parties: sites and coordinator. Messages: as in FedAvg, of all prototypes, where a site changes its own only; scores of
the public rows; and which prototype it is that changed. The coordinator learns what it learns in FedAvg, of each
prototype, and the weighted mean of the scores (each site's under ``plain``). Dropout: as in FedAvg; a prototype without
survivors is distilled only. Cost: as in FedAvg, of all prototypes together, and 8 bytes for each score; the coordinator
takes ``distil_steps`` steps in a round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.program import Cohort, SiteView, handler, program
from atoll.contract.rounds import Reply, Task
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.horizontal.distillation import FAR, DistillationParams, at_coordinator, distilled, scores, width
from atoll.horizontal.fedavg import FedAvg
from atoll.horizontal.federated import OFFERS, Federated, FederatedParams, State
from atoll.horizontal.local import Local, layers_of
from atoll.horizontal.rows import Rows
from atoll.models.model import Model, kept

FEWEST = 1e-6
"""A prototype with less of a round's weight had nobody in it."""


class FedDfParams(FederatedParams, DistillationParams):
    """As FedAvg's; the public rows, and sites' architectures."""


@program("horizontal.feddf", needs={"sum"}, offers=OFFERS)
class FedDf(FedAvg):
    """FedAvg with ensemble distillation at the coordinator."""

    Params = FedDfParams
    rows: Rows
    prototypes: list[tuple[Model, slice]]
    """Each architecture with its place in "weights"; the first is the federation's own."""

    def __init__(self, params: FedDfParams) -> None:
        super().__init__(params)
        self.personal = bool(params.models)  # type: ignore[misc]  # of sites whose architecture is not the result's

    def model(self, schema: TableSchema) -> Model:
        """The model it fits, before any fitting."""
        if getattr(self, "rows", None) is None or self.rows.schema is not schema:
            self.rows, self.prototypes, at = self.params.rows(schema), [], 0
            for model in self.params.architectures(self.rows).values():
                if model.spec() not in [known.spec() for known, _ in self.prototypes]:
                    self.prototypes.append((model, slice(at, at := at + len(model.weights))))
        return self.prototypes[0][0]

    def size(self, model: Model) -> int:
        """All prototypes, one after the other."""
        return sum(len(made.weights) for made, _ in self.prototypes)

    def begin(self, model: Model, cohort: Cohort) -> State:
        """Weights, and what the coordinator's mini-batches are drawn by."""
        weights = np.concatenate([made.initial(cohort.seed) for made, _ in self.prototypes])
        return {"weights": weights, "seed": np.array(cohort.seed), "round": np.array(0)}

    def extras(self, model: Model) -> Mapping[str, tuple[tuple[int, ...], float]]:
        """Scores of the public rows; of several prototypes, which one is the site's."""
        found: dict[str, tuple[tuple[int, ...], float]] = {"scores": ((len(self.rows), width(model, self.rows)), FAR)}
        return found | ({"members": ((len(self.prototypes),), 1.0)} if len(self.prototypes) > 1 else {})

    def frozen(self, model: Model) -> NDArray[np.bool_]:
        """Of every prototype, [size]."""
        return np.concatenate([layers_of(made, self.params.freeze) for made, _ in self.prototypes])

    def local(self, at: Local, sent: State) -> Mapping[str, Any]:
        """ClientUpdate of the site's prototype, and what it then says of the public rows."""
        place = self._place(at.model)
        where = self.prototypes[place][1]
        found = super().local(at, {"weights": sent["weights"][where]})
        change = np.zeros(len(sent["weights"]))
        change[where] = found["weights"]
        told = scores(at.model.with_weights(sent["weights"][where] + found["weights"]), self.rows)
        return {**found, "weights": change, "scores": told, "members": np.eye(len(self.prototypes))[place]}

    def step(self, state: State, mean: Mapping[str, Array], share: float) -> None:
        """Averages of those alike, and then steps towards what all sites' models say on average."""
        weights, members = state["weights"].copy(), mean.get("members", np.ones(1))
        for (model, where), part in zip(self.prototypes, members, strict=True):
            if part > FEWEST:
                weights[where] += np.clip(mean["weights"][where] / part, -self.params.clip, self.params.clip)
            at = at_coordinator(self.params, model, self.rows, int(state["seed"]), int(state["round"]))
            weights[where] = distilled(at, self.rows, mean["scores"], weights[where])
        state.update(weights=weights, round=state["round"] + 1)

    def final(self, model: Model, state: State) -> Model:
        """The first prototype."""
        return model.with_weights(state["weights"][self.prototypes[0][1]])

    def _place(self, model: Model) -> int:
        return [made.spec() for made, _ in self.prototypes].index(model.spec())

    def _at(self, site: SiteView, task: Task) -> tuple[Local, State]:
        at, sent = super()._at(site, task)
        if site.name not in self.params.models:
            return at, sent
        params = self.params.of(site.name)
        own = params.unfitted(site.table.schema)
        fixed = layers_of(own, params.freeze)
        made = replace(
            at, params=params, model=own, examples=own.examples(site.table), fixed=fixed if fixed.any() else None
        )
        return made, sent

    @handler("personalise", record=Federated._nothing, site=Federated._nothing)
    def personalise(self, site: SiteView, task: Task) -> Reply:
        """At the site: it keeps its prototype; what leaves is that it did."""
        at, sent = self._at(site, task)
        where = self.prototypes[self._place(at.model)][1]
        site.personal.update(kept(at.model.with_weights(sent["weights"][where])))
        return {"sites": 1}
