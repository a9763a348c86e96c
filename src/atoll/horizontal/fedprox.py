"""FedProx: FedAvg whose sites are held near the federation's weights by a proximal term.

Source: Li et al. 2020, Federated Optimization in Heterogeneous Networks (MLSys), Algorithm 2: each site takes SGD steps
on F_k(w) + μ/2 · ‖w − w_t‖².

Parties: sites and coordinator. Messages: as in FedAvg. What the coordinator learns: as in FedAvg. Dropout: as in
FedAvg. Cost: as in FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field

from atoll.contract.program import program
from atoll.horizontal.fedavg import FedAvg
from atoll.horizontal.federated import OFFERS, FederatedParams, State
from atoll.horizontal.local import Local


class FedProxParams(FederatedParams):
    """proximal: μ, by which a site is drawn to the federation's weights; with 0 this is FedAvg."""

    proximal: float = Field(default=0.1, ge=0)


@program("horizontal.fedprox", needs={"sum"}, offers=OFFERS)
class FedProx(FedAvg):
    """FedAvg with a proximal term at the sites."""

    Params = FedProxParams

    def local(self, at: Local, sent: State) -> Mapping[str, Any]:
        """SGD on F_k(w) + μ/2 · ‖w − w_t‖²."""
        start, mu = sent["weights"].astype(at.model.dtype), np.asarray(self.params.proximal, at.model.dtype)
        done = at.sgd(start, lambda weights, _, gradient: gradient + mu * (weights - start))
        return {"weights": done.weights - start, "loss": done.loss}
