"""The losses and gradients of one model at many sites' weights and mini-batches at once.

A step of a small model is mostly the cost of calling its operations one by one; done for hundreds of sites in one call
each, they cost hardly more than for one. Networks go through ``torch.func.vmap``, linear models through batched
matrix products. What comes out equals what ``loss_and_gradient`` gives for each site to rounding: sums are added up in
another order.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.models.linear import LinearModel
from atoll.models.model import Examples, Floats, Model

Learn = Callable[[NDArray[Any], Examples, NDArray[np.int64]], tuple[Floats, NDArray[Any]]]
"""(weights [num_sites, num_weights], mini-batches [num_sites, batch_size, …], rows in each [num_sites], at least one;
those behind them repeat rows of the same batch) → (mean losses [num_sites], gradients [num_sites, num_weights], which
the next call overwrites)."""
MOST_WEIGHTS = 1 << 15
"""Of larger networks, calling operations one by one is not what a step costs."""


def batched(model: Model, rows: Examples) -> Learn | None:
    """How many sites learn *model* at once; *rows* are some of its examples. None where they cannot: it mixes rows,
    draws, or has operations that PyTorch does not do for many weights at once; and where they would gain nothing."""
    if isinstance(model, LinearModel):
        return Linear(model)
    if model.running.stop > model.running.start or len(model.weights) > MOST_WEIGHTS or not hasattr(model, "net"):
        return None
    made: Learn | None = importlib.import_module("atoll.models.vmapped").vmapped(model, rows)
    return made


class Linear:
    """See :meth:`atoll.models.linear.LinearModel.loss_and_gradient`."""

    def __init__(self, model: LinearModel) -> None:
        self.model = model

    def __call__(self, weights: NDArray[Any], batch: Examples, rows: NDArray[np.int64]) -> tuple[Floats, NDArray[Any]]:
        (x,), y = batch.inputs, batch.labels
        eta = np.matmul(x, weights[:, :, None])[:, :, 0]
        share = shares(rows, x.shape[1])
        loss = np.einsum("sb,sb->s", self.model.loss(eta, y), share)
        error = (self.model.mean(eta) - y) * share
        return loss, np.matmul(error[:, None, :], x)[:, 0]


def shares(rows: NDArray[np.int64], size: int) -> Floats:
    """What each of *size* places weighs in the mean of a batch with so many *rows*, [num_sites, size]."""
    return np.where(np.arange(size) < rows[:, None], 1 / rows[:, None], 0.0)
