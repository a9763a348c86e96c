"""A multilayer perceptron for tables, or small images: linear layers with ReLU.

Features are scaled to [-1, 1] by the *schema's* ranges, as a linear model's are; an image's pixels to [0, 1]. No layer
mixes rows, but for ``norm: batch``.

Source: Rumelhart, Hinton & Williams 1986, Learning Representations by Back-Propagating Errors.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from atoll.contract.program import TableView
from atoll.contract.wire import Array
from atoll.models import model as port
from atoll.models.images import image_shape, images
from atoll.models.linear import Scale, scaled_features
from atoll.models.model import model
from atoll.models.network import Network, raw_features, rescaled


class MlpSpec(port.Settings):
    """features: numeric columns; or image: a column of images. hidden: units of each hidden layer. norm: of what each
    of them gives: by the batch, or by the row ("group")."""

    kind: Literal["mlp"] = "mlp"
    features: tuple[str, ...] = ()
    image: str | None = None
    hidden: tuple[port.Units, ...] = Field(default=(32,), min_length=1, max_length=8)
    norm: Literal["none", "batch", "group"] = "none"

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if bool(self.features) == (self.image is not None):
            raise ValueError("an mlp is of features, or of an image")
        return self


NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm1d, "group": nn.LayerNorm}


@model
class Mlp(Network):
    """See the module's docstring."""

    Spec: ClassVar[type[MlpSpec]] = MlpSpec
    settings: MlpSpec

    def encoder(self) -> tuple[nn.Module, int]:
        """The hidden layers."""
        self.scale = Scale.of(self.schema, self.settings.features)
        layers: list[nn.Module] = []
        width = len(self.settings.features) or self._pixels()
        for units in self.settings.hidden:
            norm: list[nn.Module] = [] if self.settings.norm == "none" else [NORMS[self.settings.norm](units)]
            layers += [nn.Linear(width, units), *norm, nn.ReLU()]
            width = units
        return nn.Sequential(*layers), width

    def _pixels(self) -> int:
        return math.prod(image_shape(self.schema, self.settings.image or ""))

    def inputs(self, table: TableView) -> tuple[Array, ...]:
        """The features in [-1, 1], float32 [num_rows, num_features], or the pixels, uint8 [num_rows, height · width];
        raises SchemaError where cells are missing."""
        names, image = self.settings.features, self.settings.image
        if image is not None:
            return (images(table, image).reshape(len(table), self._pixels()),)
        return (scaled_features(table, names, self.scale),)

    def tensors(self, inputs: tuple[Array, ...]) -> tuple[Tensor, ...]:
        """The features, or the pixels in [0, 1]."""
        found = torch.from_numpy(np.ascontiguousarray(inputs[0]))
        return (found if self.settings.image is None else found.float().div_(255),)

    def raw(self, table: TableView) -> dict[str, Tensor]:
        """The features in their own units, or the images."""
        if self.settings.image is not None:
            return {self.settings.image: torch.from_numpy(np.ascontiguousarray(table[self.settings.image]))}
        return {"features": raw_features(table, self.settings.features)}

    def scaled(self, *raw: Tensor) -> tuple[Tensor, ...]:
        """As :meth:`tensors`, of :meth:`raw`."""
        if self.settings.image is not None:
            return (raw[0].flatten(1).float().div(255),)
        return (rescaled(raw[0], self.scale),)
