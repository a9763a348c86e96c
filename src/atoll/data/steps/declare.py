"""What steps say of the columns they make, and of statistics that are not enough to fit them on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from atoll.contract.errors import PlanError
from atoll.contract.schema import Column


def between(
    low: float, high: float, like: Column, *, dtype: Literal["real", "integer"] = "real", unit: str = ""
) -> Column:
    """A numeric column with these bounds, and role and missing rule as *like* has them."""
    kept: dict[str, Any] = {"dtype": dtype, "unit": unit, "role": like.role, "missing": like.missing}
    if low == high:  # a range must have a width
        return Column(values=(low,), **kept)
    return Column(range=(low, high), **kept)


def coded(size: int, like: Column) -> Column:
    """A column of the codes 0 … size − 1."""
    return Column(dtype="integer", values=tuple(range(size)), role=like.role, missing=like.missing)


def blurred(column: Column) -> Column:
    """A numeric column as it is once its cells may be any number within its bounds."""
    if column.dtype == "real" and column.values is None:
        return column
    low, high = column.bounds()
    return between(low, high, column, unit=column.unit)


def enough(found: Mapping[str, Any], names: Iterable[str], *wanted: str) -> dict[str, list[float]]:
    """The *wanted* statistics of each column; raises PlanError where one is withheld, or there are too few values."""
    numbers = {name: [found[name].get(key) for key in wanted] for name in names}
    lacking = [name for name, row in numbers.items() if any(x is None or not math.isfinite(x) for x in row)]
    if lacking:
        raise PlanError(
            "recipe.nothing-to-fit", "the statistics of these columns are withheld, or there are too few values",
            field=", ".join(lacking), remedy="leave the columns out of the step",
        )  # fmt: skip
    return {name: [float(x) for x in row] for name, row in numbers.items()}


def quantiles(found: Mapping[str, Any], names: Iterable[str]) -> dict[str, list[float]]:
    """Each column's quantiles of ``statistics.quantiles``; raises PlanError as :func:`enough` does."""
    columns = found["quantiles"]["columns"]
    told = {name: dict(enumerate(columns[name]["values"])) for name in names}
    size = max(map(len, told.values()), default=0)
    return enough(told, told, *range(size))
