"""When learning has gone on for long enough, and which round's weights become the model.

What is watched is the mean training loss of each round, or a metric of the evaluations on the way. Source: Prechelt
1998, Early Stopping — But When?, in Neural Networks: Tricks of the Trade, §2 (patience).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from atoll.contract.wire import Array, Json

LOSS = "loss"
LOWER = frozenset({LOSS, "log_loss", "brier", "mae", "rmse"})
HIGHER = frozenset({"auc", "ks", "accuracy", "f1", "macro_f1", "balanced_accuracy", "r2", "mean_auc"})
"""Metrics that are the better the lower, or the higher, they are."""
REMEMBERED = ("best", "since", "score", "best_round")
"""Of a run, beside the best weights, in checkpoints."""


def _known(metric: str) -> None:
    if metric not in LOWER | HIGHER:
        raise ValueError(f"nothing is known of a metric {metric!r}; known: {', '.join(sorted(LOWER | HIGHER))}")


class Target(BaseModel):
    """metric: the training "loss", or one of evaluation; at_least, at_most: where it is good enough (one of both)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    metric: str = LOSS
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one(self) -> Target:
        _known(self.metric)
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("a target is either at_least or at_most so much")
        return self

    def reached(self, value: float) -> bool:
        """Is a value good enough?"""
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)


class Stop(BaseModel):
    """patience: end after so many values of *metric* (the training "loss", or one of evaluation) in a row none of which
    was better than the best by more than *min_delta*. target: end where it is reached."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    metric: str = LOSS
    patience: int | None = Field(default=None, ge=1)
    min_delta: float = Field(default=0.0, ge=0)
    target: Target | None = None

    @model_validator(mode="after")
    def _can_be(self) -> Stop:
        _known(self.metric)
        return self

    @property
    def asked(self) -> bool:
        """May it end a run at all?"""
        return self.patience is not None or self.target is not None

    @property
    def evaluated(self) -> bool:
        """Does it need evaluations on the way?"""
        watched = {self.metric} if self.patience is not None else set()
        return bool((watched | ({self.target.metric} if self.target else set())) - {LOSS})


@dataclass
class Watch:
    """One run: what was best, and how long ago. kept: by which metric the best weights are kept, if they are.
    best_round: theirs, from 0. ended: by which of the plan's words it ended early."""

    stop: Stop
    keep: Literal["last", "best"] = "last"
    kept: str = "log_loss"
    best: float = math.nan
    since: float = 0.0
    score: float = math.nan
    best_round: float = math.nan
    weights: Array = field(default_factory=lambda: np.zeros(0))
    ended: Literal["", "patience", "target"] = ""

    def resumed(self, state: dict[str, Array]) -> Watch:
        """As it was when it was told as :meth:`arrays`, which are taken out of *state*."""
        self.weights = state.pop("best weights", self.weights)
        for name in REMEMBERED:
            setattr(self, name, float(state.pop(f"stop {name}", np.array(getattr(self, name)))))
        return self

    def arrays(self) -> dict[str, Array]:
        """For a checkpoint."""
        told = {f"stop {name}": np.array(float(getattr(self, name))) for name in REMEMBERED}
        return {**(told if self.stop.asked or self.keep == "best" else {}),
                **({"best weights": self.weights} if len(self.weights) else {})}  # fmt: skip

    def enough(self, values: Mapping[str, float], number: int, weights: Array | None = None) -> bool:
        """Is it time to end, after round *number*? values: what was measured just now. weights: those that evaluation
        measured."""
        found = {name: value for name, value in values.items() if not math.isnan(value)}
        if self.stop.metric in found and self.stop.patience is not None:
            if _better(self.stop.metric, found[self.stop.metric], self.best, self.stop.min_delta):
                self.best, self.since = found[self.stop.metric], 0.0
            else:
                self.since += 1
            if self.since >= self.stop.patience:
                self.ended = "patience"
        wanted = weights is not None and self.keep == "best" and self.kept in found
        if wanted and _better(self.kept, found[self.kept], self.score, 0.0):
            self.score, self.weights, self.best_round = found[self.kept], np.array(weights), float(number)
        target = self.stop.target
        if target is not None and target.metric in found and target.reached(found[target.metric]):
            self.ended = "target"
        return bool(self.ended)

    def told(self, *, used_up: bool) -> dict[str, Json]:
        """For the result: {"ended_by": "rounds" (all of them), "schedule" (its limits), "patience" or "target";
        "kept_round": whose weights are the model's, where the best are}."""
        why = self.ended or ("schedule" if used_up else "rounds")
        return {"ended_by": why, **({"kept_round": int(self.best_round)} if len(self.weights) else {})}


def _better(metric: str, value: float, best: float, delta: float) -> bool:
    gain = best - value if metric in LOWER else value - best
    return math.isnan(best) or gain > delta
