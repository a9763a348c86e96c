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
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import linalg, stats

from atoll.contract.errors import PlanError, ProtocolError, SchemaError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Metrics, Reply, Round, Steps, Sum, Task, count, real
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.models.linear import Family, LinearModel, feature_bounds, xy

Floats = NDArray[np.float64]
DEPENDENT = 1e-12
"""Features are dependent when the Hessian, scaled to a diagonal of ones, has an eigenvalue below this."""
VANISHED = 1e-8
"""Labels are separated when the fit leaves a direction less than this share of its first curvature."""


@program("horizontal.glm", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class Glm:
    """Linear, logistic or Poisson regression, equal to the pooled fit, with standard errors and p-values."""

    class Params(ProgramParams):
        """tolerance: stop when Newton's decrement per row is below it."""

        family: Family
        target: str
        features: tuple[str, ...] = Field(min_length=1)
        l2: float = Field(default=0.0, ge=0)
        max_iterations: int = Field(default=50, ge=1)
        tolerance: float = Field(default=1e-16, gt=0)

    def __init__(self, params: Params) -> None:
        self.params = params

    def model(self, schema: TableSchema) -> LinearModel:
        """The model it fits, before any fitting; what evaluation is then asked about."""
        return LinearModel.zero(self.params.family, schema, self.params.features, self.params.target)

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"model", "table": one row per coefficient, "rows", "iterations", …}."""
        model, rows = self.model(cohort.schema), cohort.schema.max_rows
        low, high = feature_bounds(cohort.schema, model.target)
        middle, half, reach = (low + high) / 2, (high - low) / 2, max(abs(low), abs(high), 1.0)
        fields = {
            "n": count(bound=rows),
            "y": real(bound=rows * half, step=1e-9 * half),
            "y_squares": real(bound=rows * half**2, step=1e-9 * half**2),
        }
        labels = yield Round("labels", Sum(), fields)
        n, y_sum = int(labels["n"]), float(labels["y"])
        self._check_labels(n, y_sum, float(labels["y_squares"]))
        weights = np.zeros(1 + len(model.features))
        weights[0] = _link(model.family, middle + y_sum / n)
        penalty = self.params.l2 * np.append(0.0, 1 / model.scale.half) ** 2
        loss, step, history = math.inf, np.zeros_like(weights), []
        summed: tuple[str, ...] = ()
        for iteration in range(self.params.max_iterations):
            fields = _fields(model, weights, rows, reach)
            total = yield Round("newton", Sum(), fields, {"weights": weights})
            n = int(total["n"])
            self._check_rows(n)
            if total.sites != summed:  # a site dropped out or came back: losses before are of other rows
                loss, summed = math.inf, total.sites
            now = float(total["loss"]) + float(penalty @ weights**2) / 2
            history.append(now / n)
            yield Metrics(iteration, {"loss": now / n})
            if now > loss + 1e-12 * abs(loss) and np.abs(step).max() > 1e-9:
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
            f"no convergence in {self.params.max_iterations} iterations",
            field="max_iterations",
            remedy="a feature may separate the labels: set l2 > 0, drop it, or allow more iterations",
        )

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
            left = linalg.eigh(hessian, first, eigvals_only=True, subset_by_index=[0, 0])
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
        tail = stats.t(n - len(raw)).sf if model.family == "linear" else stats.norm.sf
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

    @handler("labels", groups=("n",))
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

    @handler("newton", groups=("n",))
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


def _link(family: Family, mean: float) -> float:
    if family == "logistic":
        return math.log(mean / (1 - mean))
    return math.log(mean) if family == "poisson" else mean


def _fields(model: LinearModel, weights: Floats, rows: int, reach: float) -> dict[str, Any]:
    """Bounds follow from |x'| ≤ 1 and so |eta| ≤ Σ|weights|, known before data is read."""
    eta = float(np.abs(weights).sum())
    mean = {"linear": eta, "logistic": 1.0, "poisson": math.exp(min(eta, 500.0))}[model.family]
    curvature = {"linear": 1.0, "logistic": 0.25, "poisson": mean}[model.family]
    loss = {"linear": (reach + eta) ** 2, "logistic": 1 + eta, "poisson": mean + reach * eta}[model.family]
    size = len(weights)
    return {
        "n": count(bound=rows),
        "loss": real(bound=rows * loss, step=1e-9),
        "gradient": real(size, bound=rows * (mean + reach), step=1e-9),
        "hessian": real(size * (size + 1) // 2, bound=rows * curvature, step=1e-9),
    }


def _full(upper: Array, size: int) -> Floats:
    matrix = np.zeros((size, size))
    matrix[np.triu_indices(size)] = upper
    return matrix + np.triu(matrix, 1).T


def _separable() -> ProtocolError:
    return ProtocolError(
        "glm.separable", "the features separate the labels, so that no finite coefficients fit best", field="features",
        remedy="set l2 > 0, or drop the feature that gives the labels away",
    )  # fmt: skip
