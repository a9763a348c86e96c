"""How long sites compute: local steps, by the time of one that is measured or told, and passes over rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.program import build
from atoll.contract.rounds import Ready, Round
from atoll.contract.wire import canonical_json

TASK_S = 0.004
"""A site's own time for a task, whatever it is: verifying, signing and its journal (benchmarks/round_trip.py)."""
ROW_S = 2e-7
"""A pass over a row, where no step was measured."""

TRAINING = ("train", "train_single", "train_next")
"""Rounds of local steps, besides those that the schedule paces and those that only tell that they are done."""


@dataclass
class Work:
    """rows: that each site learns from, [num_sites]. step_s: seconds of one local step (a mini-batch); row_s: of a row
    in a pass over all of them."""

    rows: NDArray[np.float64]
    step_s: float = 0.0
    row_s: float = ROW_S
    task_s: float = TASK_S
    _params: dict[bytes, Any] = field(default_factory=dict)

    def seconds(self, asked: Round, where: NDArray[np.int64], efforts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of computing a round, by site, [len(where)], on the machine that steps are measured on."""
        rows, steps = self.rows[where], self.steps(asked, where, efforts)
        if steps is None:
            return rows * self.row_s + self.task_s
        return steps * self.step_s + self.task_s

    def steps(self, asked: Round, where: NDArray[np.int64], efforts: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """Mini-batches of a round, by site, [len(where)]; None where it is none of local training."""
        params = self._of(asked.program, asked.params)
        training = asked.paced or asked.name in TRAINING or isinstance(asked.reduce, Ready)
        if not training or not hasattr(params, "local_epochs"):
            return None
        each = -(-self.rows[where] // params.batch_size)
        whole = np.full(len(where), float(params.local_steps)) if params.local_steps else params.local_epochs * each
        return np.where(each > 0, np.maximum(1, np.rint(efforts * whole)), 0.0)

    def _of(self, program: str, params: Mapping[str, Any]) -> Any:
        key = canonical_json([program, dict(params)])
        if key not in self._params:
            self._params[key] = build(program, params).params
        return self._params[key]
