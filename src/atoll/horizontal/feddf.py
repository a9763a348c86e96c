"""FedDF: FedAvg, after which the coordinator's model learns what the sites' models predict on public rows.

Source: Lin, Kong, Stich & Jaggi 2020, Ensemble Distillation for Robust Model Fusion in Federated Learning (NeurIPS),
Algorithm 1. A site sends, beside the change of its weights, its own model's scores of the public rows; their mean is
AvgLogits: softmax does not see what a row's logits have in common. As the change of the weights it is weighted by rows;
with ``weighting: sites`` both are of sites alike. (Algorithm 3, of several architectures, averages the weights of those
alike, which shows the weights of one that is alone: FedMD serves these.)

Parties: sites and coordinator. Messages: as in FedAvg, and scores of the public rows. The coordinator learns what it
learns in FedAvg, and the weighted mean of the scores (each site's under ``plain``). Dropout: as in FedAvg. Cost: as in
FedAvg, and 8 bytes for each score; the coordinator takes ``distil_steps`` steps in a round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from atoll.contract.program import Cohort, program
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.horizontal.distillation import FAR, DistillationParams, at_coordinator, distilled, scores, width
from atoll.horizontal.fedavg import FedAvg
from atoll.horizontal.federated import OFFERS, FederatedParams, State
from atoll.horizontal.local import Local
from atoll.models.model import Model
from atoll.models.rows import Rows


class FedDfParams(FederatedParams, DistillationParams):
    """As FedAvg's; and the public rows."""


@program("horizontal.feddf", needs={"sum"}, offers=OFFERS)
class FedDf(FedAvg):
    """FedAvg with ensemble distillation at the coordinator."""

    Params = FedDfParams
    rows: Rows | None = None

    def public(self, schema: TableSchema) -> Rows:
        """The rows that everybody sees."""
        if self.rows is None or self.rows.schema is not schema:
            self.rows = self.params.rows(schema)
        return self.rows

    def begin(self, model: Model, cohort: Cohort) -> State:
        """Weights, and what the coordinator's mini-batches are drawn by."""
        model.examples(self.public(cohort.schema))  # refuses rows that do not suit the model
        return {**super().begin(model, cohort), "seed": np.array(cohort.seed), "round": np.array(0)}

    def extras(self, model: Model) -> Mapping[str, tuple[tuple[int, ...], float]]:
        """Scores of the public rows."""
        rows = self.public(self._kept.schema)
        return {"scores": ((len(rows), width(model, rows)), FAR)}

    def local(self, at: Local, sent: State) -> Mapping[str, Any]:
        """ClientUpdate, and what its model says of the public rows."""
        found = super().local(at, sent)
        own = at.model.with_weights(sent["weights"] + found["weights"])
        return {**found, "scores": scores(own, self.public(at.site.table.schema))}

    def step(self, state: State, mean: Mapping[str, Array], share: float) -> None:
        """Lines 6 to 10: the average, and then steps towards what the sites' models say on average."""
        super().step(state, mean, share)
        schema = self._kept.schema
        rows, model = self.public(schema), self.model(schema)
        at = at_coordinator(self.params, model, rows, int(state["seed"]), int(state["round"]))
        state["weights"] = distilled(at, rows, mean["scores"], state["weights"])
        state["round"] = state["round"] + 1
