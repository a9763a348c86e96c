"""A gated recurrent network for time series: one layer, whose last state is the window's representation.

The gates are linear layers and no fused kernel, so that each example has a gradient of its own.

Source: Cho et al. 2014, Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation
(EMNLP), §2.3; with the reset gate behind the recurrent weights, as PyTorch's and cuDNN's.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from atoll.models.model import model
from atoll.models.sequence import Sequence, SeriesSpec


class GruSpec(SeriesSpec):
    """hidden: the width of its state."""

    kind: Literal["gru"] = "gru"
    hidden: int = Field(default=32, ge=1, le=4096)


class Cell(nn.Module):
    """Runs through [num_rows, steps, channels], and gives the last state, [num_rows, hidden]."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.came, self.state = nn.Linear(channels, 3 * hidden), nn.Linear(hidden, 3 * hidden)

    def forward(self, window: Tensor) -> Tensor:
        """h ← z · h + (1 − z) · tanh(Wx + r · Uh), from h = 0; r, z = σ(Wx + Uh)."""
        width = self.hidden
        state = window.new_zeros(window.shape[0], width)  # no len(): an exported graph would hold for so many rows
        for came in self.came(window).unbind(1):
            held = self.state(state)
            reset, update = torch.sigmoid(came[:, : 2 * width] + held[:, : 2 * width]).chunk(2, 1)
            new = torch.tanh(came[:, 2 * width :] + reset * held[:, 2 * width :])
            state = new + update * (state - new)
        return state


@model
class Gru(Sequence):
    """See the module's docstring."""

    Spec: ClassVar[type[GruSpec]] = GruSpec
    settings: GruSpec

    def body(self, channels: int) -> tuple[nn.Module, int]:
        """The recurrent layer."""
        return Cell(channels, self.settings.hidden), self.settings.hidden
