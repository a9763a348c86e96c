"""Evaluation of a model on every site's held-out rows, by Sum; used by every learner.

Parties: sites and coordinator. Messages: the model goes out; round "scores" (of probabilities), "classes" (counts by
true and predicted class) or "errors" (of values and counts) is one Sum, round "own" (asked only where the plan's sites
may share it) gathers each site's own metrics. The coordinator learns the cohort's score histograms and loss sums (each
site's under ``plain``); a site whose policy does not share "metrics" is simply absent from "own", and how many rows it
held out is told only where it shares "rows". Of a personalised run each site scores the model that it has for itself,
in round "personal" (or "errors"): a few sums, since a histogram of its scores would tell that model. Dropout: the
survivors' metrics. Cost: 2 rounds, 16 KiB a site.

Log loss, accuracy, F1 and squared errors are exact sums; masked ones to 2⁻⁵⁴ of the declared bound for each site (with
max_rows of 10⁷: log loss to 3·10⁻⁸; squared errors, in units of half the target's range, to 5·10⁻⁷). AUC and KS come
from a histogram of scores with *bins* bins (``score_histogram.py`` says how far they are off).

Under differential privacy (``Cohort.exact`` is False) a probability's scores are asked as one histogram by label, round
"cells", of which a record changes one cell; every metric is made of it as if scores stood in the middle of
their bin, of 1/64. Predicted values are clipped to the target's range. Sites are not asked for their own metrics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.disclosure import check_groups
from atoll.contract.errors import PolicyError, ProtocolError, SchemaError
from atoll.contract.program import Cohort, Program, ProgramParams, SiteView, build, handler, program
from atoll.contract.rounds import Gather, Metrics, Reply, Round, Steps, Sum, Task, count, real, taken
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array, Json
from atoll.models.model import Predictor, make, restored
from atoll.statistics.error_sums import FAR, allowed, error_sums, metrics_by_target, most_of
from atoll.statistics.noise import fine, only_summed
from atoll.statistics.score_histogram import from_cells, histogram, score_metrics, score_sums
from atoll.statistics.scores import LOSS_CAP, binary_metrics, class_losses, class_metrics, confused, log_loss

Floats = NDArray[np.float64]
NOISY_BINS = 64
"""Bins of the histogram under noise: fewer, so that less noise adds up."""
OWN = (
    "rows", "auc", "ks", "accuracy", "f1", "macro_f1", "balanced_accuracy", "log_loss", "brier", "mae", "rmse", "r2",
)  # fmt: skip
PERSONAL = {"personal": np.array(1.0)}
"""Sent with the weights: score the model that the site has for itself."""


@program("statistics.evaluation", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class Evaluation:
    """AUC, KS, F1, accuracy, log-loss, calibration (or MAE, RMSE, R²) on held-out rows, by Sum."""

    class Params(ProgramParams):
        """model: a model's spec (its weights are sent as arrays). bins: of the score histogram.
        own: also ask each site for its own metrics, where its policy shares them. personal: score also the model that
        each site has for itself. shared: score the model that is sent; false: there is none but the sites' own."""

        model: dict[str, Json]
        bins: int = Field(default=1024, ge=10, le=65_536)
        own: bool = True
        personal: bool = False
        shared: bool = True

    def __init__(self, params: Params) -> None:
        self.params = params

    def _model(self, schema: TableSchema) -> Predictor:
        return make(self.params.model, schema)

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """*start* holds the model's arrays. Returns {"pooled": metrics, "own": {site: metrics}, "curves": …}, and the
        same of sites' personal models as "personal"."""
        send = dict(start or {})
        found: dict[str, Any] = {"pooled": {}, "own": {}, "curves": {}}
        if self.params.shared:
            found = yield from self._asked(cohort, send)
        if self.params.personal:
            found["personal"] = yield from self._personal(cohort, {**send, **PERSONAL})
        return found

    def _asked(self, cohort: Cohort, send: dict[str, Array]) -> Steps:
        model, curves = self._model(cohort.schema), dict[str, Any]()
        if model.task == "classes":
            pooled = yield from self._classes(cohort, model, send)
        elif model.task != "binary":
            pooled = yield from self._errors(cohort, model, send)
        elif cohort.exact:
            pooled, curves = yield from self._scores(cohort, send)
        else:
            cells = count((2, NOISY_BINS), bound=cohort.schema.max_rows)
            total = yield Round("cells", Sum(), {"cells": cells}, send)
            pooled, curves = score_metrics(from_cells(total["cells"]))
        return {"pooled": pooled, "own": (yield from self._each(cohort, model, send, pooled)), "curves": curves}

    def _each(self, cohort: Cohort, model: Predictor, send: dict[str, Array], pooled: Mapping[str, float]) -> Steps:
        """Each site's own metrics, of those that are in *pooled*."""
        own: dict[str, dict[str, float]] = {}
        if self.params.own and cohort.exact:
            gathered = yield Round("own", Gather(), {n: real() for n in own_metrics(model)}, send, optional=True)
            for site in gathered:
                values = {n: float(v) for n, v in gathered[site].items()}
                own[site] = {n: v for n, v in values.items() if n in pooled or (n == "rows" and not math.isnan(v))}
        return own

    def _personal(self, cohort: Cohort, send: dict[str, Array]) -> Steps:
        """The same of models that sites have for themselves, by a few sums: their score histograms would tell them."""
        rows, model = cohort.schema.max_rows, self._model(cohort.schema)
        if model.task not in ("binary", "classes"):
            pooled = yield from self._errors(cohort, model, send)
        else:
            loss = real(bound=rows * LOSS_CAP, step=fine(rows * LOSS_CAP))
            fields = {
                "rows": count(bound=rows), "right": count(bound=rows), "log_loss": loss,
                "ranked": real(bound=rows, step=fine(rows)), "ranked_rows": count(bound=rows),
            }  # fmt: skip
            total = yield Round("personal", Sum(), fields, send)
            told = {name: max(float(total[name]), 0.0) for name in fields}
            rates = {"accuracy": ("right", "rows"), "log_loss": ("log_loss", "rows")}
            rates["mean_auc"] = ("ranked", "ranked_rows")
            pooled = {name: told[a] / told[b] if told[b] else math.nan for name, (a, b) in rates.items()}
        own = yield from self._each(cohort, model, send, {**pooled, "auc": math.nan})
        return {"pooled": pooled, "own": own, "curves": {}}

    def _scores(self, cohort: Cohort, send: dict[str, Array]) -> Steps:
        rows, bins = cohort.schema.max_rows, self.params.bins
        fields = {
            "rows": count(bound=rows),
            "positives": count(bins, bound=rows),
            "negatives": count(bins, bound=rows),
            "log_loss": real(bound=rows * LOSS_CAP, step=fine(rows * LOSS_CAP)),
            "brier": real(bound=rows, step=fine(rows)),
            "score": real(bins, bound=rows, step=fine(rows)),
            "correct": count(3, bound=rows),
        }
        total = yield Round("scores", Sum(), fields, send)
        return score_metrics(total)

    def _classes(self, cohort: Cohort, model: Predictor, send: dict[str, Array]) -> Steps:
        rows = cohort.schema.max_rows
        size = len(cohort.schema.columns[model.targets[0]].values or ())
        loss = real(bound=rows * LOSS_CAP, step=fine(rows * LOSS_CAP))
        total = yield Round("classes", Sum(), {"confusion": count((size, size), bound=rows), "log_loss": loss}, send)
        return class_metrics(total["confusion"], float(total["log_loss"]))

    def _errors(self, cohort: Cohort, model: Predictor, send: dict[str, Array]) -> Steps:
        rows, far, size = cohort.schema.max_rows, FAR if cohort.exact else 1.0, len(model.targets)
        bounds = most_of(far)
        bits = 20 if cohort.exact else 0  # the tightest bound of a few numbers is far above what they come to
        fields = {name: real(size, bound=rows * most, step=fine(rows * most, bits)) for name, most in bounds.items()}
        total = yield Round("errors", Sum(), {"rows": count(bound=rows), **fields}, {**send, "far": np.array(far)})
        sums = {name: np.asarray(total[name], np.float64) for name in bounds}
        if not cohort.exact:  # what noise made of sums of squares
            sums = {name: value if name == "y" else np.maximum(value, 0.0) for name, value in sums.items()}
        return metrics_by_target(cohort.schema, model.targets, max(int(total["rows"]), 0), sums)

    def _scored(self, site: SiteView, task: Task, *, personal: bool = False) -> tuple[Floats, Floats]:
        """(labels, predictions) of held-out rows. personal: may they be of the site's own model?"""
        model = self._model(site.holdout.schema)
        weights = task.take("weights", model.weights.shape)
        model = model.with_weights(weights)
        if "personal" in task.arrays:
            if not (personal and self.params.personal):
                raise ProtocolError("task.array", "the plan does not score personal models", field="personal")
            model = restored(site.personal, site.holdout.schema, model)
        p = model.predict(site.holdout)
        if model.task == "classes":
            y = site.holdout.codes(model.targets[0]).astype(np.float64)
            y[y < 0] = np.nan
        else:
            y = np.column_stack([np.asarray(site.holdout[name], np.float64) for name in model.targets])
            y = y[:, 0] if p.ndim == 1 else y
        if np.isnan(y).any() or np.isnan(p).any():
            raise SchemaError(
                "schema.missing",
                "held-out rows have missing labels or features",
                field=", ".join(model.targets),
                remedy="impute features in the recipe, and remove rows without a label",
            )
        return y, p

    def _per_score(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        one = dict.fromkeys(("rows", "positives", "negatives", "brier", "score"), touches())
        return {**one, "log_loss": touches(1, LOSS_CAP), "correct": touches(3)}

    def _per_cell(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        return {"cells": touches()}

    def _per_error(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        far = allowed(float(taken(sent, "far", ())))
        size = len(self._model(schema).targets)
        return {"rows": touches(), **{name: touches(size, most) for name, most in most_of(far).items()}}

    def _per_class(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        return {"confusion": touches(), "log_loss": touches(1, LOSS_CAP)}

    @handler("scores", groups=("rows",), record=_per_score)
    def scores(self, site: SiteView, task: Task) -> Reply:
        """At the site: histograms of scores by label, and loss sums, over held-out rows."""
        return score_sums(*self._scored(site, task), self.params.bins)

    @handler("cells", record=_per_cell)
    def cells(self, site: SiteView, task: Task) -> Reply:
        """At the site: one histogram of scores by label, over held-out rows."""
        only_summed(site)
        y, p = self._scored(site, task)
        return {"cells": np.stack([histogram(p[y == label], NOISY_BINS) for label in (0, 1)])}

    @handler("classes", record=_per_class)
    def classes(self, site: SiteView, task: Task) -> Reply:
        """At the site: counts of held-out rows by true and predicted class, and their summed loss."""
        y, p = self._scored(site, task)
        check_groups({"rows": np.array(len(y))}, frozenset({"rows"}), site.min_group_size)
        return {"confusion": confused(y, p), "log_loss": class_losses(y, p).sum()}

    @handler("personal")
    def of_personal(self, site: SiteView, task: Task) -> Reply:
        """At the site: of its own model, over held-out rows: how many, how many are right, summed loss, rows · AUC."""
        y, p = self._scored(site, task, personal=True)
        check_groups({"rows": np.array(len(y))}, frozenset({"rows"}), site.min_group_size)
        if p.ndim == 1:
            auc, right, losses = binary_metrics(y, p)["auc"], (p >= 0.5) == (y == 1), log_loss(y, p)
        else:
            auc, right, losses = math.nan, p.argmax(1) == y, class_losses(y, p)
        ranked = 0 if math.isnan(auc) else len(y)
        return {
            "rows": len(y), "right": int(right.sum()), "log_loss": losses.sum(),
            "ranked": auc * ranked if ranked else 0.0, "ranked_rows": ranked,
        }  # fmt: skip

    @handler("errors", groups=("rows",), record=_per_error)
    def errors(self, site: SiteView, task: Task) -> Reply:
        """At the site: sums of errors and of the target, and of their squares, over held-out rows."""
        y, p = self._scored(site, task, personal=True)
        far, schema = allowed(float(task.take("far", ()))), site.holdout.schema
        return {"rows": len(y), **error_sums(schema, self._model(schema).targets, y, p, far)}

    @handler("own", reduce="gather")
    def own(self, site: SiteView, task: Task) -> Reply:
        """At the site: its own exact metrics; withheld unless its policy shares "metrics"."""
        if not site.shares("metrics"):
            raise PolicyError("policy.withheld", "the site does not share its own metrics", field="share")
        y, p = self._scored(site, task, personal=True)
        schema = site.holdout.schema
        model = self._model(schema)
        if model.task == "binary":
            found = binary_metrics(y, p)
        elif model.task == "classes":
            found = class_metrics(confused(y, p), float(class_losses(y, p).sum()))
        else:
            found = metrics_by_target(schema, model.targets, len(y), error_sums(schema, model.targets, y, p, FAR))
        if "personal" in task.arrays:  # with all their digits they would tell of a model that nobody else has
            found = {name: float(f"{value:.3g}") for name, value in found.items()}
        if site.shares("rows"):
            found["rows"] = float(len(y))
        return {name: found.get(name, math.nan) for name in own_metrics(model)}


def asked_of(model: Predictor, *, exact: bool, personal: bool, shared: bool = True) -> Program:
    """The evaluation that a study makes of a model, during a run and after it."""
    asked = {"model": model.spec(), "own": exact, "personal": personal}
    return build("statistics.evaluation", asked if shared else {**asked, "shared": False})


def scored(learner: Any, cohort: Cohort, weights: Array, number: int) -> Steps:
    """Score *learner*'s model in mid-run, as Metrics of round *number*: the cohort's, each site's own ("accuracy,
    north") and those of personal models ("personal accuracy"). Returns the cohort's."""
    asked = asked_of(learner.model(cohort.schema), exact=cohort.exact, personal=learner.personal)
    found = yield from asked.coordinate(cohort, {"weights": weights})
    values: dict[str, float] = {}
    for prefix, part in (("", found), ("personal ", found.get("personal", {}))):
        values |= {prefix + name: value for name, value in part.get("pooled", {}).items()}
        for site, own in part.get("own", {}).items():
            values |= {f"{prefix}{name}, {site}": value for name, value in own.items() if name != "rows"}
    yield Metrics(number, {name: value for name, value in values.items() if not math.isnan(value)})
    return found.get("pooled", {})


def own_metrics(model: Predictor) -> tuple[str, ...]:
    """The metrics that a site can tell of its own."""
    several = model.targets if len(model.targets) > 1 else ()
    return OWN + tuple(f"{metric} {name}" for name in several for metric in ("mae", "rmse", "r2"))
