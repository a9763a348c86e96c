"""Distillation: models learn what others predict on rows that everybody may see, instead of others' weights.

What is averaged are scores: a binary target's log-odds, the log of each class's probability, a count's log, a value in
units of half its range about its middle. Models that learn from a mean of them minimise the cross-entropy to the
softmax of that mean, which is the Kullback-Leibler divergence up to a constant (of values: half the squared error).

Sources: Hinton, Vinyals & Dean 2015, Distilling the Knowledge in a Neural Network, §2; Lin et al. 2020, Ensemble
Distillation for Robust Model Fusion in Federated Learning (NeurIPS), §3 (AvgLogits).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.program import SiteView
from atoll.contract.rounds import Task, TaskId
from atoll.horizontal.local import Local, LocalParams, Weights, still
from atoll.horizontal.rows import PublicParams
from atoll.models.model import Examples, Goal, Model
from atoll.models.rows import Rows

Floats = NDArray[np.float64]
FAR = 30.0
"""Scores beyond this count as that far: a probability of 10⁻¹³."""


class DistillationParams(LocalParams, PublicParams):
    """distil_steps: mini-batches of public rows in a round. distil_rate: the learning rate on them; null: the
    learning_rate. Batch size, momentum and weight decay are those of other steps."""

    distil_steps: int = Field(default=100, ge=0, le=100_000)
    distil_rate: float | None = Field(default=None, gt=0)


def width(model: Model, rows: Rows) -> int:
    """How many scores a row has."""
    return Goal.of(rows.schema, model.targets).outputs


def scores(model: Model, rows: Rows) -> Floats:
    """What a fitted model says of *rows*, [num_rows, scores], within ±FAR."""
    found = np.asarray(model.predict(rows), np.float64).reshape(len(rows), -1)
    with np.errstate(divide="ignore", over="ignore"):
        if model.task == "regression":
            goal = Goal.of(rows.schema, model.targets)
            found = (found - goal.middle) / goal.half
        else:
            found = np.log(found) - (np.log1p(-found) if model.task == "binary" else 0.0)
    return np.clip(found, -FAR, FAR)


def labels(model: Model, rows: Rows, mean: Floats) -> Floats:
    """Labels, as :class:`Examples` has them, that say what a mean of scores says."""
    mean = np.clip(mean, -FAR, FAR)  # noise may have driven it further
    if model.task == "classes":
        likely = np.exp(mean - mean.max(1, keepdims=True))
        return np.asarray(likely / likely.sum(1, keepdims=True))
    if model.task == "regression":
        goal = Goal.of(rows.schema, model.targets)
        made = goal.middle + goal.half * mean
    else:
        made = np.exp(mean) if model.task == "count" else 1 / (1 + np.exp(-mean))
    return made[:, 0] if made.shape[1] == 1 else made


def distilled(at: Local, rows: Rows, mean: Floats, start: Weights) -> Weights:
    """*start* after a round's steps towards a mean of scores, [num_rows, scores], on *rows*; raises ProtocolError
    "site.diverged"."""
    return taught(at, Examples(at.model.examples(rows).inputs, labels(at.model, rows, mean)), start)


def taught(at: Local, examples: Examples, start: Weights, part: int = 1) -> Weights:
    """*start* after a round's steps on public *examples*; *part*: see :meth:`Local.batches`."""
    p: Any = at.params
    params = p.model_copy(update={"learning_rate": p.distil_rate or p.learning_rate})
    return replace(at, params=params, examples=examples).sgd(start, steps=p.distil_steps, part=part).weights


class Unwatched:
    """Steps at the coordinator: there is nobody to tell of progress."""

    def progress(self, done: float, total: float) -> None:
        """Nothing."""


def at_coordinator(params: DistillationParams, model: Model, rows: Rows, seed: int, number: int) -> Local:
    """The coordinator in round *number*: public rows are all that it has."""
    task = Task(TaskId("", number, 0, "", "coordinator"), {}, (seed, number, 2))
    site = cast(SiteView, Unwatched())
    return Local(params, model, model.examples(rows), site, task, still(model, params.freeze))
