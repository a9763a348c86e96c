"""Ditto: beside FedAvg's model, every site trains one of its own that is drawn to it.

Source: Li et al. 2021, Ditto: Fair and Robust Federated Learning Through Personalization (ICML), Algorithm 1: a site
takes SGD steps on F_k(v) + λ/2 · ‖v − w_t‖², of which nothing leaves; w is FedAvg's to the last bit.

Parties: sites and coordinator. Messages: as in FedAvg; in the end the weights go out once more, and sites answer that
they have a model of their own. What the coordinator learns: as in FedAvg. Dropout: as in FedAvg; a site that was never
asked trains its model in the end. Cost: as in FedAvg, and one round more.
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
from atoll.horizontal.local import Local


class DittoParams(FederatedParams):
    """pull: λ, by which a site's model is drawn to the federation's; with 0 it is the site's alone. own_epochs: passes
    of the site's own model over its rows in a round; null: as many steps as the federation's model gets."""

    pull: float = Field(default=0.1, ge=0)
    own_epochs: int | None = Field(default=None, ge=1)


@program("horizontal.ditto", needs={"sum"}, offers=OFFERS)
class Ditto(FedAvg):
    """FedAvg, and at every site a model drawn to it."""

    Params = DittoParams
    personal: ClassVar[bool] = True

    def local(self, at: Local, sent: State) -> Mapping[str, Any]:
        """FedAvg's round; then the site's own."""
        found = super().local(at, sent)
        at.site.state["own"] = self._drawn_to(at, sent)
        return found

    def mine(self, at: Local, sent: State) -> Array:
        """v as the rounds left it."""
        own = at.site.state.get("own")
        return self._drawn_to(at, sent) if own is None else own

    def _drawn_to(self, at: Local, sent: State) -> Array:
        """SGD on F_k(v) + λ/2 · ‖v − w_t‖²; v begins as the first weights that were sent here."""
        shared, pull = sent["weights"].astype(at.model.dtype), np.asarray(self.params.pull, at.model.dtype)
        epochs = self.params.own_epochs
        return at.sgd(
            at.site.state.get("own", shared),
            lambda weights, _, gradient: gradient + pull * (weights - shared),
            steps=None if epochs is None else at.passes(epochs), part=1,
        ).weights  # fmt: skip
