"""FedDyn: sites whose own objectives are bent, round by round, until their optimum is the federation's.

Source: Acar et al. 2021, Federated Learning Based on Dynamic Regularization (ICLR), Algorithm 1: a site takes steps on
Fₖ(w) − ⟨gₖ, w⟩ + α/2 · ‖w − w_t‖², then gₖ ← gₖ − α·(wₖ − w_t); the coordinator keeps h ← h − α · 1/m · Σ (wₖ − w_t),
of all m sites, and goes to the mean of the wₖ less h/α.

Parties: sites and coordinator. Messages: as in FedAvg; h stays at the coordinator, each site keeps its gₖ. What the
coordinator learns: as in FedAvg. Dropout: the round is of the survivors; one that is lost after it has answered has
changed a gₖ that h does not know of. Cost: as in FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from atoll.aggregation.optimizers import move, started
from atoll.contract.program import Cohort, program
from atoll.contract.wire import Array
from atoll.horizontal.federated import OFFERS, Federated, FederatedParams, State
from atoll.horizontal.local import Local
from atoll.models.model import Model


class FedDynParams(FederatedParams):
    """alpha: α, by which a site is drawn to the federation's weights: the less, the farther a round goes. weighting:
    every site alike, as in the paper, or by "rows"."""

    alpha: float = Field(default=0.1, gt=0)
    weighting: Literal["rows", "sites"] = "sites"


@program("horizontal.feddyn", needs={"sum"}, offers=OFFERS)
class FedDyn(Federated):
    """Dynamic regularisation, for sites whose data differ."""

    Params = FedDynParams
    stateful: ClassVar[bool] = True

    def begin(self, model: Model, cohort: Cohort) -> State:
        """h = 0, as all gₖ."""
        return {**started(model.initial(cohort.seed), model.running), "drift": np.zeros(self.size(model))}

    def local(self, at: Local, sent: State) -> Mapping[str, Any]:
        """SGD on Fₖ(w) − ⟨gₖ, w⟩ + α/2 · ‖w − w_t‖²; gₖ follows the change that is sent."""
        start, alpha = sent["weights"].astype(at.model.dtype), np.asarray(self.params.alpha, at.model.dtype)
        own = at.site.state.get("slope", np.zeros_like(start))
        done = at.sgd(start, lambda weights, _, gradient: gradient - own + alpha * (weights - start))
        change = self.params.bounded(done.weights - start)
        at.site.state["slope"] = own - alpha * change
        return {"weights": change, "loss": done.loss}

    def step(self, state: State, mean: Mapping[str, Array], share: float) -> None:
        """h ← h − α · |P|/m · Δ; w ← w + Δ − h/α."""
        state["drift"] = state["drift"] - self.params.alpha * share * mean["weights"]
        move(state, mean["weights"] - state["drift"] / self.params.alpha, mean["weights"])
