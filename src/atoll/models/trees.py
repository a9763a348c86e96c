"""Sums of decision trees: boosted trees, random forests and isolation forests.

The size is known from the spec alone. ``weights`` is flat float64: a base margin for each output, then the trees,
[num_trees · outputs, num_nodes, 5]; tree t belongs to output t % outputs. Each is a complete binary tree of max_depth
in heap order: the children of node i are 2i + 1 and 2i + 2. The five words of a node:

    0 feature    its place in *features*; −1 at a leaf; −2 where no row comes
    1 threshold  a float32; of a categorical split the bits (< 2^53) of the places in the code list that go right; of a
                 leaf its value, a float32, learning rate included
    2 default    1 where a missing cell goes left, else 0
    3 gain       what the split took off the loss
    4 cover      Σ Hessian of the rows that came here

A row goes left where float32(x) < threshold, as in XGBoost. Its margin is base + Σ leaf values, float64, trees in
order; what it predicts is the link of it. A tree that is not in use is a leaf of value 0.

Sources: Friedman 2001, Greedy Function Approximation (Annals of Statistics), §4.3; Chen & Guestrin 2016, XGBoost (KDD);
Breiman 2001, Random Forests; Liu, Ting & Zhou 2008, Isolation Forest (ICDM).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import numpy as np
from annotated_types import Ge, Le, MaxLen, MinLen
from numpy.typing import NDArray

from atoll.contract.errors import PlanError, SchemaError
from atoll.contract.program import TableView
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array, Json
from atoll.models import model as port
from atoll.models.linear import feature_bounds
from atoll.models.model import Floats, Goal, ModelTask, model

Link = Literal["identity", "logistic", "softmax", "exp", "probability", "shares", "isolation"]
TASKS: dict[Link, ModelTask] = {
    "identity": "regression", "logistic": "binary", "softmax": "classes", "exp": "count", "probability": "binary",
    "shares": "classes", "isolation": "binary",
}  # fmt: skip
CLASSES = ("softmax", "shares")
LEAF, UNUSED = -1, -2
FEATURE, THRESHOLD, DEFAULT, GAIN, COVER = range(5)
"""The words of a node."""
MOST_BYTES = 64 << 20
BATCH_ROWS = 65_536
MOST_CODES = 53
"""So many bits a float64 tells exactly."""
FURTHEST = float(np.finfo(np.float32).max)


class TreesSpec(port.Settings):
    """features: in the order that nodes name them. categorical: those of them that are split by sets of their codes.
    link: from margin to prediction; "probability" is the margin cut to 0 … 1, "shares" are several, cut and made to
    sum to 1, "isolation" is 2^−margin, whose target may be "" (none). exposure: of "exp", a column that predictions are
    times (the margin is of a rate). num_trees: of each output. outputs: one, of "softmax" and "shares" one for each
    class."""

    kind: Literal["trees"] = "trees"
    features: Annotated[tuple[str, ...], MinLen(1), MaxLen(65_536)]
    categorical: tuple[str, ...] = ()
    link: Link
    exposure: str = ""
    num_trees: Annotated[int, Ge(1), Le(2000)]
    max_depth: Annotated[int, Ge(1), Le(12)]

    @property
    def num_nodes(self) -> int:
        """Of one tree."""
        return int(2 ** (self.max_depth + 1) - 1)

    def outputs(self, schema: TableSchema) -> int:
        """How many margins a row has; see :meth:`Trees.of` for what is refused before."""
        return len(schema.columns[str(self.target)].values or ()) if self.link in CLASSES else 1


class Nodes(NamedTuple):
    """Nodes as the kernels take them, each [num_trees · outputs, num_nodes]. mask is 0 where a split is by threshold;
    value is 0 but at leaves."""

    feature: NDArray[np.int32]
    threshold: NDArray[np.float32]
    mask: NDArray[np.uint64]
    default_left: NDArray[np.bool_]
    value: Floats


@model
class Trees:
    """A fitted or unfitted sum of trees; unfitted, and without a base, its trees are not in use and its margins 0."""

    Spec: ClassVar[type[TreesSpec]] = TreesSpec

    def __init__(self, settings: TreesSpec, schema: TableSchema, outputs: int, weights: Floats) -> None:
        self.settings, self.schema, self.outputs, self.weights = settings, schema, outputs, weights

    @classmethod
    def of(cls, spec: TreesSpec, schema: TableSchema) -> Self:
        """With the installed base's "weights" where the spec names one, else unfitted. Raises PlanError when a column
        is absent or does not suit, or the model would be too large."""
        _check(spec, schema)
        outputs = spec.outputs(schema)
        size = 8 * (outputs + spec.num_trees * outputs * spec.num_nodes * 5)
        if size > MOST_BYTES:
            raise PlanError("model.too-large", f"the trees would take {size >> 20} MiB, and {MOST_BYTES >> 20} are the "
                            "most", field="model", remedy="fewer trees, or a smaller max_depth")  # fmt: skip
        words = np.zeros((spec.num_trees * outputs, spec.num_nodes, 5))
        words[:, :, FEATURE] = UNUSED
        words[:, 0, FEATURE] = LEAF
        made = cls(spec, schema, outputs, np.concatenate([np.zeros(outputs), words.ravel()]))
        if spec.base is None:
            return made
        found = spec.base.read().get("weights")
        if spec.base.frozen or spec.base.adapters or found is None or found.dtype != np.float64:
            raise PlanError("model.base-unfit", "the installed base is not of a model of trees", field="model.base",
                            remedy="install the model.safetensors of a run's trees, and freeze nothing")  # fmt: skip
        made.weights = made._checked(found)
        return made

    @property
    def targets(self) -> tuple[str, ...]:
        """The label's column; none where the target is ""."""
        return self.settings.targets if self.settings.target else ()

    @property
    def exposure(self) -> str:
        """The column that predictions are times; "": none."""
        return self.settings.exposure

    @property
    def task(self) -> ModelTask:
        """By the link; scores without a label are values."""
        return TASKS[self.settings.link] if self.settings.target else "regression"

    @property
    def layers(self) -> dict[str, slice]:
        """The base margins, and the trees."""
        return {"base": slice(0, self.outputs), "trees": slice(self.outputs, len(self.weights))}

    @property
    def words(self) -> Floats:
        """[num_trees · outputs, num_nodes, 5], not to be written to."""
        return self.weights[self.outputs :].reshape(-1, self.settings.num_nodes, 5)

    @property
    def base(self) -> Floats:
        """The base margins, [outputs]."""
        return self.weights[: self.outputs]

    @cached_property
    def categorical(self) -> NDArray[np.bool_]:
        """Which features are, [num_features]."""
        return np.array([name in self.settings.categorical for name in self.settings.features])

    @cached_property
    def nodes(self) -> Nodes:
        """The trees as the kernels take them."""
        words = self.words
        feature = words[:, :, FEATURE].astype(np.int32)
        splits, leaves = feature >= 0, feature == LEAF
        by_set = splits & self.categorical[np.maximum(feature, 0)]
        told = words[:, :, THRESHOLD]
        return Nodes(
            feature,
            np.where(splits & ~by_set, told, 0).astype(np.float32),
            np.where(by_set, told, 0).astype(np.uint64),
            words[:, :, DEFAULT] == 1,
            np.where(leaves, told, 0.0),
        )

    def with_weights(self, weights: Floats) -> Self:
        """The same model with other weights. Raises PlanError "model.shape" when there are more or fewer, and
        "model.bad-trees" when they do not make trees."""
        settings = self.settings.model_copy(update={"base": None})
        return type(self)(settings, self.schema, self.outputs, self._checked(weights))

    def spec(self) -> dict[str, Json]:
        """Its settings."""
        found: dict[str, Json] = self.settings.model_dump(mode="json", exclude=None if self.exposure else {"exposure"})
        return found

    def arrays(self) -> dict[str, Array]:
        """The weights."""
        return {"weights": self.weights}

    # -- predicting

    def inputs(self, table: TableView) -> NDArray[np.float32]:
        """What the trees see of all rows, [num_rows, num_features]: NaN where a cell is missing, a category as its
        place in the code list."""
        return np.concatenate([np.empty((0, len(self.settings.features)), np.float32), *self._batches(table)])

    def _batches(self, table: TableView) -> Iterator[NDArray[np.float32]]:
        """:meth:`inputs`, some rows at a time."""
        names, kinds = self.settings.features, self.categorical
        columns = [table.codes(name) if kind else table[name] for name, kind in zip(names, kinds, strict=True)]
        for start in range(0, len(table), BATCH_ROWS):
            cells = [np.asarray(column[start : start + BATCH_ROWS], np.float64) for column in columns]
            batch = np.clip(np.column_stack(cells), -FURTHEST, FURTHEST).astype(np.float32)
            yield np.where(kinds & (batch < 0), np.float32(np.nan), batch)

    def margins(self, inputs: NDArray[np.float32]) -> Floats:
        """Of what :meth:`inputs` gives, [num_rows, outputs]."""
        from atoll.models import tree_kernels

        return tree_kernels.predict(inputs, *self.nodes, self.base)

    def predict(self, table: TableView) -> Floats:
        """Probability, count or value of every row, [num_rows]; of classes [num_rows, outputs]. Cells of features may
        be missing. Raises SchemaError where an exposure is missing or not above 0."""
        parts = [np.empty((0, self.outputs)), *(self.margins(batch) for batch in self._batches(table))]
        found = self.linked(np.concatenate(parts))
        return found * exposures(table, self.exposure) if self.exposure else found

    def linked(self, margins: Floats) -> Floats:
        """Margins [num_rows, outputs] as predictions."""
        return linked(self.settings.link, margins)

    # -- what is told may not be trusted

    def _checked(self, weights: Floats) -> Floats:
        weights = np.array(weights, np.float64)
        if weights.shape != self.weights.shape:
            raise PlanError("model.shape", "the weights do not fit the model", field="weights")
        words = weights[self.outputs :].reshape(-1, self.settings.num_nodes, 5)
        if not np.isfinite(weights).all() or not self._sound(words):
            raise PlanError("model.bad-trees", "the weights do not make trees", field="weights",
                            remedy="use the model as its run has stored it")  # fmt: skip
        weights.flags.writeable = False
        return weights

    def _sound(self, words: Floats) -> bool:
        """Whether finite *words* keep to the layout."""
        names, told = self.settings.features, words[:, :, THRESHOLD]
        if not np.isin(words[:, :, FEATURE], np.arange(UNUSED, len(names))).all():
            return False
        feature = words[:, :, FEATURE].astype(np.int64)
        inner = self.settings.num_nodes // 2
        splits, unused = feature >= 0, feature == UNUSED
        used_below = ~unused[:, 1:].reshape(len(words), inner, 2)
        if unused[:, 0].any() or splits[:, inner:].any():
            return False
        if (used_below != splits[:, :inner, None]).any() or words[unused][:, 1:].any():
            return False
        codes = np.array([len(self.schema.columns[name].values or ()) for name in names])
        by_set = splits & self.categorical[np.maximum(feature, 0)]
        masks, most = told[by_set], 2.0 ** codes[feature[by_set]]
        numbers = told[~by_set]
        return bool(
            ((masks >= 1) & (masks < most) & (masks == np.floor(masks))).all()
            and (np.abs(numbers) <= FURTHEST).all()
            and (numbers.astype(np.float32) == numbers).all()
            and np.isin(words[:, :, DEFAULT], (0, 1)).all()
            and (words[:, :, COVER] >= 0).all()
        )


def linked(link: Link, margins: Floats) -> Floats:
    """Predictions of margins [num_rows, outputs]: [num_rows], of "softmax" [num_rows, outputs]. Nothing overflows."""
    if link == "softmax":
        odds: Floats = np.exp(margins - margins.max(axis=1, keepdims=True, initial=-math.inf))
        found: Floats = odds / odds.sum(axis=1, keepdims=True)
        return found
    if link == "shares":
        cut = np.maximum(margins, 0)
        total = cut.sum(axis=1, keepdims=True)
        return np.where(total > 0, cut / np.where(total > 0, total, 1), 1 / margins.shape[1])
    one = margins[:, 0]
    if link == "logistic":
        return 1 / (1 + np.exp(-np.clip(one, -500, 500)))
    if link == "exp":
        return np.exp(np.minimum(one, 500))
    if link == "probability":
        return np.clip(one, 0, 1)
    return np.exp2(-np.maximum(one, 0)) if link == "isolation" else one


def exposures(table: TableView, name: str) -> Floats:
    """A column of exposures, [num_rows]; raises SchemaError where one is missing or not above 0."""
    found = np.asarray(table[name], np.float64)
    if np.isnan(found).any():
        raise port.missing([name])
    if not ((found > 0) & (found < math.inf)).all():
        raise SchemaError("schema.bad-exposure", "a row's exposure is not above 0", field=name,
                          remedy="leave such rows out in the recipe, or mend them")  # fmt: skip
    return found


def _check(spec: TreesSpec, schema: TableSchema) -> None:
    """Raise PlanError where columns do not suit the trees."""
    for name in spec.features:
        if name not in spec.categorical:
            feature_bounds(schema, name)
    for name in spec.categorical:
        column = schema.columns.get(name)
        if column is None or column.role == "ignore" or name not in spec.features:
            raise PlanError("plan.bad-column", f"{name!r} is not a feature of the model", field=name,
                            remedy="name categorical features among the features, too")  # fmt: skip
        if not column.values or len(column.values) > MOST_CODES:
            raise PlanError("plan.too-many-codes", f"{name!r} does not list between 1 and {MOST_CODES} values",
                            field=name, remedy="list its values in the schema, and group rare ones")  # fmt: skip
    if not isinstance(spec.target, str):
        raise PlanError("plan.bad-target", "trees have one target", field="target")
    once = len({*spec.features, spec.target}) == 1 + len(spec.features)
    if not once or len(set(spec.categorical)) < len(spec.categorical):
        raise PlanError("plan.bad-column", "a feature is named twice, or is the target", field="features",
                        remedy="name each column once")  # fmt: skip
    if spec.exposure:
        feature_bounds(schema, spec.exposure)
        if spec.link != "exp" or spec.exposure == spec.target:
            raise PlanError("plan.bad-column", "exposures are of counts, in a column of their own", field="exposure",
                            remedy='use link "exp", or leave exposure out')  # fmt: skip
    if spec.link == "isolation" and not spec.target:
        return
    goal, wanted = Goal.of(schema, (spec.target,)), TASKS[spec.link]
    low, high = feature_bounds(schema, spec.target) if wanted != "classes" else (0.0, 1.0)
    fits = {
        "binary": (low, high) == (0, 1), "classes": goal.task == "classes", "regression": True, "count": low >= 0,
    }  # fmt: skip
    if not fits[wanted]:
        needs = {"binary": "values [0, 1]", "classes": "a list of classes", "count": "a range from 0 up"}[wanted]
        raise PlanError("plan.bad-target", f"link {spec.link!r} needs a target with {needs}", field=spec.target)
