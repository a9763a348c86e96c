"""A temporal convolutional network for time series: residual blocks of dilated causal convolutions.

Block number i has two convolutions with dilation 2ⁱ, so that n blocks with kernels of k see the last
1 + 2 (k − 1)(2ⁿ − 1) steps; what it gives at the newest step is the window's representation. Without the paper's
weight normalisation and dropout, which windows as short as a forecast's do not need.

Source: Bai, Kolter & Koltun 2018, An Empirical Evaluation of Generic Convolutional and Recurrent Networks for Sequence
Modeling, §3.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from atoll.models.model import Units, model
from atoll.models.sequence import Sequence, SeriesSpec


class TcnSpec(SeriesSpec):
    """channels: of each block. kernel: steps that a convolution looks at."""

    kind: Literal["tcn"] = "tcn"
    channels: tuple[Units, ...] = Field(default=(16, 16), min_length=1, max_length=12)
    kernel: int = Field(default=3, ge=2, le=64)


class Block(nn.Module):
    """[num_rows, inputs, 1, steps] → [num_rows, outputs, 1, steps]; no step sees a later one."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.before = (kernel - 1) * dilation
        self.first = nn.Conv2d(inputs, outputs, (1, kernel), dilation=(1, dilation))
        self.second = nn.Conv2d(outputs, outputs, (1, kernel), dilation=(1, dilation))
        self.across = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """ReLU(x + F(x)), with x brought to as many channels by a 1 × 1 convolution where needed."""
        found = torch.relu(self.first(F.pad(x, (self.before, 0))))
        found = torch.relu(self.second(F.pad(found, (self.before, 0))))
        return torch.relu(self.across(x) + found)


class Blocks(nn.Module):
    """Block after block; of the result the newest step, [num_rows, width]."""

    def __init__(self, channels: int, widths: tuple[int, ...], kernel: int) -> None:
        super().__init__()
        inputs = (channels, *widths)
        self.blocks = nn.Sequential(*(Block(inputs[i], width, kernel, 2**i) for i, width in enumerate(widths)))

    def forward(self, window: Tensor) -> Tensor:
        """Of [num_rows, steps, channels]."""
        found: Tensor = self.blocks(window.transpose(1, 2)[:, :, None])
        return found[:, :, 0, -1]


@model
class Tcn(Sequence):
    """See the module's docstring."""

    Spec: ClassVar[type[TcnSpec]] = TcnSpec
    settings: TcnSpec

    def body(self, channels: int) -> tuple[nn.Module, int]:
        """The blocks."""
        widths = self.settings.channels
        return Blocks(channels, widths, self.settings.kernel), widths[-1]
