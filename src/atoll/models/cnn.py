"""A small convolutional network for images: convolutions of 3 × 3 with ReLU and pooling, then one hidden layer.

No layer mixes rows, so that each example has a gradient of its own, but with ``norm: batch``. How images are scaled and
layers normalised stands in ``models/images.py``.

Source: LeCun et al. 1998, Gradient-Based Learning Applied to Document Recognition (the shape of the network).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from atoll.contract.errors import PlanError
from atoll.models.images import ImageNetwork, ImageSpec, image_shape, normalised
from atoll.models.model import Units, model


class CnnSpec(ImageSpec):
    """channels: of each convolution; each halves height and width. hidden: units before the output. The rest: see
    :class:`atoll.models.images.ImageSpec`."""

    kind: Literal["cnn"] = "cnn"
    channels: tuple[Units, ...] = Field(default=(8, 16), min_length=1, max_length=8)
    hidden: int = Field(default=32, ge=1, le=4096)


class ChannelsLast(nn.Module):
    """Has no effect but on the order in memory, in which a CPU finds maxima several times as fast."""

    def forward(self, x: Tensor) -> Tensor:
        """The same values."""
        try:
            return x.contiguous(memory_format=torch.channels_last)
        except RuntimeError:  # torch.func.vmap knows no order but its own
            return x


@model
class Cnn(ImageNetwork):
    """See the module's docstring."""

    Spec: ClassVar[type[CnnSpec]] = CnnSpec
    settings: CnnSpec

    def encoder(self) -> tuple[nn.Module, int]:
        """Convolution, normalisation, 2 × 2 maximum and ReLU for each of ``channels``; hidden layer."""
        height, width, depth = image_shape(self.schema, self.settings.image)
        if min(height, width) >> len(self.settings.channels) < 1:
            raise PlanError(
                "model.too-deep", "the images are too small for so many convolutions", field="channels",
                remedy="each halves height and width: use fewer",
            )  # fmt: skip
        layers: list[nn.Module] = []
        for channels in self.settings.channels:
            layers += [nn.Conv2d(depth, channels, 3, padding=1), *normalised(self.settings.norm, channels)]
            layers += [ChannelsLast(), nn.MaxPool2d(2), nn.ReLU()]
            height, width, depth = height // 2, width // 2, channels
        layers += [nn.Flatten(), nn.Linear(depth * height * width, self.settings.hidden), nn.ReLU()]
        return nn.Sequential(*layers), self.settings.hidden
