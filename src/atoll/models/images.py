"""What networks for images do alike: the column, how pixels are scaled, and how layers are normalised.

Pixels are mapped from [0, 255] to [-2, 2]; or, with ``standardise``, each image to mean 0 and standard deviation 1,
which cancels a scanner's brightness and contrast.

Sources: Wu & He 2018, Group Normalization (ECCV), §3; Ioffe & Szegedy 2015, Batch Normalization (ICML).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atoll.contract.errors import PlanError
from atoll.contract.program import TableView
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.models import model as port
from atoll.models.model import missing
from atoll.models.network import Network

FAINT = 0.01
"""Added to the standard deviation of an image's pixels, in [0, 2], so that an empty image stays empty."""
Norm = Literal["none", "group", "batch"]


class ImageSpec(port.Settings):
    """image: the column. standardise: each image on its own. norm: after every convolution: "group" is of each row
    alone; "batch" mixes the rows of a batch, has running statistics among the weights, and suits no DP-SGD."""

    image: str
    standardise: bool = False
    norm: Norm = "none"


class ImageNetwork(Network):
    """See the module's docstring."""

    settings: ImageSpec

    def inputs(self, table: TableView) -> tuple[Array, ...]:
        """The images, uint8 [num_rows, height, width(, channels)]; raises SchemaError where one is missing."""
        return (images(table, self.settings.image),)

    def tensors(self, inputs: tuple[Array, ...]) -> tuple[Tensor, ...]:
        """Pixels in [-2, 2], or standardised, [num_rows, channels, height, width]."""
        return self.scaled(torch.from_numpy(np.ascontiguousarray(inputs[0])))

    def raw(self, table: TableView) -> dict[str, Tensor]:
        """The images."""
        return {self.settings.image: torch.from_numpy(np.ascontiguousarray(table[self.settings.image]))}

    def scaled(self, *raw: Tensor) -> tuple[Tensor, ...]:
        """As :meth:`tensors`, of a tensor."""
        return (pixels(raw[0], standardise=self.settings.standardise),)


def image_shape(schema: TableSchema, name: str) -> tuple[int, int, int]:
    """(height, width, channels) of an image column; raises PlanError if it is none of the prepared table."""
    column = schema.columns.get(name)
    if column is None or column.shape is None or column.role == "ignore":
        raise PlanError(
            "plan.bad-column", f"{name!r} is not an image column of the prepared table", field=name,
            remedy="check the plan's column names against the schema",
        )  # fmt: skip
    height, width, depth = (*column.shape, 1)[:3]
    return height, width, depth


def absent(table: TableView, name: str) -> NDArray[np.bool_]:
    """Which images are missing, [num_rows]: black ones, where the schema allows missing cells."""
    column = table[name]
    if table.schema.columns[name].missing == "forbid":
        return np.zeros(len(column), bool)
    return np.asarray(~column.reshape(len(column), math.prod(column.shape[1:])).any(axis=1))


def images(table: TableView, name: str) -> NDArray[np.uint8]:
    """A column of images, uint8 [num_rows, height, width(, channels)]; raises SchemaError where one is missing."""
    if absent(table, name).any():
        raise missing([name])
    return table[name]


def pixels(images: Tensor, *, standardise: bool) -> Tensor:
    """uint8 [num_rows, height, width(, channels)] → [num_rows, channels, height, width], scaled."""
    found = images.float().mul(4 / 255).sub(2)
    if standardise:
        spread, middle = torch.std_mean(found, tuple(range(1, found.ndim)), correction=0, keepdim=True)
        found = (found - middle) / (spread + FAINT)
    return found[:, None] if found.ndim == 3 else found.permute(0, 3, 1, 2).contiguous()


def normalised(norm: Norm, channels: int) -> list[nn.Module]:
    """The layer after a convolution, if any. Groups: as many as leave 4 channels or more in each, 32 at most (Wu &
    He 2018, Table 3: few channels a group lose little, one is instance normalisation)."""
    if norm == "batch":
        return [nn.BatchNorm2d(channels)]
    if norm == "group":
        groups = max(n for n in range(1, 33) if channels % n == 0 and (n == 1 or channels // n >= 4))
        return [nn.GroupNorm(groups, channels)]
    return []
