"""What moves a model's predictions, over all sites' rows: sums of SHAP values.

A row's SHAP values say what each feature adds to its margin (see ``models/shap.py``). Summed without their signs they
rank the features; summed by the feature's own value, with signs, they show how the prediction goes along it. Sums are
all that leaves a site, so drivers are ranked without any row.

Parties: sites and coordinator. Messages: round "explain", one Sum; the model's weights go out with it, unless every
party has them installed (``model.base``). The coordinator learns, of the cohort's total, the rows, Σ |SHAP| of each
feature, and with *dependence* rows and Σ SHAP of each bin of each feature (under ``plain`` each site's; bins tell of
few people, so a site whose policy asks for groups answers those only in sums that nobody sees apart, and a bin of few
rows is withheld from the report). Threat model: as the plan's protection. A coordinator that sends a model of its own
making learns sums over rows by conditions of its choice, as with ``statistics.evaluation``; so a site explains one
model in a run, and a base that the plan names by its hash leaves no choice. Dropout: the survivors' sums. Cost: 1
round, 8 bytes a feature, 16 a bin.

A SHAP value is at most the spread of the leaves of the trees that ask for the feature, which is what bounds the sums.

Source: Lundberg et al. 2020, From Local Explanations to Global Understanding with Explainable AI for Trees (Nature
Machine Intelligence), §2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract import rounds
from atoll.contract.disclosure import suppress
from atoll.contract.errors import PlanError, ProtocolError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, count, not_taken, real, taken
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array, Json
from atoll.models.linear import feature_bounds
from atoll.models.model import Floats, make
from atoll.models.trees import MOST_CODES, Trees
from atoll.statistics.noise import coarse, fine, only_summed, smallest

AT_ONCE = 1 << 22
"""SHAP values in memory."""


class ExplanationParams(ProgramParams):
    """model: the spec of a model of kind "trees"; its weights are sent as arrays, or named as its base. dependence:
    also by the features' values. bins: of each number's range."""

    model: dict[str, Json]
    dependence: bool = False
    bins: int = Field(default=10, ge=2, le=100)


@program("trees.explanation", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class Explanation:
    """Features of a model of trees, ranked by what they add to predictions (mean |SHAP|), by Sum."""

    Params = ExplanationParams

    def __init__(self, params: ExplanationParams) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """*start* holds the model's "weights", where it has no base. Returns {"explanation": {"rows", "drivers":
        [{"feature", "importance"}, …], the strongest first, "dependence": {feature: {"bins", "rows", "mean"}}}}."""
        from atoll.models.shap import most

        send = {name: start[name] for name in ("weights",) if start and name in start}
        schema, model = cohort.schema, self._model(cohort.schema, send)
        rows, bins, reach = schema.max_rows, self._bins(model), most(model).sum(axis=0)
        size, step = len(reach), fine(schema.max_rows) if cohort.exact else coarse(1.0)
        fields: dict[str, rounds.Field] = {"rows": count(bound=rows), "sizes": real(size, bound=rows, step=step)}
        if self.params.dependence:
            shape = (size, 1 + max(map(len, bins.values())))
            fields |= {"cells": count(shape, bound=rows), "sums": real(shape, bound=rows, step=step)}
        total = yield Round("explain", Sum(), fields, send)
        number = max(int(total["rows"]), 1)
        sizes = np.maximum(np.asarray(total["sizes"], np.float64), 0) * reach / number
        names = model.settings.features
        drivers = [{"feature": names[i], "importance": float(sizes[i])} for i in np.argsort(-sizes, kind="stable")]
        found: dict[str, Any] = {"rows": int(total["rows"]), "drivers": drivers}
        if self.params.dependence:
            cells, sums = np.asarray(total["cells"]), np.asarray(total["sums"]) * reach[:, None]
            hidden = suppress(cells, np.zeros(cells.shape, bool), smallest(cohort), (1,))
            found["dependence"] = {
                name: _course(bins[name], cells[i], sums[i], hidden[i]) for i, name in enumerate(names)
            }
        return {"explanation": found}

    def _model(self, schema: TableSchema, sent: Mapping[str, Array]) -> Trees:
        """With weights; raises PlanError for a model of another kind, or one without any, and ProtocolError where
        weights are sent in place of installed ones."""
        made = make(self.params.model, schema)
        if not isinstance(made, Trees):
            raise PlanError("trees.not-trees", "only a model of trees is explained", field="model",
                            remedy="use a model of kind trees")  # fmt: skip
        if made.settings.base is None:
            if "weights" not in sent:
                raise PlanError("trees.no-weights", "the model to be explained has no weights", field="model.base",
                                remedy="name its installed weights: base: {name, sha256}")  # fmt: skip
            return made.with_weights(taken(sent, "weights", made.weights.shape))
        if "weights" in sent:
            raise not_taken("weights")
        return made

    def _bins(self, model: Trees) -> dict[str, list[str]]:
        """Names of the bins of each feature: the values that it lists (of a number in rising order), else of equal
        widths over the schema's range; without the one for missing cells, which is first in all arrays."""
        found = {}
        for name in model.settings.features:
            if listed := _listed(model, name):
                found[name] = [str(value) for value in listed]
            else:
                edges = np.linspace(*feature_bounds(model.schema, name), self.params.bins + 1)
                found[name] = [f"{a:.4g} to {b:.4g}" for a, b in pairwise(edges)]
        return found

    def _per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        from atoll.models.shap import most

        model = self._model(schema, sent)
        asked = int((most(model) > 0).any(axis=0).sum())  # the other features' values are 0
        found = {"rows": touches(), "sizes": touches(asked)}
        cells = {"cells": touches(len(model.settings.features)), "sums": touches(asked)}
        return found | (cells if self.params.dependence else {})

    @handler("explain", groups=("rows",), record=_per_record)
    def explain(self, site: SiteView, task: Task) -> Reply:
        """At the site: rows, and sums of SHAP values without their signs, over training rows; and by bin."""
        from atoll.models.shap import most, shap_values

        if self.params.dependence:
            only_summed(site)
        model = self._model(site.table.schema, task.arrays)
        _once(site, model)
        inputs, bins, reach = model.inputs(site.table), self._bins(model), most(model).sum(axis=0)
        size, unit = len(reach), np.where(reach > 0, reach, 1)
        shape = (size, 1 + max(map(len, bins.values())))
        sizes, cells, sums = np.zeros(size), np.zeros(shape, np.int64), np.zeros(shape)
        several = max(1, AT_ONCE // (size * model.outputs))
        for start in range(0, len(inputs), several):
            site.progress(start, len(inputs))
            part = inputs[start : start + several]
            values, _ = shap_values(model, part)
            sizes += np.minimum(np.abs(values).sum(axis=1) / unit, 1).sum(axis=0)
            if self.params.dependence:
                signed = np.clip(values.sum(axis=1) / unit, -1, 1)
                for i, (name, named) in enumerate(bins.items()):
                    place = _places(model, name, part[:, i], len(named))
                    cells[i] += np.bincount(place, minlength=shape[1])
                    sums[i] += np.bincount(place, signed[:, i], shape[1])
        found: dict[str, Any] = {"rows": len(inputs), "sizes": sizes}
        return found | ({"cells": cells, "sums": sums} if self.params.dependence else {})


def _listed(model: Trees, name: str) -> tuple[Any, ...]:
    """The values that a column lists, in the order of the bins; none of a number with too many, or with none."""
    values = model.schema.columns[name].values or ()
    if name in model.settings.categorical:
        return values
    return tuple(sorted(values)) if len(values) <= MOST_CODES else ()


def _places(model: Trees, name: str, inputs: NDArray[np.float32], number: int) -> NDArray[np.int64]:
    """The bin of each of a feature's inputs, [num_rows], 0 where it is missing."""
    missing = np.isnan(inputs)
    known: NDArray[Any] = np.where(missing, 0, inputs).astype(np.float64)
    if name not in model.settings.categorical:
        low, high = feature_bounds(model.schema, name)
        if listed := _listed(model, name):
            known = np.searchsorted([(a + b) / 2 for a, b in pairwise(listed)], known)
        else:
            known = np.clip(np.floor((known - low) / (high - low) * number), 0, number - 1)
    return np.where(missing, 0, 1 + known).astype(np.int64)


def _course(names: list[str], cells: Array, sums: Floats, hidden: Array) -> dict[str, Any]:
    """A feature's rows and mean SHAP by bin: both None where they are withheld, 0 and None where there are none."""
    named = ["missing", *names]
    rows = [None if gone else max(int(n), 0) for _, n, gone in zip(named, cells, hidden, strict=False)]
    return {
        "bins": named,
        "rows": rows,
        "mean": [float(s) / n if n else None for n, s in zip(rows, sums, strict=False)],
    }


def _once(site: SiteView, model: Trees) -> None:
    """Raise ProtocolError where the site has explained another model in this run."""
    digest = np.frombuffer(hashlib.sha256(model.weights.tobytes()).digest(), np.uint8)
    known = site.state.setdefault("explained", digest)
    if not np.array_equal(known, digest):
        raise ProtocolError(
            "trees.explained", "a site explains one model in a run", field="weights",
            remedy="the coordinator does not keep the plan: do not go on with it",
        )  # fmt: skip
