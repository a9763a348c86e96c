"""MOON: FedAvg whose sites learn representations like the federation's, and unlike those of their own last model.

Source: Li, He & Song 2021, Model-Contrastive Federated Learning (CVPR), Algorithm 1 and §3.3: to the loss is
added μ · −log(exp(s(z, z_w)/τ) / (exp(s(z, z_w)/τ) + exp(s(z, z_k)/τ))), with s the cosine, and z, z_w, z_k a row's
representations by the weights that are learned, the federation's, and those that the site reached last. A
representation is what comes into the network's head; the paper's projection is a layer before it, where a network has
one.

Parties: sites and coordinator. Messages: as in FedAvg; each site keeps the weights it reached. What the coordinator
learns: as in FedAvg; the mean loss is of both terms. Dropout: as in FedAvg. Cost: as in FedAvg; a site's work is two to
three times as much.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from atoll.contract.errors import PlanError
from atoll.contract.program import program
from atoll.contract.schema import TableSchema
from atoll.horizontal.fedavg import FedAvg
from atoll.horizontal.federated import OFFERS, FederatedParams, State
from atoll.horizontal.local import Local
from atoll.models.model import Examples, Floats, Represents


class MoonParams(FederatedParams):
    """contrast: μ, the weight of the contrastive loss; with 0 this is FedAvg. temperature: τ, its sharpness: the
    greater the less."""

    contrast: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=0.5, gt=0)


@program("horizontal.moon", needs={"sum"}, offers=OFFERS)
class Moon(FedAvg):
    """FedAvg with a model-contrastive loss at the sites."""

    Params = MoonParams
    stateful: ClassVar[bool] = True

    def model(self, schema: TableSchema) -> Represents:
        """Raises PlanError "model.no-representation" beside what FedAvg raises."""
        found = super().model(schema)
        if not (isinstance(found, Represents) and found.represents):
            raise PlanError(
                "model.no-representation", "the model has no representation of a row to contrast", field="model",
                remedy="choose a network, or another program",
            )  # fmt: skip
        return found

    def local(self, at: Local, sent: State) -> Mapping[str, Any]:
        """SGD on both losses; the weights it leads to are the next round's to be unlike."""
        p, start, model = self.params, sent["weights"], self.model(at.site.table.schema)
        previous = at.site.state.get("previous", start)  # in a site's first round there is nothing to be unlike

        def descent(weights: Floats, batch: Examples) -> tuple[float, Floats]:
            return model.contrastive(weights, batch, start, previous, strength=p.contrast, temperature=p.temperature)

        done = at.sgd(start, descent=descent)
        at.site.state["previous"] = done.weights
        return {"weights": done.weights - start, "loss": done.loss}
