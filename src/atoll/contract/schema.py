"""The data contract: what every site's table must look like.

name: heart
columns:
  age:  {dtype: real, unit: year, range: [0, 120]}
  sex:  {dtype: integer, values: [0, 1], missing: forbid}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

DType = Literal["real", "integer", "text", "date", "datetime", "image"]
Role = Literal["feature", "label", "entity", "time", "ignore"]


class Column(BaseModel):
    """One column.

    dtype: real, integer, text (codes, or free text), date, datetime (UTC) or image (8 bits a value).
    unit: as people write it ("mmHg"). shape: of an image, [height, width] or [height, width, channels].
    grain: of dates and datetimes, the step they keep to ("1d", "1h", "15min").
    range: [lowest, highest] plausible value, inclusive, in *unit*; mandatory for numbers
        without a code list, because bounds on what leaves a site derive from it.
    values: the code list; anything else breaks the contract.
    null_values: codes that mean "missing" (a cholesterol of 0). missing: may cells be empty?
    role: what the column is for ("entity" must be unique).
    data_class: what kind of data it is ("identifier", "trajectory", "clinical" …; several: "clinical+identifier"), by
        which a site's policy may keep it from every program.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    dtype: DType = "real"
    unit: str = ""
    role: Role = "feature"
    range: tuple[float, float] | None = None
    values: tuple[int | float | str, ...] | None = None
    null_values: tuple[int | float | str, ...] = ()
    missing: Literal["allow", "forbid"] = "allow"
    shape: tuple[int, ...] | None = None
    grain: str | None = Field(default=None, pattern=r"^[1-9][0-9]*(d|h|min|s)$")
    data_class: str | None = Field(default=None, pattern=r"^[a-z][a-z0-9-]{0,31}([+][a-z][a-z0-9-]{0,31})*$")
    description: str = ""

    @model_serializer(mode="wrap")
    def _without_no_class(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A schema without data classes is written, and hashed, as before there were any."""
        written: dict[str, Any] = write(self)
        if self.data_class is None:
            written.pop("data_class", None)
        return written

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        numeric = self.dtype in ("real", "integer")
        if self.range is not None and not (numeric and self.range[0] < self.range[1]):
            raise ValueError("range needs a numeric dtype and [lowest, highest] with lowest < highest")
        if (self.dtype == "image") != (self.shape is not None and 2 <= len(self.shape) <= 3):
            raise ValueError("an image (and nothing else) needs a shape [height, width] or [height, width, channels]")
        if self.grain is not None and self.dtype not in ("date", "datetime"):
            raise ValueError("grain is for dates and datetimes")
        if self.values is not None and not self.values:
            raise ValueError("values must list at least one code")
        if numeric and self.values is not None and any(isinstance(v, str) for v in self.values):
            raise ValueError("values of a numeric column must be numbers")
        if numeric and self.role in ("feature", "label") and self.range is None and self.values is None:
            raise ValueError("a numeric column needs a range [lowest, highest] or a list of values")
        return self

    @property
    def numeric(self) -> bool:
        """True for columns that handlers see as float64."""
        return self.dtype in ("real", "integer")

    @property
    def data_classes(self) -> frozenset[str]:
        """What kinds of data it is; mostly none that is named."""
        return frozenset(self.data_class.split("+")) if self.data_class else frozenset()

    def bounds(self) -> tuple[float, float]:
        """(lowest, highest) allowed value of a numeric column, in its unit; raises ValueError for others."""
        if self.range is not None:
            return self.range
        if self.values is not None and self.numeric:
            codes = [float(v) for v in self.values]
            return min(codes), max(codes)
        raise ValueError("the column has no bounds")


class TableSchema(BaseModel):
    """Columns by name, and the most rows any site may hold (which bounds every count)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    version: str = "1"
    max_rows: int = Field(default=10_000_000, gt=0)
    columns: Mapping[str, Column] = Field(min_length=1)

    @field_validator("columns")
    @classmethod
    def _plain_names(cls, columns: Mapping[str, Column]) -> Mapping[str, Column]:
        if any(name.startswith("__") for name in columns):
            raise ValueError("names that begin with two underscores are the engine's own")
        return columns

    def numeric_columns(self) -> tuple[str, ...]:
        """Names of numeric feature and label columns, in schema order."""
        return tuple(n for n, c in self.columns.items() if c.numeric and c.role in ("feature", "label"))

    def with_columns(self, columns: Mapping[str, Column]) -> TableSchema:
        """This schema with columns added or replaced."""
        return self.model_copy(update={"columns": {**self.columns, **columns}})
