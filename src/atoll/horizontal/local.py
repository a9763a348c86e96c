"""A site's own learning between two messages: what the sites of every federated algorithm do alike.

Source: McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data, Algorithm 1,
ClientUpdate; with momentum: Wang et al. 2020 (FedNova), §4.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.errors import PlanError, ProtocolError
from atoll.contract.program import SiteView, TableView
from atoll.contract.rounds import Task
from atoll.contract.schema import TableSchema
from atoll.models.model import Descends, Examples, LearnerParams, Model

Weights = NDArray[Any]
"""Flat, [num_weights], in the model's dtype."""
Mask = NDArray[np.bool_]
Slope = Callable[[Weights, Examples, Weights], Weights]
"""(weights, batch, gradient of the loss) → the direction to step against: what an algorithm makes of a gradient."""
Descent = Callable[[Weights, Examples], tuple[float, Weights]]
"""(weights, batch) → a loss and its gradient: the model's own, or another that an algorithm learns by."""


class LocalParams(LearnerParams):
    """local_epochs: passes over a site's rows in a round; local_steps: that many mini-batches instead. momentum,
    weight_decay: of a site's own steps. freeze: layers that nobody learns, by the beginning of their names."""

    local_epochs: int = Field(default=1, ge=1)
    local_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    freeze: tuple[str, ...] = ()

    def paced(self, effort: float, rows: int) -> Self:
        """With that share of the work: fewer mini-batches, at least one."""
        steps = self.local_steps or self.local_epochs * -(-rows // self.batch_size)
        return self.model_copy(update={"local_steps": max(1, round(effort * steps))})


def layers_of(model: Model, names: tuple[str, ...]) -> Mask:
    """The weights of all layers whose names begin with one of *names*, [num_weights]; raises PlanError if there is
    no such layer."""
    found = np.zeros(len(model.weights), bool)
    for name in names:
        layers = [where for layer, where in model.layers.items() if layer == name or layer.startswith(name + ".")]
        if not layers:
            raise PlanError(
                "model.no-layer", f"the model has no layer {name!r}", field=name,
                remedy="its layers: " + ", ".join(model.layers),
            )  # fmt: skip
        for where in layers:
            found[where] = True
    return found


def still(model: Model, names: tuple[str, ...]) -> Mask | None:
    """As :func:`layers_of`; None where it is none of the weights."""
    found = layers_of(model, names)
    return found if found.any() else None


class Kept:
    """The model last asked for, and the examples of tables that are still there: a program's rounds ask for the
    same ones."""

    def __init__(self, params: Any) -> None:
        self.params = params
        self._model: tuple[TableSchema, Model] | None = None
        self._examples: dict[int, tuple[weakref.ref[TableView], Examples]] = {}

    @property
    def schema(self) -> TableSchema:
        """That of the model last asked for."""
        if self._model is None:
            raise PlanError("model.shape", "no model was made yet", field="model")
        return self._model[0]

    def model(self, schema: TableSchema) -> Model:
        """Unfitted; raises PlanError."""
        if self._model is None or self._model[0] is not schema:
            self._model = (schema, self.params.unfitted(schema))
        return self._model[1]

    def examples(self, table: TableView) -> Examples:
        """All rows of *table*."""
        key = id(table)
        if key not in self._examples or self._examples[key][0]() is not table:
            forget = partial(_forget, self._examples, key)
            self._examples[key] = (weakref.ref(table, forget), self.model(table.schema).examples(table))
        return self._examples[key][1]


def _forget(held: dict[int, tuple[weakref.ref[TableView], Examples]], key: int, gone: weakref.ref[TableView]) -> None:
    if key in held and held[key][0] is gone:
        del held[key]


@dataclass(frozen=True, slots=True)
class Trained:
    """Where a site's steps led. steps: how many. loss: the mean over their batches, each before its step."""

    weights: Weights
    steps: int
    loss: float


def effort(steps: int, momentum: float) -> float:
    """‖a‖₁ of Wang et al. 2020, §4: how often the gradients of so many steps stand in the change that they make;
    without momentum each stands there once."""
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


@dataclass(frozen=True, slots=True)
class Local:
    """One site in one round. fixed: weights that no step changes, [num_weights]; None: there are none."""

    params: LocalParams
    model: Model
    examples: Examples
    site: SiteView
    task: Task
    fixed: Mask | None = None

    @property
    def steps(self) -> int:
        """Mini-batches in a round."""
        return self.params.local_steps or self.passes(self.params.local_epochs)

    def passes(self, epochs: int) -> int:
        """Mini-batches in so many passes over the rows."""
        return epochs * -(-len(self.examples) // self.params.batch_size)

    def batches(self, steps: int | None = None, part: int = 0) -> Iterator[Examples]:
        """Mini-batches in random order; *part* numbers several passes of one round."""
        return map(self.examples.take, self.drawn(steps, part))

    def drawn(self, steps: int | None = None, part: int = 0) -> Iterator[NDArray[np.int64]]:
        """The rows of :meth:`batches`."""
        size, wanted, number = self.params.batch_size, self.steps if steps is None else steps, len(self.examples)
        in_epoch, shuffler = -(-number // size), self.task.shuffler()
        for _ in range(part):
            shuffler = np.random.Generator(np.random.Philox(shuffler.integers(2**63)))
        for step in range(wanted):
            if step % in_epoch == 0:
                order = shuffler.permutation(number)
                self.site.progress(step, wanted)
            yield order[step % in_epoch * size :][:size]

    def sgd(
        self, start: Weights, slope: Slope | None = None, *, steps: int | None = None, fixed: Mask | None = None,
        part: int = 0, descent: Descent | None = None,
    ) -> Trained:  # fmt: skip
        """Stochastic gradient descent from *start*, by default for a round and on the model's loss. fixed: weights that
        it leaves alone, beside those of the round. Raises ProtocolError "site.diverged"."""
        if descent is None and (joint := getattr(self.site, "joint", None)) is not None:
            found: Trained | None = joint(
                Asked(self, start, slope, self.steps if steps is None else steps, fixed, part)
            )
            if found is not None:
                return found
        weights, batches = np.array(start, self.model.dtype), self.batches(steps, part)
        alone = slope is None and descent is None and fixed is None
        if alone and self._plain and isinstance(self.model, Descends):
            weights, losses = self.model.descended(weights, batches, self.params.learning_rate)
        else:
            losses = self._descend(weights, batches, slope, fixed, descent)
        loss = float(np.mean(losses)) if losses else 0.0
        if not (np.isfinite(loss) and np.isfinite(weights).all()):
            raise diverged()
        return Trained(weights, len(losses), loss)

    @property
    def _plain(self) -> bool:
        """Are steps the learning rate times the gradient, and nothing else?"""
        still, follows = self.fixed is not None, self.model.running.stop > self.model.running.start
        return not (self.params.momentum or self.params.weight_decay or still or follows)

    def _descend(
        self, weights: Weights, batches: Iterable[Examples], slope: Slope | None, fixed: Mask | None,
        descent: Descent | None,
    ) -> list[float]:  # fmt: skip
        """Take the steps, in place; the loss before each."""
        p, model, losses = self.params, self.model, list[float]()
        learn = descent or model.loss_and_gradient
        velocity = np.zeros_like(weights) if p.momentum else None
        still = [mask for mask in (self.fixed, fixed) if mask is not None]
        rate, step = np.asarray(p.learning_rate, model.dtype), np.empty_like(weights)
        for batch in batches:
            loss, gradient = learn(weights, batch)
            losses.append(loss)
            followed = gradient[model.running].copy()
            if slope is not None:
                gradient = slope(weights, batch, gradient)
            if p.weight_decay:
                gradient = gradient + np.asarray(p.weight_decay, model.dtype) * weights
            if velocity is not None:
                velocity *= np.asarray(p.momentum, model.dtype)
                velocity += gradient
                gradient = velocity
            np.multiply(rate, gradient, out=step)
            step[model.running] = followed
            for mask in still:
                step[mask] = 0
            weights -= step
        return losses


@dataclass(frozen=True, slots=True)
class Asked:
    """Steps as :meth:`Local.sgd` was asked for them: those of many simulated sites are taken together (see
    ``horizontal/batch.py``)."""

    at: Local
    start: Weights
    slope: Slope | None
    steps: int
    fixed: Mask | None
    part: int


def stepped(at: Local, weights: Weights, gradient: Weights, rate: float) -> Weights:
    """*weights* after one plain step against *gradient*: frozen ones stay, and running ones follow the data."""
    step = np.asarray(rate, at.model.dtype) * gradient
    step[at.model.running] = gradient[at.model.running]
    if at.fixed is not None:
        step[at.fixed] = 0
    moved: Weights = weights - step
    return moved


def diverged() -> ProtocolError:
    """The one error for a loss, or weights, that are no numbers any more."""
    return ProtocolError(
        "site.diverged", "training diverged at this site: its loss is not a finite number", field="learning_rate",
        remedy="lower the learning rate, scale the features, or give clip_norm_l2",
    )  # fmt: skip
