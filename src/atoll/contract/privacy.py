"""What a plan promises about single records, entities or sites: its differential privacy."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Unit = Literal["record", "entity", "site"]
STRENGTH: dict[Unit, int] = {"record": 0, "entity": 1, "site": 2}
"""A promise about a larger unit is the stronger one."""


class Privacy(BaseModel):
    """A plan's ``privacy``: (ε, δ)-differential privacy of everything that the run tells, for one *unit*.

    unit: whose presence is hidden: one record's, one entity's with all its records (at most *rows_per_entity*, which
    sites check), or one site's with all its data. epsilon, delta: for the whole run; neighbours differ by one unit
    added or removed. mechanism: discrete_gaussian, gaussian, laplace, or geometric (counts only); with the last two
    delta may be 0. stages: noise over the run's rounds, constant, rising or falling by the factor *ratio*, under
    the same total. colluding: so many sites may pool what they know with the coordinator.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    unit: Unit
    epsilon: float = Field(gt=0)
    delta: float = Field(ge=0, lt=1)
    mechanism: Literal["discrete_gaussian", "gaussian", "laplace", "geometric"] = "discrete_gaussian"
    stages: Literal["constant", "rising", "falling"] = "constant"
    ratio: float = Field(default=4.0, ge=1)
    rows_per_entity: int = Field(default=1, ge=1)
    colluding: int = Field(default=0, ge=0)
