"""Numbers on a common scale."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from atoll.contract.schema import Column, TableSchema
from atoll.data.frame import Frame
from atoll.data.step import Fitted, Found, Need, Step, numeric_of, step
from atoll.data.steps.cells import Names
from atoll.data.steps.declare import between, enough, quantiles

_NEEDS = {
    "standard": ("statistics.describe", ("bins", 1)),
    "robust": ("statistics.quantiles", ("probabilities", (0.25, 0.5, 0.75))),
    "minmax": ("statistics.describe", ("bins", 1024)),
}


@step("scale")
class Scale(Step):
    """Scale ``columns`` by what is fitted over all sites' training rows, or by the schema's range.

    method: "standard": (x − mean) / standard deviation. "robust": (x − median) / interquartile range.
    "minmax": (x − low) / (high − low), with the protected extremes of ``statistics.describe`` (1024 bins).
    "range": the same with the schema's range, and nothing fitted. A column that does not vary becomes 0.
    clip: results beyond ± clip ("minmax": beyond [0, 1]) are moved there: bounds on what leaves a site
    derive from it.
    """

    columns: Names = Field(min_length=1)
    method: Literal["standard", "robust", "minmax", "range"] = "standard"
    clip: float = Field(default=10.0, gt=0)

    def needs(self) -> tuple[Need, ...]:
        if self.method == "range":
            return ()
        program, option = _NEEDS[self.method]
        return (Need(program, self.columns, (option,)),)

    def fit(self, found: Found) -> Fitted:
        if self.method == "range":
            return {}
        result = found[self.needs()[0]]
        if self.method == "robust":
            return {name: [median, q3 - q1] for name, (q1, median, q3) in quantiles(result, self.columns).items()}
        if self.method == "standard":
            return dict(enough(result["columns"], self.columns, "mean", "std"))
        return {
            n: [low, high - low] for n, (low, high) in enough(result["columns"], self.columns, "low", "high").items()
        }

    def _limits(self) -> tuple[float, float]:
        return (0.0, 1.0) if self.method in ("minmax", "range") else (-self.clip, self.clip)

    def after(self, schema: TableSchema) -> TableSchema:
        return schema.with_columns({n: between(*self._limits(), numeric_of(schema, n)) for n in self.columns})

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        changed = {}
        for name in self.columns:
            center, width = self._scale(frame.schema.columns[name], fitted.get(name))
            moved = frame[name] - center
            changed[name] = (moved / width if width > 0 else moved * 0.0).clip(*self._limits())
        return frame.replace(changed, self.after(frame.schema))

    def _scale(self, column: Column, fitted: object) -> tuple[float, float]:
        if isinstance(fitted, list | tuple):
            return float(fitted[0]), float(fitted[1])
        low, high = column.bounds()
        return low, high - low
