"""Linear, logistic and Poisson regression by federated Newton's method (IRLS) with L2.

Source: McCullagh & Nelder 1989, §2.5 (Fisher scoring; with the canonical link it is
Newton's method). Because loss, gradient and Hessian are sums over rows, the iterates are
those of the pooled fit and converge to the *pooled* optimum, in about ten rounds.

Parties: sites and coordinator. Messages: the weights go out; each round is one Sum of
loss, gradient and Hessian. The coordinator learns these sums over the cohort at every
iterate (each site's under ``plain``). Dropout: the fit goes on with the survivors, and
converges to their optimum. Cost: ~10 rounds, (p² + 3p)/2 · 8 bytes a site, p = 1 + features.

Penalty: l2/2 · ‖slopes‖² with slopes in the columns' own units, intercept free (as in
scikit-learn with C = 1/l2). Standard errors are from the inverse Fisher information;
p-values are Wald's (normal; Student's t for linear), and are given only without a penalty.

Under noise (``Cohort.exact`` is False) each of exactly *max_iterations* rounds, "step", is one noisy gradient and
Hessian, whose small eigenvalues are raised and whose step is limited; weights stay where a mean can be. Nothing is
refused, and there are neither standard errors nor losses: both would need the noise's size, or more of the budget. A
linear fit is one step away from any weights; the others need five or six.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.errors import PlanError, ProtocolError, SchemaError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Field as Declared
from atoll.contract.rounds import Metrics, Reply, Round, Steps, Sum, Task, count, real, taken
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.models.linear import LinearModel, feature_bounds, xy
from atoll.models.model import Family
from atoll.statistics.noise import coarse, fine, only_summed

Floats = NDArray[np.float64]
DEPENDENT = 1e-12
"""Features are dependent when the Hessian, scaled to a diagonal of ones, has an eigenvalue below this."""
VANISHED = 1e-8
"""Labels are separated when the fit leaves a direction less than this share of its first curvature."""
ITERATIONS = 50
NOISY_ITERATIONS = {"linear": 1, "logistic": 6, "poisson": 6}
FLAT = 1e-6
"""Under noise no direction's curvature counts as less than this share of the largest."""


@program("horizontal.glm", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class Glm:
    """Linear, logistic or Poisson regression, equal to the pooled fit, with standard errors and p-values."""

    class Params(ProgramParams):
        """tolerance: stop when Newton's decrement per row is below it. max_iterations: 50 by default; under noise as
        many are made, by default 6 (linear: 1)."""

        family: Family
        target: str
        features: tuple[str, ...] = Field(min_length=1)
        l2: float = Field(default=0.0, ge=0)
        max_iterations: int | None = Field(default=None, ge=1)
        tolerance: float = Field(default=1e-16, gt=0)

    def __init__(self, params: Params) -> None:
        self.params = params

    def model(self, schema: TableSchema) -> LinearModel:
        """The model it fits, before any fitting; what evaluation is then asked about."""
        return LinearModel.zero(self.params.family, schema, self.params.features, self.params.target)

    def asks(self, name: str, schema: TableSchema, sent: Mapping[str, Array]) -> Mapping[str, Declared] | None:
        """The fields of a round whose bounds follow from what is *sent* with it; None of others."""
        low, high = feature_bounds(schema, self.params.target)
        if name == "labels":
            return self._of_labels(schema, exact=True)
        if name != "newton":
            return None
        weights = taken(sent, "weights", (1 + len(self.params.features),))
        return _fields(self.model(schema), weights, schema.max_rows, max(abs(low), abs(high), 1.0))

    def _of_labels(self, schema: TableSchema, *, exact: bool) -> dict[str, Declared]:
        rows, (low, high) = schema.max_rows, feature_bounds(schema, self.params.target)
        fields = {"n": count(bound=rows)}
        for name, most in (("y", (high - low) / 2), ("y_squares", ((high - low) / 2) ** 2)):
            fields[name] = real(bound=rows * most, step=fine(rows * most, 20) if exact else coarse(most))
        return fields

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"model", "table": one row per coefficient, "rows", "iterations", …}."""
        model, rows = self.model(cohort.schema), cohort.schema.max_rows
        low, high = feature_bounds(cohort.schema, model.target)
        middle, half, reach = (low + high) / 2, (high - low) / 2, max(abs(low), abs(high), 1.0)
        labels = yield Round("labels", Sum(), self._of_labels(cohort.schema, exact=cohort.exact))
        n, y_sum = int(labels["n"]), float(labels["y"])
        if not cohort.exact:
            mean = middle + min(max(y_sum / max(n, 1), -half), half)
            return (yield from self._noisily(cohort.schema, n, mean))
        self._check_labels(n, y_sum, float(labels["y_squares"]))
        weights = np.zeros(1 + len(model.features))
        weights[0] = _link(model.family, middle + y_sum / n)
        penalty = self.params.l2 * np.append(0.0, 1 / model.scale.half) ** 2
        loss, step, history = math.inf, np.zeros_like(weights), []
        summed: tuple[tuple[str, ...], int] = (), 0
        most = self.params.max_iterations or ITERATIONS
        for iteration in range(most):
            fields = _fields(model, weights, rows, reach)
            total = yield Round("newton", Sum(), fields, {"weights": weights})
            n = int(total["n"])
            self._check_rows(n)
            if (who := (total.sites, total.members)) != summed:  # a site is lost or back: losses are of other rows
                loss, summed = math.inf, who
            now = float(total["loss"]) + float(penalty @ weights**2) / 2
            history.append(now / n)
            yield Metrics(iteration, {"loss": now / n})
            rounding = total.members * (fields["loss"].step or 0.0)
            if now > loss + 1e-12 * abs(loss) + rounding and np.abs(step).max() > 1e-9:
                step, weights = step / 2, weights - step / 2  # overshot: half of the way back
                continue
            gradient = total["gradient"] + penalty * weights
            hessian = _full(total["hessian"], len(weights)) + np.diag(penalty)
            if iteration == 0:
                first = hessian
            self._check_curvature(hessian, first, now)
            loss, step = now, np.linalg.solve(hessian, -gradient)
            decrement = float(-gradient @ step) / n
            weights = weights + step
            scale, floor = max(1.0, abs(loss / n)), 0.0
            if model.family == "linear":  # in units of the target; no closer than its rounding errors allow
                scale, floor = abs(history[0]), (16 * np.finfo(float).eps * reach) ** 2
            if decrement < self.params.tolerance * scale + floor:
                self._check_separation(hessian, first)
                return self._result(model.with_weights(weights), hessian, loss, n, iteration + 1, history)
        raise ProtocolError(
            "glm.not-converged",
            f"no convergence in {most} iterations",
            field="max_iterations",
            remedy="a feature may separate the labels: set l2 > 0, drop it, or allow more iterations",
        )

    def _noisily(self, schema: TableSchema, n: int, mean: float) -> Steps:
        """Newton's method on noisy sums, from a target of about *n* rows and *mean*: see the module."""
        model, size, rows = self.model(schema), 1 + len(self.params.features), schema.max_rows
        low, high = feature_bounds(schema, model.target)
        penalty = self.params.l2 * np.append(0.0, 1 / model.scale.half) ** 2
        weights, inside = np.zeros(size), 1 / (n + 2)
        if model.family != "linear":
            mean = min(max(mean, inside), 1 - inside if model.family == "logistic" else high)
        weights[0] = _link(model.family, mean)
        limit = 100 * (high - low) if model.family == "linear" else 4.0
        rounds = self.params.max_iterations or NOISY_ITERATIONS[model.family]
        for _ in range(rounds):
            _, residual, curvature = _most(model.with_weights(weights), low, high)
            fields = {
                "gradient": real(size, bound=rows * residual, step=coarse(residual)),
                "hessian": real(size * (size + 1) // 2, bound=rows * curvature, step=coarse(curvature)),
            }
            total = yield Round("step", Sum(), fields, {"weights": weights})
            values, vectors = np.linalg.eigh(_full(total["hessian"], size) + np.diag(penalty))
            values = np.maximum(values, max(FLAT * values[-1], -2 * values[0], 1.0))  # noise makes negative ones
            step = -vectors @ ((vectors.T @ (total["gradient"] + penalty * weights)) / values)
            weights = _held(model.family, weights + np.clip(step, -limit, limit), high)
        raw = model.to_raw() @ weights
        named = dict(zip(("intercept", *model.features), raw.tolist(), strict=True))
        return {
            "model": model.with_weights(weights),
            "table": [{"name": name, "coefficient": value} for name, value in named.items()],
            "coefficients": named,
            "rows": n,
            "iterations": rounds,
            "history": [],
        }

    def _check_rows(self, n: int) -> None:
        if n <= len(self.params.features) + 1:
            raise PlanError(
                "glm.too-few-rows", "the cohort has no more rows than coefficients", field="features",
                remedy="use fewer features, or more sites",
            )  # fmt: skip

    def _check_labels(self, n: int, y_sum: float, y_squares: float) -> None:
        """y_sum, y_squares: of y less the middle of its range."""
        self._check_rows(n)
        if y_squares - y_sum**2 / n <= 1e-12 * y_squares:
            raise SchemaError(
                "schema.constant-label",
                f"the target {self.params.target!r} has the same value in every row of the cohort",
                field=self.params.target,
                remedy="choose another target, or more sites",
            )

    def _check_curvature(self, hessian: Floats, first: Floats, loss: float) -> None:
        """Refuse a Hessian that has lost a direction: features that depend on each other, or, once the
        weights have moved, labels that the features separate. A loss below log 2 proves the latter:
        every row is then on its own side, and no finite weights are best (Albert & Anderson 1984)."""
        if self.params.family == "logistic" and self.params.l2 == 0 and loss < math.log(2):
            raise _separable()
        size = np.sqrt(np.diag(hessian))
        if not size.all() or np.linalg.eigvalsh(hessian / np.outer(size, size))[0] < DEPENDENT:
            if self.params.family != "linear" and hessian is not first:
                raise _separable()
            raise ProtocolError(
                "glm.singular", "the features are linearly dependent", field="features",
                remedy="drop a constant or repeated feature, or set l2 > 0",
            )  # fmt: skip

    def _check_separation(self, hessian: Floats, first: Floats) -> None:
        """Refuse "convergence" on the way to infinity: some direction's curvature has all but vanished."""
        if self.params.family != "linear" and self.params.l2 == 0:
            left = scipy.linalg.eigh(hessian, first, eigvals_only=True, subset_by_index=[0, 0])
            if left[0] < VANISHED:
                raise _separable()

    def _result(
        self, model: LinearModel, hessian: Floats, loss: float, n: int, iterations: int, history: list[float]
    ) -> dict[str, Any]:
        transform = model.to_raw()
        raw = transform @ model.weights
        dispersion = 2 * loss / (n - len(raw)) if model.family == "linear" else 1.0
        errors = np.sqrt(np.diag(transform @ np.linalg.inv(hessian) @ transform.T) * dispersion)
        z = raw / errors
        tail = scipy.stats.t(n - len(raw)).sf if model.family == "linear" else scipy.stats.norm.sf
        table = []
        for i, name in enumerate(("intercept", *model.features)):
            row: dict[str, Any] = {"name": name, "coefficient": float(raw[i])}
            if self.params.l2 == 0:
                row |= {"std_error": float(errors[i]), "z": float(z[i]), "p_value": float(2 * tail(abs(z[i])))}
            table.append(row)
        return {
            "model": model,
            "table": table,
            "coefficients": {row["name"]: row["coefficient"] for row in table},
            "rows": n,
            "iterations": iterations,
            "history": history,
        }

    def _labels_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        low, high = feature_bounds(schema, self.params.target)
        half = (high - low) / 2
        return {"n": touches(), "y": touches(1, half), "y_squares": touches(1, half**2)}

    def _newton_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        return {"n": touches(), **self._step_per_record(schema, sent), "loss": touches(1, self._reach(schema, sent)[0])}

    def _step_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        """Scaled features are within [−1, 1], and so is the intercept's column."""
        _, residual, curvature = self._reach(schema, sent)
        size = 1 + len(self.params.features)
        return {"gradient": touches(size, residual), "hessian": touches(size * (size + 1) // 2, curvature)}

    def _reach(self, schema: TableSchema, sent: Mapping[str, Array]) -> tuple[float, float, float]:
        weights = taken(sent, "weights", (1 + len(self.params.features),))
        return _most(self.model(schema).with_weights(weights), *feature_bounds(schema, self.params.target))

    @handler("labels", groups=("n",), record=_labels_per_record)
    def labels(self, site: SiteView, task: Task) -> Reply:
        """At the site: number of training rows, and Σ(y − m), Σ(y − m)² about the middle m of y's range."""
        model = self.model(site.table.schema)
        y = site.table[model.target]
        if len(y) and np.isnan(y).all():
            raise SchemaError(
                "schema.no-labels", "every label is missing", field=self.params.target, remedy="check the label column"
            )
        for _ in xy(model, site.table):
            pass  # refuses missing cells
        low, high = feature_bounds(site.table.schema, model.target)
        y = y - (low + high) / 2
        return {"n": len(y), "y": y.sum(), "y_squares": (y**2).sum()}

    @handler("newton", groups=("n",), record=_newton_per_record)
    def newton(self, site: SiteView, task: Task) -> Reply:
        """At the site: loss, gradient and upper triangle of the Hessian over training rows."""
        model = self.model(site.table.schema)
        model = model.with_weights(task.take("weights", model.weights.shape))
        size = len(model.weights)
        loss, gradient, hessian = 0.0, np.zeros(size), np.zeros((size, size))
        done = 0
        for design, y in xy(model, site.table):
            eta = design @ model.weights
            mean = model.mean(eta)
            loss += float(model.loss(eta, y).sum())
            gradient += design.T @ (mean - y)
            hessian += (design * model.curvature(mean)[:, None]).T @ design
            site.progress(done := done + len(y), len(site.table))
        return {"n": done, "loss": loss, "gradient": gradient, "hessian": hessian[np.triu_indices(size)]}

    @handler("step", record=_step_per_record)
    def step(self, site: SiteView, task: Task) -> Reply:
        """At the site: gradient and Hessian alone."""
        only_summed(site)
        found = self.newton(site, task)
        return {"gradient": found["gradient"], "hessian": found["hessian"]}


def _link(family: Family, mean: float) -> float:
    if family == "logistic":
        return math.log(mean / (1 - mean))
    return math.log(mean) if family == "poisson" else mean


def _fields(model: LinearModel, weights: Floats, rows: int, reach: float) -> dict[str, Declared]:
    """Bounds follow from |x'| ≤ 1 and so |eta| ≤ Σ|weights|, known before data is read."""
    eta = float(np.abs(weights).sum())
    mean = {"linear": eta, "logistic": 1.0, "poisson": math.exp(min(eta, 500.0))}[model.family]
    curvature = {"linear": 1.0, "logistic": 0.25, "poisson": mean}[model.family]
    loss = {"linear": (reach + eta) ** 2, "logistic": 1 + eta, "poisson": mean + reach * eta}[model.family]
    size = len(weights)
    bounds = {"loss": loss, "gradient": mean + reach, "hessian": curvature}
    shapes = {"loss": (), "gradient": (size,), "hessian": (size * (size + 1) // 2,)}
    fields = {name: real(shapes[name], bound=rows * b, step=fine(rows * b, 20)) for name, b in bounds.items()}
    return {"n": count(bound=rows), **fields}


def _most(model: LinearModel, low: float, high: float) -> tuple[float, float, float]:
    """Most that one row's loss, residual and curvature can be, of a target in [low, high]: |x'| ≤ 1."""
    slopes = float(np.abs(model.weights[1:]).sum())
    least, most = float(model.weights[0]) - slopes, float(model.weights[0]) + slopes
    if model.family == "logistic":
        loss = float(np.logaddexp(0, max(most, -least)))
        return loss, 1.0, 0.25
    if model.family == "poisson":
        mean = math.exp(min(most, 500.0))
        return mean + high * max(abs(least), abs(most)), max(mean - low, high), mean
    residual = max(most - low, high - least)
    return residual**2 / 2, residual, 1.0


def _held(family: Family, weights: Floats, high: float) -> Floats:
    """*weights* under which no mean of counts up to *high* is far above it, as noise might make them."""
    if family == "poisson":
        ceiling = math.log(max(high, 1.0)) + 2
        weights = np.append(min(weights[0], ceiling), weights[1:])
        room, slopes = ceiling - weights[0], np.abs(weights[1:]).sum()
        weights[1:] *= min(1.0, room / slopes) if slopes > 0 else 1.0
    return weights


def _full(upper: Array, size: int) -> Floats:
    matrix = np.zeros((size, size))
    matrix[np.triu_indices(size)] = upper
    return matrix + np.triu(matrix, 1).T


def _separable() -> ProtocolError:
    return ProtocolError(
        "glm.separable", "the features separate the labels, so that no finite coefficients fit best", field="features",
        remedy="set l2 > 0, or drop the feature that gives the labels away",
    )  # fmt: skip
