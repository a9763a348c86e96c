"""What networks for time series share: the window a row looks back on, its gaps, and the value a forecast starts from.

A row holds its own window: each series' values from the oldest to the newest, one column a step, as the step ``lag``
makes them. The network sees [num_rows, steps, channels]: every series relative to its newest value, those values, and
the features, which stay the same all through the window; all in units of half of the schema's ranges, the relative ones
in tenths of them. So the movement of a series is seen apart from its level.

With ``anchor`` the newest value of a series is also given to the head, whose weights begin as the copy of it: before
any learning the forecast is that value (persistence), and what is learned is the difference from it.

Sources: Zeng et al. 2023, Are Transformers Effective for Time Series Forecasting? (AAAI), §4, NLinear (windows relative
to their last value); Lai et al. 2018, Modeling Long- and Short-Term Temporal Patterns with Deep Neural Networks
(SIGIR), §3.6 (a linear part beside the network); Che et al. 2018, Recurrent Neural Networks for Multivariate Time
Series with Missing Values (Scientific Reports 8), §2.2 (the last value carried forward, and the mask as an input).
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from atoll.contract.errors import PlanError
from atoll.contract.program import TableView
from atoll.contract.wire import Array
from atoll.models import model as port
from atoll.models.linear import Scale, scaled_features
from atoll.models.model import Floats
from atoll.models.network import Network

STEEP = 10.0
"""Times this a value's distance from the newest is seen: within a window it is a small part of the range."""
Rows = Annotated[int, Field(ge=1, le=100_000)]


class SeriesSpec(port.Settings):
    """series: by name, its columns from the oldest to the newest, or how many rows the window of a column has, as the
    step ``lag`` names them (3: x_lag2, x_lag1, x). features: of the row itself. anchor: the series from whose newest
    value a forecast starts. gaps: "forbid" missing values in a window, or "mark" them: the value before is carried on,
    and a channel tells where it was (a series that is missing all through a window stands at the middle of its range).
    loss: of values, half the "squared" error, or the "absolute" one, whose forecasts are medians and not means.
    """

    series: dict[str, Rows | tuple[str, ...]] = Field(min_length=1)
    features: tuple[str, ...] = ()
    anchor: str | None = None
    gaps: Literal["forbid", "mark"] = "forbid"
    loss: Literal["squared", "absolute"] = "squared"

    def windows(self) -> list[tuple[str, ...]]:
        """Each series' columns; raises PlanError where they are not equally many."""
        found = [
            (*(f"{name}_lag{n}" for n in range(of - 1, 0, -1)), name) if isinstance(of, int) else of
            for name, of in self.series.items()
        ]
        if len({len(columns) for columns in found}) > 1 or not found[0]:
            raise PlanError(
                "model.series-length", "the windows of the series are not equally long, or empty", field="model.series",
                remedy="give each series as many columns as the others",
            )  # fmt: skip
        return found


class Window(nn.Module):
    """[num_rows, steps, channels] relative to its newest values, through a *body*, and the anchor beside the result."""

    def __init__(self, body: nn.Module, series: int, anchor: int | None) -> None:
        super().__init__()
        self.body, self.series, self.anchor = body, series, anchor

    def forward(self, window: Tensor) -> Tensor:
        """[num_rows, width]."""
        values = window[:, :, : self.series]
        newest = values[:, -1:]
        seen = torch.cat([STEEP * (values - newest), newest.expand_as(values), window[:, :, self.series :]], 2)
        found: Tensor = self.body(seen)
        return found if self.anchor is None else torch.cat([found, newest[:, 0, self.anchor, None]], 1)


class Sequence(Network):
    """A network on windows. A kind gives ``body``."""

    settings: SeriesSpec

    def body(self, channels: int) -> tuple[nn.Module, int]:
        """What maps [num_rows, steps, channels] to [num_rows, width], and the width."""
        raise NotImplementedError

    def encoder(self) -> tuple[nn.Module, int]:
        """The body on relative values; with an anchor one wider."""
        s = self.settings
        self.windows, self.around = s.windows(), Scale.of(self.schema, s.features)
        self.scales = [Scale.of(self.schema, columns) for columns in self.windows]
        if s.anchor is not None and (s.anchor not in s.series or self.goal.task != "regression"):
            raise PlanError(
                "model.bad-anchor", "a forecast can start only from one of the series, and only as a value",
                field="model.anchor", remedy="name one of the series, or leave the anchor out",
            )  # fmt: skip
        series = len(s.series)
        body, width = self.body(series * (3 if s.gaps == "mark" else 2) + len(s.features))
        self.anchor = None if s.anchor is None else list(s.series).index(s.anchor)
        return Window(body, series, self.anchor), width + (self.anchor is not None)

    def initial(self, seed: int) -> Floats:
        """As every network's; with an anchor, the head copies it in the targets' units."""
        found = super().initial(seed)
        if self.anchor is not None:
            goal, scale = self.goal, self.scales[self.anchor]
            head = np.zeros((goal.outputs, self.net.head.in_features))
            head[:, -1] = scale.half[-1] / goal.half
            found[self.layers["head.weight"]] = head.ravel()
            found[self.layers["head.bias"]] = (scale.middle[-1] - goal.middle) / goal.half
        return self._based(found)

    def inputs(self, table: TableView) -> tuple[Array, ...]:
        """Windows and features in [-1, 1], and with gaps marked where a value is there, float32 [num_rows, steps,
        channels]; raises SchemaError where cells are missing that may not be."""
        steps, marks = len(self.windows[0]), self.settings.gaps == "mark"
        made = np.empty((len(table), steps, len(self.windows) * (1 + marks) + len(self.settings.features)), np.float32)
        for place, (columns, scale) in enumerate(zip(self.windows, self.scales, strict=True)):
            if marks:
                values = np.column_stack([np.asarray(table[name], np.float64) for name in columns])
                made[:, :, len(self.windows) + place] = ~np.isnan(values)
                made[:, :, place] = carried((values - scale.middle) / scale.half)
            else:
                made[:, :, place] = scaled_features(table, columns, scale)
        if names := self.settings.features:
            made[:, :, -len(names) :] = scaled_features(table, names, self.around)[:, None]
        return (made,)

    def losses_of(self, out: Tensor, wanted: Tensor) -> Tensor:
        """As every network's, or the absolute error in units of half the target's range."""
        if self.task == "regression" and self.settings.loss == "absolute":
            return (out - wanted).abs().mean(1)
        return super().losses_of(out, wanted)

    def tensors(self, inputs: tuple[Array, ...]) -> tuple[Tensor, ...]:
        """The windows."""
        return (torch.from_numpy(np.ascontiguousarray(inputs[0])),)


def carried(values: Floats) -> Floats:
    """[num_rows, steps] with each gap filled by the value before it, or else the first after it, or else 0."""
    there = ~np.isnan(values)
    before = np.maximum.accumulate(np.where(there, np.arange(values.shape[1]), -1), axis=1)
    filled = np.take_along_axis(values, np.where(before < 0, there.argmax(1)[:, None], before), 1)
    return np.nan_to_num(filled)
