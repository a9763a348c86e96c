"""The columns that trees are of, and their edges, as plans say them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from pydantic import Field

from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, ProgramParams
from atoll.contract.rounds import Steps
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Json
from atoll.models.model import make
from atoll.models.trees import Trees
from atoll.trees import objective as losses
from atoll.trees.binning import check_given, even_edges, quantile_edges
from atoll.trees.objective import Objective
from atoll.trees.weighted import Weighted

Columns = tuple[tuple[str, ...], tuple[str, ...]]
"""(features, those of them that are categorical)."""


def feature_columns(
    schema: TableSchema, beside: tuple[str, ...], features: tuple[str, ...], categorical: tuple[str, ...]
) -> Columns:
    """Named *features*, else all that are numbers or list their values, but those *beside* (such as the target); texts
    are categorical. Raises PlanError where *categorical* names others."""
    named = features or tuple(
        name
        for name, column in schema.columns.items()
        if column.role == "feature" and name not in beside and (column.numeric or column.values)
    )
    if unknown := sorted(set(categorical) - set(named)):
        raise PlanError("plan.bad-column", f"{unknown[0]!r} is not a feature of the trees", field="categorical",
                        remedy="name it among the features, too")  # fmt: skip
    texts = {name for name in named if name in schema.columns and not schema.columns[name].numeric}
    return named, tuple(name for name in named if name in texts or name in categorical)


def edges_of(
    cohort: Cohort, columns: Columns, given: Mapping[str, tuple[float, ...]], max_bins: int, *, even: bool = False
) -> Steps:
    """Rounds of ``trees.edges``, or none for *even* edges; returns every feature's edges in order, those *given* as
    they are. Raises PlanError for edges that are not rising."""
    features, categorical = columns
    check_given(given, features, categorical)
    wanted = [name for name in features if name not in categorical and name not in given]
    if even:
        found = {name: even_edges(cohort.schema, name, max_bins) for name in wanted}
    else:
        found = dict((yield from quantile_edges(cohort, wanted, max_bins)))
    found |= {name: np.asarray(np.array(edges, np.float32) + np.float32(0)) for name, edges in given.items()}
    return tuple(found.get(name, np.empty(0, np.float32)) for name in features)


class BoostingParams(ProgramParams):
    """What boosting asks for wherever it grows. weight: the column of rows' weights (see ``weighted.py``). edges: of
    some features, given."""

    target: str
    objective: str | dict[str, Json] = "auto"
    weight: str = ""
    features: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    trees: int = Field(default=100, ge=1, le=2000)
    max_depth: int = Field(default=6, ge=1, le=12)
    learning_rate: float = Field(default=0.3, gt=0, le=1)
    l2: float = Field(default=1.0, ge=0)
    min_split_gain: float = Field(default=0.0, ge=0)
    min_child_weight: float = Field(default=1.0, ge=0)
    min_rows: int = Field(default=1, ge=1)
    edges: Mapping[str, tuple[float, ...]] = Field(default_factory=dict)

    def columns(self, schema: TableSchema) -> Columns:
        """(features, those that are categorical) as the model has them."""
        return feature_columns(schema, self.loss(schema).beside, self.features, self.categorical)

    def loss(self, schema: TableSchema) -> Objective:
        """The objective, by default what suits the target; raises PlanError."""
        made = losses.make(self.objective, self.target, schema)
        return Weighted.of(made, self.weight, schema) if self.weight else made

    def model(self, schema: TableSchema) -> Trees:
        """The model before any fitting; raises PlanError."""
        objective = self.loss(schema)
        return unfitted(self, schema, objective.link, objective.exposed)


class Grown(Protocol):
    """The parameters of a program that makes trees."""

    @property
    def target(self) -> str: ...

    @property
    def trees(self) -> int: ...

    @property
    def max_depth(self) -> int: ...

    def columns(self, schema: TableSchema) -> Columns:
        """Of the model."""


def unfitted(params: Grown, schema: TableSchema, link: str, exposure: str = "") -> Trees:
    """The model before any fitting; raises PlanError."""
    features, categorical = params.columns(schema)
    made = make(
        {
            "kind": "trees", "target": params.target, "features": list(features), "categorical": list(categorical),
            "link": link, "exposure": exposure, "num_trees": params.trees, "max_depth": params.max_depth,
        },
        schema,
    )  # fmt: skip
    if not isinstance(made, Trees):
        raise PlanError("trees.not-trees", "only a model of trees is grown", field="model")
    return made
