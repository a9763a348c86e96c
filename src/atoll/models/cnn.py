"""A small convolutional network for images: convolutions of 3 × 3 with ReLU and pooling, then one hidden layer.

No layer mixes rows, so that each example has a gradient of its own. Pixels are mapped from [0, 255] to [-2, 2]; or,
with ``standardise``, each image to mean 0 and standard deviation 1, which cancels a scanner's brightness and contrast.

Source: LeCun et al. 1998, Gradient-Based Learning Applied to Document Recognition (the shape of the network).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from atoll.contract.errors import PlanError
from atoll.contract.program import TableView
from atoll.contract.wire import Array
from atoll.models import model as port
from atoll.models.model import model
from atoll.models.network import Network

FAINT = 0.01
"""Added to the standard deviation of an image's pixels, in [0, 2], so that an empty image stays empty."""


class CnnSpec(port.Settings):
    """image: the column. channels: of each convolution; each halves height and width. hidden: units before the
    output. standardise: each image on its own."""

    kind: Literal["cnn"] = "cnn"
    image: str
    channels: tuple[int, ...] = Field(default=(8, 16), min_length=1, max_length=8)
    hidden: int = Field(default=32, ge=1, le=4096)
    standardise: bool = False


class ChannelsLast(nn.Module):
    """Has no effect but on the order in memory, in which a CPU finds maxima several times as fast."""

    def forward(self, x: Tensor) -> Tensor:
        """The same values."""
        return x.contiguous(memory_format=torch.channels_last)


@model
class Cnn(Network):
    """See the module's docstring."""

    Spec: ClassVar[type[CnnSpec]] = CnnSpec
    settings: CnnSpec

    def encoder(self) -> tuple[nn.Module, int]:
        """Convolution, 2 × 2 maximum and ReLU for each of ``channels``; hidden layer."""
        column = self.schema.columns.get(self.settings.image)
        if column is None or column.shape is None or column.role == "ignore":
            raise PlanError(
                "plan.bad-column", f"{self.settings.image!r} is not an image column of the prepared table",
                field=self.settings.image, remedy="check the plan's column names against the schema",
            )  # fmt: skip
        height, width, depth = (*column.shape, 1)[:3]
        if min(height, width) >> len(self.settings.channels) < 1:
            raise PlanError(
                "model.too-deep", "the images are too small for so many convolutions", field="channels",
                remedy="each halves height and width: use fewer",
            )  # fmt: skip
        layers: list[nn.Module] = []
        for channels in self.settings.channels:
            layers += [nn.Conv2d(depth, channels, 3, padding=1), ChannelsLast(), nn.MaxPool2d(2), nn.ReLU()]
            height, width, depth = height // 2, width // 2, channels
        layers += [nn.Flatten(), nn.Linear(depth * height * width, self.settings.hidden), nn.ReLU()]
        return nn.Sequential(*layers), self.settings.hidden

    def inputs(self, table: TableView) -> tuple[Array, ...]:
        """The images, uint8 [num_rows, height, width(, channels)]."""
        return (table[self.settings.image],)

    def tensors(self, inputs: tuple[Array, ...]) -> tuple[Tensor, ...]:
        """Pixels in [-2, 2], or standardised, [num_rows, channels, height, width]."""
        images = torch.from_numpy(np.ascontiguousarray(inputs[0])).float().mul_(4 / 255).sub_(2)
        if self.settings.standardise:
            places = tuple(range(1, images.ndim))
            spread, middle = torch.std_mean(images, places, correction=0, keepdim=True)
            images.sub_(middle).div_(spread + FAINT)
        return (images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous(),)
