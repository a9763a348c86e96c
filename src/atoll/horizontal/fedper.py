"""FedPer: a shared body, and at every site a head of its own; both are trained together, and the head stays.

Source: Arivazhagan et al. 2019, Federated Learning with Personalization Layers, Algorithms 1 and 2.

Parties: sites and coordinator. Messages: as in FedAvg, less the personal layers, which no site sends; in the end the
body goes out once more, and sites answer that they have a model of their own. What the coordinator learns: the weighted
mean change of the body; of personal layers nothing. The federation's own model therefore has the head it began with:
what the run is for are the sites' models. Dropout: as in FedAvg; a site that was never asked has the first head. Cost:
as in FedAvg, and one round more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from atoll.contract.program import program
from atoll.contract.wire import Array
from atoll.horizontal.fedavg import FedAvg
from atoll.horizontal.federated import OFFERS, FederatedParams, State
from atoll.horizontal.local import Local, layers_of
from atoll.models.model import Model


class FedPerParams(FederatedParams):
    """personal_layers: those that stay at a site, by the beginning of their names; with none this is FedAvg."""

    personal_layers: tuple[str, ...] = ("head",)


@program("horizontal.fedper", needs={"sum"}, offers=OFFERS)
class FedPer(FedAvg):
    """A body that is learned together, and a head at every site."""

    Params: type[FederatedParams] = FedPerParams
    personal: ClassVar[bool] = True
    stateful: ClassVar[bool] = True

    def stays(self, model: Model) -> NDArray[np.bool_]:
        """The personal layers."""
        return layers_of(model, self.params.personal_layers)

    def local(self, at: Local, sent: State) -> Mapping[str, Any]:
        """A round of SGD on body and head, from the federation's body and the site's head."""
        start = self.whole(at, sent)
        done = at.sgd(start)
        at.site.state["own"] = done.weights[self.stays(at.model)]
        return {"weights": done.weights - start, "loss": done.loss}

    def mine(self, at: Local, sent: State) -> Array:
        """The federation's body with the site's head."""
        return self.whole(at, sent)

    def whole(self, at: Local, sent: State) -> Array:
        """What was sent, with the site's own layers in their places, [num_weights]."""
        weights, stays = sent["weights"].copy(), self.stays(at.model)
        weights[stays] = at.site.state.get("own", weights[stays])
        return weights
