"""DP-FTRL: gradient descent over a stream in which every row is used once, with the noise of a tree.

Source: Kairouz, McMahan, Song, Thakkar, Thakurta & Xu 2021, Practical and Private (Deep) Learning without Sampling or
Shuffling (ICML), Algorithm 1; the noise is ``privacy.dp.tree``.

Parties: sites and coordinator. Messages: the weights go out; each round is one Sum of Σ clip(∇ℓ) over the rows of
that round. The coordinator learns these sums with the plan's noise (each site's under ``plain``). A row is in one
round: that of its period where ``time`` names a column, else one that the site draws for it, row by row. So no
sampling has to stay secret for the promise to hold, and all sums so far together carry the noise of a few tree nodes.
Threat model: the protection's and the noise's. Dropout: under a plan with privacy the same sites must be there in every
round, since a tree's noise is one over all of them; else a round's rows of an absent site are not used.
Cost: one round trip of the model's size per round and site.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, SiteView, handler, program
from atoll.contract.rounds import Metrics, Reply, Round, Steps, Sum, Task, real
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, within
from atoll.contract.wire import Array
from atoll.models.linear import feature_bounds, named
from atoll.models.model import LearnerParams, Model, by_row


@program("horizontal.dpftrl", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class DpFtrl:
    """Gradient descent in which each row is used once, in its own period: privacy of records without sampling."""

    class Params(LearnerParams):
        """time: a numeric column in whose order rows arrive; its range is cut into *rounds* equal periods.
        expected_rows: of all sites together, public. clip_norm_l2: of one row's gradient."""

        expected_rows: int = Field(ge=1)
        rounds: int = Field(default=64, ge=1)
        time: str = ""
        clip_norm_l2: float = Field(default=1.0, gt=0)
        learning_rate: float = Field(default=0.5, gt=0)
        momentum: float = Field(default=0.0, ge=0, lt=1)

    once = frozenset({"gradient"})
    """Rounds of which a record takes part in one only."""

    def __init__(self, params: Params) -> None:
        self.params = params

    def model(self, schema: TableSchema) -> Model:
        """The model it fits, before any fitting; what evaluation is then asked about."""
        return by_row(self.params.unfitted(schema))

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"model", "history": norm of the mean gradient by round, and a linear model's "coefficients"}."""
        model, p = self.model(cohort.schema), self.params
        weights = model.initial(cohort.seed)
        velocity, history = np.zeros_like(weights), []
        bound = p.clip_norm_l2 * cohort.schema.max_rows
        fields = {"gradient": real(len(weights), bound=bound, step=p.clip_norm_l2 / 2**20)}
        for number in range(p.rounds):
            sent = {"weights": weights, "number": np.array(float(number))}
            total = yield Round("gradient", Sum(), fields, sent)
            mean = total["gradient"] * p.rounds / p.expected_rows
            velocity = p.momentum * velocity + mean
            weights = weights - p.learning_rate * velocity
            history.append(float(np.linalg.norm(mean)))
            used_up = yield Metrics(number, {"gradient_norm_l2": history[-1]})
            if used_up:
                break
        model = model.with_weights(weights)
        return {"model": model, "history": history, "iterations": len(history), **named(model)}

    def _per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        return {"gradient": within(self.params.clip_norm_l2, len(self.model(schema).weights))}

    @handler("gradient", record=_per_record)
    def gradient(self, site: SiteView, task: Task) -> Reply:
        """At the site: Σ of the clipped gradients of the rows of one round, each row in one round at most."""
        p, model = self.params, self.model(site.table.schema)
        weights, number = task.take("weights", model.weights.shape), int(task.take("number", ()))
        done = site.state.get("done", np.array(-1))
        if number <= int(done):
            raise PlanError("dpftrl.again", "the rows of a round are used once", field="number")
        site.state["done"] = np.array(number)
        rows = np.flatnonzero(self._periods(site, task) == number)
        if not len(rows):
            return {"gradient": np.zeros(model.weights.shape)}
        return {
            "gradient": model.clipped_gradient_sum(weights, model.examples(site.table).take(rows), p.clip_norm_l2)[0]
        }

    def _periods(self, site: SiteView, task: Task) -> NDArray[np.int64]:
        """Each row's round, [num_rows], independent of the other rows."""
        rounds = self.params.rounds
        if self.params.time:
            low, high = feature_bounds(site.table.schema, self.params.time)
            part = (site.table[self.params.time] - low) / (high - low)
            return np.clip(np.nan_to_num(part) * rounds, 0, rounds - 1).astype(np.int64)
        if "periods" not in site.state:
            drawn = np.frombuffer(task.secret("periods").bytes(8 * len(site.table)), "<u8")
            site.state["periods"] = (drawn % np.uint64(rounds)).astype(np.int64)
        return site.state["periods"]
