"""A multilayer perceptron for tables: linear layers with ReLU on features in [-1, 1].

Features are scaled by the *schema's* ranges, as a linear model's are. No layer mixes rows.

Source: Rumelhart, Hinton & Williams 1986, Learning Representations by Back-Propagating Errors.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from atoll.contract.program import TableView
from atoll.contract.wire import Array
from atoll.models import model as port
from atoll.models.linear import Scale
from atoll.models.model import missing, model
from atoll.models.network import Network


class MlpSpec(port.Settings):
    """features: numeric columns. hidden: units of each hidden layer."""

    kind: Literal["mlp"] = "mlp"
    features: tuple[str, ...] = Field(min_length=1)
    hidden: tuple[int, ...] = Field(default=(32,), min_length=1, max_length=8)


@model
class Mlp(Network):
    """See the module's docstring."""

    Spec: ClassVar[type[MlpSpec]] = MlpSpec
    settings: MlpSpec

    def encoder(self) -> tuple[nn.Module, int]:
        """The hidden layers."""
        self.scale = Scale.of(self.schema, self.settings.features)
        layers: list[nn.Module] = []
        width = len(self.settings.features)
        for units in self.settings.hidden:
            layers += [nn.Linear(width, units), nn.ReLU()]
            width = units
        return nn.Sequential(*layers), width

    def inputs(self, table: TableView) -> tuple[Array, ...]:
        """The features in [-1, 1], float32 [num_rows, num_features]; raises SchemaError where cells are missing."""
        names = self.settings.features
        columns = np.column_stack([np.asarray(table[name], np.float64) for name in names])
        if gaps := [names[i] for i in np.flatnonzero(np.isnan(columns).any(axis=0))]:
            raise missing(gaps)
        return (((columns - self.scale.middle) / self.scale.half).astype(np.float32),)

    def tensors(self, inputs: tuple[Array, ...]) -> tuple[Tensor, ...]:
        """The features."""
        return (torch.from_numpy(np.ascontiguousarray(inputs[0])),)
