"""Values far from all others of the cohort."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from atoll.contract.schema import TableSchema
from atoll.data.frame import Frame, null
from atoll.data.step import Fitted, Found, Need, Step, numeric_of, step
from atoll.data.steps.cells import Names
from atoll.data.steps.declare import blurred, enough, quantiles


@step("outliers")
class Outliers(Step):
    """Make values of ``columns`` missing, or move them to the fence, where they are outside of fences that are
    fitted over all sites' training rows.

    method: "sd": mean ± k standard deviations; "iqr": k interquartile ranges below the first or above the
    third quartile (Tukey 1977; the quartiles within 1e-6 of the schema's range). k: default 3, or 1.5.
    outside: "missing" or "winsorise". No row is left out.
    """

    columns: Names = Field(min_length=1)
    method: Literal["sd", "iqr"] = "sd"
    k: float | None = Field(default=None, gt=0)
    outside: Literal["missing", "winsorise"] = "missing"

    def needs(self) -> tuple[Need, ...]:
        if self.method == "sd":
            return (Need("statistics.describe", self.columns, (("bins", 1),)),)
        return (Need("statistics.quantiles", self.columns, (("probabilities", (0.25, 0.75)),)),)

    def fit(self, found: Found) -> Fitted:
        result = found[self.needs()[0]]
        if self.method == "sd":
            k = self.k or 3.0
            moments = enough(result["columns"], self.columns, "mean", "std")
            return {name: [mean - k * std, mean + k * std] for name, (mean, std) in moments.items()}
        k = self.k or 1.5
        quartiles = quantiles(result, self.columns)
        return {name: [q1 - k * (q3 - q1), q3 + k * (q3 - q1)] for name, (q1, q3) in quartiles.items()}

    def after(self, schema: TableSchema) -> TableSchema:
        changed = {}
        for name in self.columns:
            column = numeric_of(schema, name)
            missing = column.model_copy(update={"missing": "allow"})
            changed[name] = missing if self.outside == "missing" else blurred(column)
        return schema.with_columns(changed)

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        changed = {}
        for name in self.columns:
            low, high = (float(x) for x in fitted[name])
            cell, bounds = frame[name], frame.schema.columns[name].bounds()
            low, high = max(low, bounds[0]), min(high, bounds[1])
            if self.outside == "missing":
                changed[name] = cell.between(low, high).ifelse(cell, null("float64"))
            else:
                changed[name] = cell.clip(low, high)
        return frame.replace(changed, self.after(frame.schema))
