"""Low-rank adapters: a network that the sites already have is fine-tuned by few weights, and only they travel.

Beside the frozen weight W of a linear layer stands a product of two thin matrices: what it gives is
W x + b + α / r · B A x, with A [r, inputs] random and B [outputs, r] zero at the start, so that the start is the base.

Source: Hu et al. 2022, LoRA: Low-Rank Adaptation of Large Language Models (ICLR), §4.1; of the attention the query and
value matrices are adapted, which §7.1 finds best for a given number of weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from atoll.contract.errors import PlanError
from atoll.contract.wire import Array
from atoll.models.model import Floats


class Adapters(BaseModel):
    """rank: r, columns of B and rows of A. alpha: α; what the adapters add is multiplied by α / r."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=4, ge=1, le=256)
    alpha: float = Field(default=8.0, gt=0, allow_inf_nan=False)


class LowRank(nn.Linear):
    """A linear layer whose own weights stay, with an adapter beside them."""

    def __init__(self, inputs: int, outputs: int, adapters: Adapters) -> None:
        super().__init__(inputs, outputs)
        self.share = adapters.alpha / adapters.rank
        self.down = nn.Parameter(torch.zeros(adapters.rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, adapters.rank))

    def forward(self, x: Tensor) -> Tensor:
        """W x + b + α / r · B A x."""
        return super().forward(x) + self.share * F.linear(F.linear(x, self.down), self.up)


def linear(inputs: int, outputs: int, adapters: Adapters | None) -> nn.Linear:
    """A linear layer, with an adapter or without."""
    return nn.Linear(inputs, outputs) if adapters is None else LowRank(inputs, outputs, adapters)


def adapt(encoder: nn.Module, base: Mapping[str, Array]) -> None:
    """Give *encoder* the base's weights, and freeze all but the adapters. Raises PlanError "model.base-unfit" when the
    base is of another network."""
    for name, parameter in encoder.named_parameters():
        if name.endswith((".down", ".up")):
            continue
        found = base.get(f"encoder.{name}")
        if found is None or found.shape != tuple(parameter.shape):
            raise PlanError(
                "model.base-unfit", "the installed base is of another network", field="model.base",
                remedy=f"give the network the shape of its base: layer encoder.{name}",
            )  # fmt: skip
        parameter.data = torch.from_numpy(found.astype("float32"))
        parameter.requires_grad_(False)


def at_base(weights: Floats, layers: Mapping[str, slice]) -> Floats:
    """*weights* with every B zero: the network then gives what its base gives."""
    found = weights.copy()
    for name, where in layers.items():
        if name.endswith(".up"):
            found[where] = 0
    return found
