"""Two streams of rows at irregular times, and how pandas looks at them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from atoll.data.table import Table

NAN = float("nan")
COLUMNS: dict[str, Any] = {
    "t": {"dtype": "datetime", "role": "time"},
    "s": {"dtype": "text", "values": ["one", "two"]},
    "x": {"range": [-5, 5]},
    "n": {"dtype": "integer", "range": [0, 9]},
    "note": {"dtype": "text"},
    "day": {"dtype": "date"},
}
BY = {"on": "t", "by": "s"}


@pytest.fixture
def stream(table_of: Any) -> Table:
    """400 rows in no order, two streams, irregular times (some twice, some before 1970), a fifth missing."""
    random = np.random.default_rng(8)
    n = 400
    minutes = random.integers(-4000, 4000, n)
    return table_of(
        {
            "t": np.datetime64("1970-01-02", "us") + minutes * np.timedelta64(1, "m"),
            "s": random.choice(["one", "two"], n),
            "x": np.where(random.random(n) < 0.2, NAN, np.clip(random.normal(0, 2, n), -5, 5)),
            "n": np.where(random.random(n) < 0.2, NAN, random.integers(0, 10, n)),
            "note": random.choice(np.array(["a", "b", None], object), n),
            "day": np.datetime64("1970-01-02") + random.integers(-20, 20, n),
        },
        COLUMNS,
    )


def frame_of(table: Table) -> pd.DataFrame:
    return pd.DataFrame({name: table[name] for name in table.columns})


def by_stream(table: Table) -> pd.DataFrame:
    """Sorted as steps look at it; the index says where a row is in the table."""
    return frame_of(table).sort_values(["s", "t"], kind="stable")


def run(prepare: Any, table: Table, **step: Any) -> Table:
    return prepare([step], {"site": table})["site"]


def grouped(made: pd.Series) -> pd.Series:
    """A groupby's result in the table's order."""
    return made.sort_index()
