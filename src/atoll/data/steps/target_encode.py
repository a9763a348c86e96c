"""A code list as the mean of a target among the rows that have each code."""

from __future__ import annotations

from typing import Any

import ibis
from pydantic import Field

from atoll.contract.schema import TableSchema
from atoll.data.frame import Frame
from atoll.data.step import Fitted, Found, Need, Step, free_name, numeric_of, step
from atoll.data.steps.declare import between, enough
from atoll.data.steps.one_hot import values_of


@step("target_encode")
class TargetEncode(Step):
    """Replace ``column`` with a code list by ``into``: each code's mean of ``target`` over all sites' training
    rows, drawn to the mean μ of all: (n · mean + m · μ) / (n + m) (Micci-Barreca 2001).

    smoothing: m. Codes that are missing, that no row has, or whose group is too small to be told get μ. The
    encoding has seen the training rows' targets: judge a model by held-out rows.
    """

    column: str
    target: str
    into: str = ""
    smoothing: float = Field(default=10.0, ge=0)

    def needs(self) -> tuple[Need, ...]:
        target = (self.target,)
        return (
            Need("statistics.group_by", target, (("by", (self.column,)),)),
            Need("statistics.describe", target, (("bins", 1),)),
        )

    def fit(self, found: Found) -> Fitted:
        groups, overall = (found[need] for need in self.needs())
        [mean] = enough(overall["columns"], (self.target,), "mean")[self.target]
        codes = []
        for group in groups["group_by"]["groups"]:
            [code], of_target = group["key"], group["columns"][self.target]
            if code is not None and of_target["count"] and of_target["mean"] is not None:
                n = of_target["count"]
                codes.append([code, (n * of_target["mean"] + self.smoothing * mean) / (n + self.smoothing)])
        return {"mean": mean, "codes": codes}

    def after(self, schema: TableSchema) -> TableSchema:
        source, _ = values_of(schema, self.column)
        target, into = numeric_of(schema, self.target), self.into or self.column
        free_name(schema, into, self.column)
        low, high = target.bounds()
        made = between(low, high, source.model_copy(update={"missing": "forbid"}), unit=target.unit)
        columns = {name: column for name, column in schema.columns.items() if name != self.column}
        return schema.model_copy(update={"columns": {**columns, into: made}})

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        low, high = frame.schema.columns[self.target].bounds()
        cell, mean, found = frame[self.column], float(fitted["mean"]), list[Any]()
        for code, value in fitted["codes"]:
            found.append((cell == code, ibis.literal(min(max(float(value), low), high))))
        else_ = ibis.literal(min(max(mean, low), high))
        encoded = ibis.cases(*found, else_=else_) if found else else_
        return frame.replace({self.into or self.column: encoded}, self.after(frame.schema))
