"""FedAvg: local epochs of mini-batch SGD, then the average weighted by rows.

Source: McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from
Decentralized Data (AISTATS), Algorithm 1.

Parties: sites and coordinator. Messages: the weights go out; each round is one Sum of
(rows · change of weights, rows). The coordinator learns the weighted mean change per
round (each site's under ``plain``) and the mean local loss. Dropout: the round averages
the survivors. Cost: one round trip of the model's size per round and site.

Who is asked, the rounds, and what leaves a site stand in ``horizontal/federated.py``, a site's steps in
``horizontal/local.py``; both are the same for the algorithms that are made of this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atoll.contract.program import program
from atoll.contract.wire import Array
from atoll.horizontal.federated import OFFERS, Federated, FederatedParams, State
from atoll.horizontal.local import Local


@program("horizontal.fedavg", needs={"sum"}, offers=OFFERS)
class FedAvg(Federated):
    """Federated averaging of a model with local epochs and mini-batches."""

    Params: type[FederatedParams] = FederatedParams

    def local(self, at: Local, sent: State) -> Mapping[str, Any]:
        """ClientUpdate(k, w) of Algorithm 1: the change by a round of SGD, and the mean loss on the way."""
        done = at.sgd(sent["weights"])
        return {"weights": done.weights - sent["weights"], "loss": done.loss}

    def step(self, state: State, mean: Mapping[str, Array], share: float) -> None:
        """w ← w + Σ nₖ/n · (wₖ − w)."""
        state["weights"] = state["weights"] + mean["weights"]
