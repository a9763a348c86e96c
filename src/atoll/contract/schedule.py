"""The plan's ``schedule``: which sites a round asks, how long it waits, and what a run may spend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from atoll.contract.wire import Array

EFFORT = "effort"
"""Under this name a site is sent the share of a round's work that it is asked for."""

Factor = Literal["availability", "speed", "quality", "priority"]


class Schedule(BaseModel):
    """sample: what makes a site likelier to be drawn, where a round draws some of the cohort (none: all are alike).
    priority: how often a site computes and talks, by its name: 1 (as by default) in every training round, 0.5 in every
    other one. effort_min: slow sites do less local work, down to this share, so that all take about as long (1: nobody
    does). within_s: a site that has not answered a training round after so many seconds is left out of that one, as
    long as cohort.min_sites have answered. stop_after_s, stop_after_bytes: when its rounds have taken so long, or so
    much has travelled, the program comes to its end with what it has."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    sample: tuple[Factor, ...] = ()
    priority: dict[str, float] = Field(default_factory=dict)
    effort_min: float = Field(default=1.0, gt=0, le=1)
    within_s: float | None = Field(default=None, gt=0)
    stop_after_s: float | None = Field(default=None, gt=0)
    stop_after_bytes: int | None = Field(default=None, gt=0)

    @field_validator("priority")
    @classmethod
    def _shares(cls, priority: dict[str, float]) -> dict[str, float]:
        if any(not 0 < share <= 1 for share in priority.values()):
            raise ValueError("a priority is above 0, and at most 1")
        return priority

    def allowed(self, sent: Mapping[str, Array]) -> dict[str, Array]:
        """What a site was sent, with an effort as the plan lets it be: none, where it lets none be less than all."""
        found = dict(sent)
        effort: Any = found.pop(EFFORT, None)
        if effort is not None and self.effort_min < 1:
            right = effort.dtype == np.float64 and effort.shape == () and np.isfinite(effort)
            found[EFFORT] = np.array(np.clip(effort, self.effort_min, 1.0) if right else 1.0)
        return found
