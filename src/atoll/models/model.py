"""The model port: what every learner, protection test and evaluation needs of a model, and no more.

A model is a *kind* with settings and one flat vector of weights. A kind is the name of the file that holds it
(``atoll.models.cnn`` is imported when a plan says ``kind: cnn``), so that what needs PyTorch is imported only where
it is used; kinds that other packages register are found too.

    made = make({"kind": "cnn", "image": "image", "target": "pneumonia"}, schema)
    weights = made.initial(seed)
    loss, gradient = made.loss_and_gradient(weights, made.examples(table).take(rows))
    made.with_weights(weights - 0.1 * gradient).predict(table)
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
from annotated_types import Ge, Le, MinLen
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator

from atoll.contract.errors import PlanError, SchemaError
from atoll.contract.program import ProgramParams, TableView
from atoll.contract.schema import TableSchema
from atoll.contract.settings import validate
from atoll.contract.wire import Array, Json, parse_json, to_json
from atoll.models.installed import Base

Floats = NDArray[np.float64]
Family = Literal["linear", "logistic", "poisson"]
ModelTask = Literal["binary", "classes", "regression", "count"]
Units = Annotated[int, Ge(1), Le(4096)]
"""How wide a layer may be: a plan is read before anybody approved it."""
Target = str | Annotated[tuple[str, ...], MinLen(1)]


class Settings(BaseModel):
    """Base of a kind's settings: everything but the weights; frozen, unknown keys refused. target: a column, or
    several numbers to be told at once (a speed in 15, 30 and 60 minutes). base: installed weights to begin with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    target: Target
    base: Base | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """The label columns."""
        return (self.target,) if isinstance(self.target, str) else self.target


@dataclass(frozen=True, slots=True)
class Examples:
    """Rows to learn from. inputs: one array for each input of the model, [num_rows, …].

    labels: [num_rows]; of several targets [num_rows, targets]. Of classes, places in the code list, or a probability
    for each, [num_rows, classes]; a binary label may be a probability too.
    """

    inputs: tuple[NDArray[Any], ...]
    labels: Floats

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[Any] | slice) -> Examples:
        """Some of the rows, in the order given."""
        return Examples(tuple(array[rows] for array in self.inputs), self.labels[rows])


class Predictor(Protocol):
    """One model, however it is learned. Weights are a flat vector, [num_weights].

    Its class also has ``Spec``, its kind's :class:`Settings`, and ``of(spec, schema)``, which makes it unfitted, and
    raises PlanError when it does not fit the schema.
    """

    @property
    def targets(self) -> tuple[str, ...]:
        """The label columns: several only for values."""

    @property
    def task(self) -> ModelTask:
        """What it predicts: a probability, one for each class, a value or a count."""

    @property
    def weights(self) -> Floats: ...

    @property
    def layers(self) -> Mapping[str, slice]:
        """Named parts of the weights, from input to output."""

    def with_weights(self, weights: Floats) -> Self:
        """The same model with other weights; raises PlanError when they are none of it."""

    def spec(self) -> dict[str, Json]:
        """Everything but the weights, as JSON; :func:`make` is the inverse."""

    def arrays(self) -> dict[str, Array]:
        """What is stored of a fitted model: "weights", or each of its layers by name, in order; and what its reader
        needs beside the spec."""

    def predict(self, table: TableView) -> Floats:
        """Predicted mean of every row: probability, count or value, [num_rows]; of classes, or several targets,
        [num_rows, classes or targets]."""


@runtime_checkable
class Model(Predictor, Protocol):
    """A model that learns by gradients; they are flat as the weights, and of the same dtype. Unfitted, all its weights
    are zero. The last of its layers, "head" and what is in it, are what personalised learning keeps at a site."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """That it computes in; weights of this dtype are taken and given without conversion."""

    @property
    def running(self) -> slice:
        """Weights that are not learned but follow the data, as a batch normalisation's mean does: their gradient is
        the step itself, whatever the learning rate. Mostly empty."""

    @property
    def normalisations(self) -> tuple[str, ...]:
        """Those of its layers, by the beginning of their names, that scale what comes in to its own mean and spread."""

    def initial(self, seed: int) -> Floats:
        """Weights to begin with: a function of the plan's seed, which everybody knows."""

    def examples(self, table: TableView) -> Examples:
        """Inputs and labels of all rows; raises SchemaError where cells are missing."""

    def loss_and_gradient(self, weights: Floats, batch: Examples) -> tuple[float, Floats]:
        """Mean loss over *batch* (not empty) and its gradient."""

    def clipped_gradient_sum(self, weights: Floats, batch: Examples, clip_norm_l2: float) -> tuple[Floats, int, float]:
        """(Σ of each example's gradient, clipped to an L2 norm; how many were clipped; Σ of losses)."""


@runtime_checkable
class Represents(Model, Protocol):
    """A model whose last layer looks at a representation of each row, as a network's does."""

    @property
    def represents(self) -> bool:
        """Whether this one does."""

    def contrastive(
        self, weights: Floats, batch: Examples, anchor: Floats, previous: Floats, *, strength: float, temperature: float
    ) -> tuple[float, Floats]:
        """Mean loss over *batch* and its gradient, with *strength* times the model-contrastive loss: a row's
        representation is to be like that by the weights *anchor*, and unlike that by *previous* (Li, He & Song 2021,
        Model-Contrastive Federated Learning, §3.3)."""


@runtime_checkable
class Descends(Model, Protocol):
    """A model that can take plain steps where its weights are, in a network's layers or a GPU's memory."""

    def descended(self, weights: Floats, batches: Iterable[Examples], rate: float) -> tuple[Floats, list[float]]:
        """(where ``weights -= rate * gradient`` leads, batch by batch, to the last bit; the loss before each step).
        Only for a model none of whose weights are :attr:`running`."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a model's targets ask of it: the task, how many numbers it gives a row, and for values the middle and half
    of each target's range, [outputs]."""

    task: ModelTask
    outputs: int
    middle: Floats
    half: Floats

    @staticmethod
    def of(schema: TableSchema, targets: tuple[str, ...]) -> Goal:
        """By the schema: 0 or 1 is binary, another code list is of classes, a range is of values. Raises
        PlanError for columns that are absent or no targets."""
        columns = [schema.columns.get(name) for name in targets]
        for name, column in zip(targets, columns, strict=True):
            if column is None or column.role == "ignore" or not (column.numeric or column.values):
                raise PlanError(
                    "plan.bad-column", f"{name!r} is not a label of the prepared table", field=name,
                    remedy="check the plan's column names against the schema: a label has a range or lists its values",
                )  # fmt: skip
        first = columns[0]
        if len(targets) == 1 and first is not None and first.values and set(first.values) != {0, 1}:
            return Goal("classes", len(first.values), np.zeros(1), np.ones(1))
        bounds = np.array([column.bounds() for column in columns if column is not None and column.numeric])
        if len(bounds) < len(targets):
            raise PlanError("plan.bad-target", "several targets must all be numbers", field="target")
        if bounds.tolist() == [[0, 1]] and first is not None and (first.values or first.dtype == "integer"):
            return Goal("binary", 1, np.zeros(1), np.ones(1))
        low, high = bounds.T
        return Goal("regression", len(targets), (low + high) / 2, np.where(high > low, (high - low) / 2, 0.5))

    def labels(self, table: TableView, targets: tuple[str, ...]) -> Floats:
        """Labels of all rows as :class:`Examples` has them; raises SchemaError when one is missing."""
        if self.task == "classes":
            places = table.codes(targets[0])
            if (places < 0).any():
                raise missing([targets[0]])
            return places.astype(np.float64)
        columns = [np.asarray(table[name], np.float64) for name in targets]
        if gaps := [name for name, column in zip(targets, columns, strict=True) if np.isnan(column).any()]:
            raise missing(gaps)
        return columns[0] if len(columns) == 1 else np.column_stack(columns)


KINDS: dict[str, type[Any]] = {}
M = TypeVar("M", bound=type[Any])


def model(cls: M) -> M:
    """Register a class as the kind that its Spec's ``kind`` is by default."""
    KINDS[cls.Spec.model_fields["kind"].default] = cls
    return cls


def find(kind: str) -> type[Any]:
    """The class of a kind. Raises PlanError when there is none, or when what it needs is not installed."""
    name = f"{__package__}.{kind}"
    if kind not in KINDS and kind.isidentifier() and importlib.util.find_spec(name):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "torch":
                raise
            raise PlanError(
                "model.no-torch", f"models of kind {kind!r} need PyTorch, which is not installed here",
                field="model.kind", remedy='pip install "atoll[torch]"',
            ) from None  # fmt: skip
    if kind not in KINDS:
        raise PlanError("model.unknown", f"there is no model of kind {kind!r}", field="model.kind",
                        remedy="docs/plan.md lists the kinds")  # fmt: skip
    return KINDS[kind]


def make(spec: Mapping[str, Json], schema: TableSchema) -> Predictor:
    """The unfitted model that *spec* describes; raises PlanError when it is malformed or does not fit the schema."""
    cls = find(str(spec.get("kind", "")))
    made: Predictor = cls.of(validate(cls.Spec, dict(spec), "model"), schema)
    return made


def from_spec(spec: Mapping[str, Json], schema: TableSchema, arrays: Mapping[str, Array]) -> Predictor:
    """A fitted model, as stored; raises PlanError when spec or weights do not fit."""
    made = make(spec, schema)
    layers = [np.asarray(arrays[name]).reshape(-1) for name in made.layers if name in arrays]
    weights = arrays.get("weights", np.concatenate([*layers, np.empty(0)]))
    if weights.shape != made.weights.shape:
        raise PlanError("model.shape", "the weights do not fit the model", field="weights")
    return made.with_weights(np.asarray(weights, np.float64))


def by_gradients(made: Predictor) -> Model:
    """*made*, for learning by gradients and averages; raises PlanError if its kind does not."""
    if not isinstance(made, Model):
        raise PlanError(
            "model.not-averaged", "a model of this kind is not learned by gradients, nor are its weights averaged",
            field="model.kind", remedy="use the program of its own, such as trees.boosted",
        )  # fmt: skip
    return made


def by_row(made: Model) -> Model:
    """*made*, for learning that clips each row's gradient; raises PlanError if its rows have none of their own."""
    if made.running.stop > made.running.start:
        raise PlanError(
            "model.mixes-rows", "a batch normalisation mixes rows: no row has a gradient of its own",
            field="model.norm", remedy="use norm: group",
        )  # fmt: skip
    return made


def kept(fitted: Predictor) -> dict[str, Array]:
    """A fitted model as a site keeps it for itself: its weights, and what it is, which need not be the federation's."""
    return {"weights": fitted.weights, "spec": np.frombuffer(to_json(fitted.spec()), np.uint8)}


def restored(found: Mapping[str, Array], schema: TableSchema, otherwise: Predictor) -> Predictor:
    """The model that a site has for itself: *found* is as :func:`kept` made it, or weights of the federation's model;
    *otherwise* where there is nothing."""
    if "weights" not in found:
        return otherwise
    made = make(parse_json(found["spec"].tobytes()), schema) if "spec" in found else otherwise
    return made.with_weights(found["weights"])


class LearnerParams(ProgramParams):
    """What a learner learns: the target, and either a linear *family* of *features* or another *model*
    ``{kind: …}`` with the settings of its kind."""

    target: Target
    family: Family | None = None
    features: tuple[str, ...] = ()
    model: dict[str, Json] | None = None

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.model is None) == (self.family is None and not self.features):
            raise ValueError("give either family and features, or model")
        if self.model is None and (self.family is None or not self.features):
            raise ValueError("a linear model needs a family and at least one feature")
        if self.model is not None and "target" in self.model:
            raise ValueError("the target is a parameter of the program, not of the model")
        return self

    def unfitted(self, schema: TableSchema) -> Model:
        """The model before any fitting; raises PlanError."""
        if self.model is not None:
            return by_gradients(make({**self.model, "target": self.target}, schema))
        spec = {"kind": "linear", "family": self.family, "features": list(self.features), "target": self.target}
        return by_gradients(make(spec, schema))


def missing(names: list[str]) -> SchemaError:
    """The one error for missing cells in a model's columns."""
    return SchemaError(
        "schema.missing",
        "a model's columns have missing cells",
        field=", ".join(names),
        remedy="impute them in the recipe, or leave them out",
    )
