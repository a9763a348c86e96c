"""SCAFFOLD: FedAvg whose sites correct each step by how their gradients differ from the federation's.

Source: Karimireddy et al. 2020, SCAFFOLD: Stochastic Controlled Averaging for Federated Learning (ICML), Algorithm 1
with option II: cₖ ← cₖ − c + (w − wₖ) / (K·η). With local momentum, K is how often the gradients stand in the change
(Wang et al. 2020, §4), so that cₖ is still a mean of gradients.

Parties: sites and coordinator. Messages: the weights and the mean control variate c go out; each round is one Sum of
the changes of the weights and of the sites' control variates. What the coordinator learns: the mean change of both
(each site's under ``plain``: its control variate is about its gradient). Each site keeps its own cₖ. Dropout: the round
is of the survivors; one that is lost after it has answered has changed a cₖ that c does not know of. Cost: as FedAvg,
twice the bytes.
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
from atoll.horizontal.local import Local, effort
from atoll.models.model import Model


class ScaffoldParams(FederatedParams):
    """weighting: every site alike, as in the paper, or by "rows". server_learning_rate: of the coordinator's steps.
    control_clip: a control variate's change in a round, which is about a gradient, is clipped to it in each element
    (this is the bound); what is lost of it comes with the next."""

    weighting: Literal["rows", "sites"] = "sites"
    server_learning_rate: float = Field(default=1.0, gt=0)
    control_clip: float = Field(default=10.0, gt=0)


@program("horizontal.scaffold", needs={"sum"}, offers=OFFERS)
class Scaffold(Federated):
    """Stochastic controlled averaging, for sites whose data differ."""

    Params = ScaffoldParams
    stateful: ClassVar[bool] = True
    told = ("weights", "control")

    def begin(self, model: Model, cohort: Cohort) -> State:
        """c = 0, as all cₖ."""
        return {**started(model.initial(cohort.seed), model.running), "control": np.zeros(self.size(model))}

    def extras(self, model: Model) -> Mapping[str, tuple[tuple[int, ...], float]]:
        """The change of cₖ."""
        return {"control": ((len(self._moving(model)),), self.params.control_clip)}

    def local(self, at: Local, sent: State) -> Mapping[str, Any]:
        """Steps against gₖ(w) − cₖ + c; then the changes of w and of cₖ, which is (w − wₖ) / (K·η) − c."""
        p, start, control = self.params, sent["weights"], sent["control"]
        own = at.site.state.get("control", np.zeros_like(control))
        towards = (control - own).astype(at.model.dtype)
        done = at.sgd(start, lambda _, __, gradient: gradient + towards)
        change = (start - done.weights) / (at.params.learning_rate * effort(done.steps, p.momentum)) - control
        change[at.model.running] = 0
        change = np.clip(change, -p.control_clip, p.control_clip)
        at.site.state["control"] = own + change
        return {
            "weights": done.weights - start,
            "loss": done.loss,
            "control": change[self.payload(at.site.table.schema).moving],
        }

    def step(self, state: State, mean: Mapping[str, Array], share: float) -> None:
        """w ← w + η_g · Δw; c ← c + |S| / N · Δc."""
        move(state, self.params.server_learning_rate * mean["weights"], mean["weights"])
        state["control"] = state["control"] + share * mean["control"]
