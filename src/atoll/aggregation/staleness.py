"""How much a change counts that was made from older weights: 1 for none older, less and less as they are.

The age τ of a change is by how many of the coordinator's steps the weights moved since they were sent to the site.

Sources: Xie, Koyejo & Gupta 2019, Asynchronous Federated Optimization, §5.2 (polynomial and hinge); Nguyen et al. 2022,
Federated Learning with Buffered Asynchronous Aggregation (AISTATS), §5 and appendix (polynomial with exponent ½).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Staleness(BaseModel):
    """decay: "polynomial", (1 + τ)^−exponent; "hinge", 1 up to an age of *after*, then 1 / (slope · (τ − after) + 1);
    "none". A change older than *most* counts nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    decay: Literal["polynomial", "hinge", "none"] = "polynomial"
    exponent: float = Field(default=0.5, ge=0)
    after: float = Field(default=4.0, ge=0)
    slope: float = Field(default=10.0, gt=0)
    most: int | None = Field(default=None, ge=0)

    def of(self, age: float) -> float:
        """s(τ), in [0, 1]."""
        if self.most is not None and age > self.most:
            return 0.0
        if self.decay == "polynomial":
            return float((1 + age) ** -self.exponent)
        if self.decay == "hinge" and age > self.after:
            return 1 / (self.slope * (age - self.after) + 1)
        return 1.0
