"""Missing cells filled with a statistic over all sites."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from atoll.contract.errors import PlanError
from atoll.contract.schema import TableSchema
from atoll.data.frame import Frame
from atoll.data.step import Fitted, Found, Need, Step, numeric_of, step


@step("impute")
class Impute(Step):
    """Fill missing cells of numeric ``columns`` with the mean over all sites' training rows."""

    columns: tuple[str, ...] = Field(min_length=1)
    method: Literal["mean"] = Field(default="mean", alias="with")

    def needs(self) -> tuple[Need, ...]:
        return (Need("statistics.describe", self.columns, (("bins", 1),)),)

    def fit(self, found: Found) -> Fitted:
        statistics = found[self.needs()[0]]["columns"]
        empty = [name for name in self.columns if not statistics[name]["count"] > 0]
        if empty:
            raise PlanError(
                "recipe.nothing-to-impute",
                "no site has a single value in these columns",
                field=", ".join(empty),
                remedy="leave the columns out of the study",
            )
        return {name: float(statistics[name]["mean"]) for name in self.columns}

    def after(self, schema: TableSchema) -> TableSchema:
        filled = {name: numeric_of(schema, name).model_copy(update={"missing": "forbid"}) for name in self.columns}
        for name, column in filled.items():
            if column.values is not None:  # a mean is not one of the codes, but lies between them
                low, high = column.bounds()
                filled[name] = column.model_copy(update={"values": None, "range": (low, high), "dtype": "real"})
        return schema.with_columns(filled)

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        filled = {name: frame[name].fill_null(float(fitted[name])) for name in self.columns}
        return frame.replace(filled, self.after(frame.schema))
