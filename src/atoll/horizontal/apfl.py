"""APFL: a site's model is a mixture of the federation's and one of its own, and the share is learned too.

Source: Deng, Kamani & Mahdavi 2020, Adaptive Personalized Federated Learning, Algorithm 1, and eq. (10) for the share.
With w the site's copy of the federation's weights, v its own, and v̄ = α v + (1 − α) w, each step is w ← w − η ∇f(w) and
v ← v − η α ∇f(v̄), on the same mini-batch; α ← α − η ⟨v − w, ∇f(v̄)⟩ at the first step of each round. w is FedAvg's to
the last bit; momentum and weight_decay are of its steps only.

Parties: sites and coordinator. Messages: as in FedAvg; in the end the weights go out once more, and sites answer that
they have a model of their own. What the coordinator learns: as in FedAvg; neither v nor α leaves. Dropout: as in
FedAvg; a site that was never asked has the federation's model. Cost: as in FedAvg, and one round more; a site's step
takes two gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from atoll.contract.program import program
from atoll.contract.wire import Array
from atoll.horizontal.fedavg import FedAvg
from atoll.horizontal.federated import OFFERS, FederatedParams, State
from atoll.horizontal.local import Local, Weights, stepped
from atoll.models.model import Examples


class ApflParams(FederatedParams):
    """share: α, of a site's own weights in its model, to begin with; with 0 it is the federation's. adaptive: is it
    learned?"""

    share: float = Field(default=0.5, ge=0, le=1)
    adaptive: bool = True


@program("horizontal.apfl", needs={"sum"}, offers=OFFERS)
class Apfl(FedAvg):
    """FedAvg, and at every site a learned mixture with weights of its own."""

    Params = ApflParams
    personal: ClassVar[bool] = True

    def local(self, at: Local, sent: State) -> Mapping[str, Any]:
        """A round of SGD on w, and at each of its steps one on v."""
        p, model, rate = self.params, at.model, at.params.learning_rate
        own, share = self._own(at, sent)
        first = p.adaptive

        def slope(weights: Weights, batch: Examples, gradient: Weights) -> Weights:
            nonlocal own, share, first
            mixed = model.loss_and_gradient(_mixed(own, weights, share), batch)[1]
            apart, own = own - weights, stepped(at, own, mixed, rate * share)
            if first:
                apart[model.running] = 0
                share, first = float(np.clip(share - rate * (apart @ mixed), 0, 1)), False
            return gradient

        done = at.sgd(sent["weights"], slope)
        at.site.state.update(own=own, share=np.array(share))
        return {"weights": done.weights - sent["weights"], "loss": done.loss}

    def mine(self, at: Local, sent: State) -> Array:
        """α v + (1 − α) w, of the final w."""
        own, share = self._own(at, sent)
        return _mixed(own, sent["weights"].astype(at.model.dtype), share)

    def _own(self, at: Local, sent: State) -> tuple[Array, float]:
        """v and α; v begins as the first weights that were sent here."""
        state = at.site.state
        own = state.get("own", sent["weights"].astype(at.model.dtype))
        return own, float(state.get("share", self.params.share))


def _mixed(own: Weights, shared: Weights, share: float) -> Weights:
    mixed: Weights = share * own + (1 - share) * shared
    return mixed
