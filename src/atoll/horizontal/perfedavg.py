"""Per-FedAvg: weights from which every site is one step away from a good model of its own.

Source: Fallah, Mokhtari & Ozdaglar 2020, Personalized Federated Learning with Theoretical Guarantees: A
Model-Agnostic Meta-Learning Approach (NeurIPS), Algorithm 1, and for its two variants §5: sites descend on
F_k(w − α ∇f_k(w)), whose gradient is (I − α ∇²f_k(w)) ∇f_k(w − α ∇f_k(w)), each part on a mini-batch of its own.
*First-order* leaves the Hessian out; *Hessian-free* takes its product with a vector as a difference of two gradients.

Parties: sites and coordinator. Messages: as in FedAvg; in the end the weights go out once more, and sites answer that
they have a model of their own. What the coordinator learns: as in FedAvg. Dropout: as in FedAvg. Cost: as in FedAvg,
and one round more; a site's step takes two gradients, or four.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from atoll.contract.program import program
from atoll.contract.wire import Array
from atoll.horizontal.fedavg import FedAvg
from atoll.horizontal.federated import OFFERS, FederatedParams, State
from atoll.horizontal.local import Local, Weights, stepped
from atoll.models.model import Examples


class PerFedAvgParams(FederatedParams):
    """adapt_rate: α, the rate of a site's steps from the federation's model to its own; with 0 this is FedAvg,
    on other mini-batches. adapt_steps: how many of them it takes in the end. (learning_rate is β.)"""

    variant: Literal["first-order", "hessian-free"] = "first-order"
    adapt_rate: float = Field(default=0.05, ge=0)
    adapt_steps: int = Field(default=1, ge=1)


@program("horizontal.perfedavg", needs={"sum"}, offers=OFFERS)
class PerFedAvg(FedAvg):
    """FedAvg of weights from which sites adapt by a step."""

    Params = PerFedAvgParams
    personal: ClassVar[bool] = True

    def local(self, at: Local, sent: State) -> Mapping[str, Any]:
        """SGD on F_k(w − α ∇f_k(w))."""
        alpha, second, third = self.params.adapt_rate, at.batches(part=1), at.batches(part=2)

        def slope(weights: Weights, _: Examples, gradient: Weights) -> Weights:
            outer = at.model.loss_and_gradient(stepped(at, weights, gradient, alpha), next(second))[1]
            if self.params.variant == "first-order":
                return outer
            turned: Weights = outer - np.asarray(alpha, at.model.dtype) * curved(at, weights, outer, next(third))
            return turned

        done = at.sgd(sent["weights"], slope)
        return {"weights": done.weights - sent["weights"], "loss": done.loss}

    def mine(self, at: Local, sent: State) -> Array:
        """The final weights, a few steps of rate α on."""
        weights = sent["weights"].astype(at.model.dtype)
        for batch in at.batches(self.params.adapt_steps):
            gradient = at.model.loss_and_gradient(weights, batch)[1]
            weights = stepped(at, weights, gradient, self.params.adapt_rate)
        return weights


def curved(at: Local, weights: Weights, direction: Weights, batch: Examples) -> Weights:
    """The Hessian at *weights* times *direction*, by a central difference as wide as rounding asks for."""
    direction = direction.copy()
    direction[at.model.running] = 0
    if at.fixed is not None:
        direction[at.fixed] = 0
    length = float(np.linalg.norm(direction))
    if not length:
        return direction
    wide = float(np.finfo(at.model.dtype).eps) ** (1 / 3) * max(1.0, float(np.linalg.norm(weights))) / length
    delta = np.asarray(wide, at.model.dtype)
    ahead, behind = (at.model.loss_and_gradient(weights + d * direction, batch)[1] for d in (delta, -delta))
    found: Weights = (ahead - behind) / (2 * delta)
    return found
