"""Images as numbers: brightness, its spread, its layout and the directions of edges."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.schema import Column, TableSchema
from atoll.data.frame import Frame
from atoll.data.step import Fitted, Step, column_of, free_name, step
from atoll.data.steps.arrays import beside

Share = Annotated[float, Field(ge=0, le=1)]
Floats = NDArray[np.float64]


@step("image_features")
class ImageFeatures(Step):
    """Replace the images in ``column`` by numbers of each image's brightness (0–255; of colours, 0.299 R +
    0.587 G + 0.114 B).

    COLUMN_mean, COLUMN_std; quantiles: COLUMN_q50 …; blocks: COLUMN_block_R_C, the means of blocks × blocks equal
    parts (0: none); directions: COLUMN_edge_D, the share of gradient magnitude in each of so many directions from
    0 to π (0: none), as in histograms of oriented gradients (Dalal & Triggs 2005), for the whole image.
    keep: also keep the image.
    """

    column: str
    quantiles: tuple[Share, ...] = (0.1, 0.5, 0.9)
    blocks: int = Field(default=4, ge=0, le=32)
    directions: int = Field(default=8, ge=0, le=36)
    keep: bool = False

    def _bounds(self) -> dict[str, tuple[float, float]]:
        """The new columns' bounds, in order."""
        pixel, grid = (0.0, 255.0), range(self.blocks)
        return {
            f"{self.column}_mean": pixel,
            f"{self.column}_std": (0.0, 127.5),
            **{f"{self.column}_q{100 * p:g}": pixel for p in self.quantiles},
            **{f"{self.column}_block_{r}_{c}": pixel for r in grid for c in grid},
            **{f"{self.column}_edge_{d}": (0.0, 1.0) for d in range(self.directions)},
        }

    def after(self, schema: TableSchema) -> TableSchema:
        source = column_of(schema, self.column, "image")
        role: Any = source.role if source.role in ("feature", "label") else "feature"
        columns = {name: c for name, c in schema.columns.items() if self.keep or name != self.column}
        for name, limits in self._bounds().items():
            columns[free_name(schema, name)] = Column(range=limits, role=role, missing=source.missing)
        return schema.model_copy(update={"columns": columns})

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        shape = frame.schema.columns[self.column].shape or ()

        def computed(batch: pa.RecordBatch) -> Floats:
            made = np.full((batch.num_rows, len(self._bounds())), np.nan)
            for i, cell in enumerate(batch.column(0).to_pylist()):
                if cell is not None and len(cell) == math.prod(shape):
                    made[i] = self._features(np.frombuffer(cell, np.uint8).reshape(shape).astype(np.float64))
            return made

        frame = beside(frame, [self.column], [f"__{name}" for name in self._bounds()], computed)
        return frame.replace({name: frame[f"__{name}"] for name in self._bounds()}, self.after(frame.schema))

    def _features(self, image: Floats) -> Floats:
        """All features of one image, [height, width] or [height, width, channels]."""
        if image.ndim == 3:
            image = image @ np.array([0.299, 0.587, 0.114]) if image.shape[2] == 3 else image.mean(axis=2)
        made = [image.mean(), image.std(), *np.quantile(image, self.quantiles)]
        rows, columns = (np.arange(self.blocks + 1) * size // max(self.blocks, 1) for size in image.shape)
        for r in range(self.blocks):
            for c in range(self.blocks):
                block = image[rows[r] : rows[r + 1], columns[c] : columns[c + 1]]
                made.append(block.mean() if block.size else image.mean())
        if self.directions:
            made += list(self._edges(image))
        return np.array(made)

    def _edges(self, image: Floats) -> Floats:
        if min(image.shape) < 2:
            return np.zeros(self.directions)
        down, across = np.gradient(image)
        strength = np.hypot(down, across)
        place = np.floor(np.arctan2(down, across) % np.pi / np.pi * self.directions).astype(np.int64)
        place = np.minimum(place, self.directions - 1).ravel()  # π itself, by rounding
        total = np.bincount(place, strength.ravel(), self.directions)
        return np.asarray(total / total.sum() if total.sum() > 0 else total)
