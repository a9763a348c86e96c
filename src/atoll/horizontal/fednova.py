"""FedNova: FedAvg for sites that do unequal work, where FedAvg leans towards those that take more steps.

Source: Wang et al. 2020, Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization
(NeurIPS), §4: each site's change is divided by ‖aₖ‖₁, its number of steps (with local momentum: how often its
gradients stand in the change), and the mean of these is multiplied by τ_eff, here the mean of ‖aₖ‖₁.

Parties: sites and coordinator. Messages: as in FedAvg, and each site sends its ‖aₖ‖₁. What the coordinator learns: as
in FedAvg, and the mean of ‖aₖ‖₁ (each site's under ``plain``). Dropout: as in FedAvg. Cost: as in FedAvg, and one
number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from atoll.aggregation.optimizers import move, started
from atoll.contract.program import Cohort, program
from atoll.contract.wire import Array
from atoll.horizontal.federated import OFFERS, Federated, FederatedParams, State
from atoll.horizontal.local import Local, effort
from atoll.models.model import Model


class FedNovaParams(FederatedParams):
    """most_steps: a site's steps in a round count up to this (the declared bound). clip, clip_norm_l2: of the change by
    one step."""

    most_steps: int = Field(default=100_000, ge=1)


@program("horizontal.fednova", needs={"sum"}, offers=OFFERS)
class FedNova(Federated):
    """Normalised averaging: sites may take unequal numbers of steps."""

    Params = FedNovaParams

    def begin(self, model: Model, cohort: Cohort) -> State:
        """As FedAvg."""
        return started(model.initial(cohort.seed), model.running)

    def extras(self, model: Model) -> Mapping[str, tuple[tuple[int, ...], float]]:
        """‖aₖ‖₁."""
        return {"steps": ((), effort(self.params.most_steps, self.params.momentum))}

    def local(self, at: Local, sent: State) -> Mapping[str, Any]:
        """The change by a round of SGD, divided by ‖aₖ‖₁; what follows the data is not."""
        done = at.sgd(sent["weights"])
        steps = effort(min(done.steps, self.params.most_steps), self.params.momentum)
        change = done.weights - sent["weights"]
        each = change / steps
        each[at.model.running] = change[at.model.running]
        return {"weights": each, "loss": done.loss, "steps": steps}

    def step(self, state: State, mean: Mapping[str, Array], share: float) -> None:
        """w ← w + τ_eff · Σ nₖ/n · (wₖ − w) / ‖aₖ‖₁."""
        together = max(float(mean["steps"]), 1.0)  # noise may make it less
        move(state, together * mean["weights"], mean["weights"])
