"""FedAdam, FedYogi and FedAdagrad: FedAvg whose coordinator takes adaptive steps, each weight at its own pace.

Source: Reddi et al. 2021, Adaptive Federated Optimization (ICLR), Algorithm 2; without correction for the beginning,
and v₋₁ = τ².

Parties: sites and coordinator. Messages: as in FedAvg; moments stay at the coordinator. What the coordinator learns: as
in FedAvg. Dropout: as in FedAvg. Cost: as in FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from pydantic import Field

from atoll.aggregation.optimizers import Squares, adagrad, adam, adaptive, started, yogi
from atoll.contract.program import Cohort, program
from atoll.contract.wire import Array
from atoll.horizontal.fedavg import FedAvg
from atoll.horizontal.federated import OFFERS, FederatedParams, State
from atoll.models.model import Model


class AdagradParams(FederatedParams):
    """server_learning_rate: η; while τ is small a weight moves by about so much in a round. beta1: β₁, of the mean
    change. tau: τ, how adaptive the steps are: less so the larger it is."""

    server_learning_rate: float = Field(default=0.03, gt=0)
    beta1: float = Field(default=0.0, ge=0, lt=1)
    tau: float = Field(default=1e-3, gt=0)


class AdamParams(AdagradParams):
    """beta2: β₂, of its squares."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)


def begun(learner: FedAvg, model: Model, cohort: Cohort) -> State:
    """The state of all three: m = 0 and v = τ²."""
    size = learner.size(model)
    moments = {"moment": np.zeros(size), "squares": np.full(size, learner.params.tau**2)}
    return {**started(model.initial(cohort.seed), model.running), **moments}


def stepped(learner: FedAvg, state: State, change: Array, squares: Squares) -> None:
    """The coordinator's step of all three."""
    p = learner.params
    adaptive(state, change, squares, rate=p.server_learning_rate, beta1=p.beta1, tau=p.tau)


@program("horizontal.fedadagrad", needs={"sum"}, offers=OFFERS)
class FedAdagrad(FedAvg):
    """FedAvg with Adagrad at the coordinator."""

    Params = AdagradParams
    begin = begun

    def step(self, state: State, mean: Mapping[str, Array], share: float) -> None:
        """v ← v + Δ²."""
        stepped(self, state, mean["weights"], adagrad)


@program("horizontal.fedadam", needs={"sum"}, offers=OFFERS)
class FedAdam(FedAvg):
    """FedAvg with Adam at the coordinator."""

    Params = AdamParams
    begin = begun

    def step(self, state: State, mean: Mapping[str, Array], share: float) -> None:
        """v ← β₂·v + (1 − β₂)·Δ²."""
        stepped(self, state, mean["weights"], partial(adam, beta2=self.params.beta2))


@program("horizontal.fedyogi", needs={"sum"}, offers=OFFERS)
class FedYogi(FedAvg):
    """FedAvg with Yogi at the coordinator."""

    Params = AdamParams
    begin = begun

    def step(self, state: State, mean: Mapping[str, Array], share: float) -> None:
        """v ← v − (1 − β₂)·Δ²·sign(v − Δ²)."""
        stepped(self, state, mean["weights"], partial(yogi, beta2=self.params.beta2))
