"""What the engine cannot say: computed on arrays, batch by batch, and put back beside the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from atoll.data.engine import telling
from atoll.data.frame import Frame

ROWS = 4096
"""Rows looked at together: text and images are wide."""


def beside(
    frame: Frame, columns: list[str], made: list[str],
    compute: Callable[[pa.RecordBatch], NDArray[np.float64]],
) -> Frame:  # fmt: skip
    """*frame*, computed once, with numeric columns named *made* that *compute* makes of each batch of
    *columns*: [num_rows, len(made)], NaN for missing. Raises SchemaError."""
    frame = frame.keep()
    names = made

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in frame.engine.batches(frame.table.select(*columns), ROWS):
            cells = compute(batch)
            arrays = [pa.array(np.ascontiguousarray(cells[:, i]), from_pandas=True) for i in range(len(names))]
            yield pa.record_batch(arrays, names)

    layout = pa.schema([(name, pa.float64()) for name in names])
    with telling():
        table = frame.engine.beside(frame.table, pa.RecordBatchReader.from_batches(layout, batches()))
    return dataclasses.replace(frame, table=table)
