"""FedAvgM: FedAvg whose coordinator moves with momentum.

Source: Hsu, Qi & Brown 2019, Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification, §4: v ← β·v + Δ, w ← w + η·v, with Δ the mean change of a round.

Parties: sites and coordinator. Messages: as in FedAvg; the momentum stays at the coordinator. What the coordinator
learns: as in FedAvg. Dropout: as in FedAvg. Cost: as in FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from atoll.aggregation.optimizers import momentum, started
from atoll.contract.program import Cohort, program
from atoll.contract.wire import Array
from atoll.horizontal.fedavg import FedAvg
from atoll.horizontal.federated import OFFERS, FederatedParams, State
from atoll.models.model import Model


class FedAvgMParams(FederatedParams):
    """server_momentum: β, of the coordinator's steps; with 0 this is FedAvg. server_learning_rate: η; in the long run
    a step is η / (1 − β) times FedAvg's."""

    server_momentum: float = Field(default=0.9, ge=0, lt=1)
    server_learning_rate: float = Field(default=0.1, gt=0)


@program("horizontal.fedavgm", needs={"sum"}, offers=OFFERS)
class FedAvgM(FedAvg):
    """FedAvg with momentum at the coordinator."""

    Params = FedAvgMParams

    def begin(self, model: Model, cohort: Cohort) -> State:
        """Without any speed."""
        state = started(model.initial(cohort.seed), model.running)
        return {**state, "velocity": np.zeros(self.size(model))}

    def step(self, state: State, mean: Mapping[str, Array], share: float) -> None:
        """v ← β·v + Δ; w ← w + η·v."""
        p = self.params
        momentum(state, mean["weights"], rate=p.server_learning_rate, beta=p.server_momentum)
