"""When boosting has gone on for long enough. Source: Prechelt 1998, Early Stopping — But When?, §2 (patience)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from atoll.contract.wire import Array


class Patience(BaseModel):
    """patience: end after so many trees in a row none of which made the mean loss on held-out rows better than the
    best by more than *min_delta*; the model is then of the trees up to the best."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    patience: int | None = Field(default=None, ge=1)
    min_delta: float = Field(default=0.0, ge=0)

    @property
    def asked(self) -> bool:
        """May it end a run at all?"""
        return self.patience is not None


@dataclass
class Watched:
    """history, held_out: mean losses of 0, 1, … steps. best: of how many steps the held-out loss was best."""

    rule: Patience
    history: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    best: int = 0

    def enough(self, loss: float, held_out: float) -> bool:
        """Note the losses after another step; is it time to end?"""
        steps = len(self.history)
        self.history.append(loss)
        self.held_out.append(held_out)
        before = self.held_out[self.best]
        if steps and (held_out < before - self.rule.min_delta or math.isnan(before)):
            self.best = steps
        return self.rule.patience is not None and steps - self.best >= self.rule.patience

    def arrays(self) -> dict[str, Array]:
        """For a checkpoint."""
        return {
            "history": np.array(self.history), "held_out": np.array(self.held_out), "best": np.array(self.best),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Array]) -> None:
        """As :meth:`arrays` was made."""
        self.history, self.held_out = state["history"].tolist(), state["held_out"].tolist()
        self.best = int(state["best"])
