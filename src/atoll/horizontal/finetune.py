"""Local fine-tuning: FedAvg, and in the end every site trains the federation's model on, by itself.

Sources: Wang et al. 2019, Federated Evaluation of On-device Personalization, §2; Yu, Bagdasaryan & Shmatikov 2020,
Salvaging Federated Learning by Local Adaptation, §4: fine-tuning of all weights, or of the last layers.

Parties: sites and coordinator. Messages: as in FedAvg; in the end the weights go out once more, and sites answer that
they have a model of their own. What the coordinator learns: as in FedAvg. Dropout: as in FedAvg. Cost: as in FedAvg,
and one round more.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from atoll.contract.program import program
from atoll.contract.wire import Array
from atoll.horizontal.fedavg import FedAvg
from atoll.horizontal.federated import OFFERS, FederatedParams, State
from atoll.horizontal.local import Local, layers_of


class FineTuneParams(FederatedParams):
    """tune_epochs: a site's passes over its rows in the end. tune_layers: those that learn then, by the beginning of
    their names; null: all."""

    tune_epochs: int = Field(default=1, ge=1)
    tune_layers: tuple[str, ...] | None = Field(default=None, min_length=1)


@program("horizontal.finetune", needs={"sum"}, offers=OFFERS)
class FineTune(FedAvg):
    """FedAvg, and in the end every site's own training."""

    Params = FineTuneParams
    personal: ClassVar[bool] = True

    def mine(self, at: Local, sent: State) -> Array:
        """SGD from the final weights."""
        chosen = self.params.tune_layers
        still = None if chosen is None else ~layers_of(at.model, chosen)
        return at.sgd(sent["weights"], steps=at.passes(self.params.tune_epochs), fixed=still).weights
