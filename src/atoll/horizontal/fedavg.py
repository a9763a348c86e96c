"""FedAvg: local epochs of mini-batch SGD, then the average weighted by rows.

Source: McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from
Decentralized Data (AISTATS), Algorithm 1.

Parties: sites and coordinator. Messages: the weights go out; each round is one Sum of
(rows · change of weights, rows). The coordinator learns the weighted mean change per
round (each site's under ``plain``) and the mean local loss. Dropout: the round averages
the survivors. Cost: one round trip of the model's size per round and site.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Checkpoint, Metrics, Reply, Round, Steps, Sum, Task
from atoll.contract.schema import TableSchema
from atoll.contract.updates import Update
from atoll.contract.wire import Array
from atoll.models.linear import Family, LinearModel, xy


@program("horizontal.fedavg", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class FedAvg:
    """Federated averaging of a linear model with local epochs and mini-batches."""

    class Params(ProgramParams):
        """clip: a site's change of any one weight per round is clipped to it (this is the bound)."""

        family: Family
        target: str
        features: tuple[str, ...] = Field(min_length=1)
        rounds: int = Field(default=20, ge=1)
        local_epochs: int = Field(default=1, ge=1)
        batch_size: int = Field(default=32, ge=1)
        learning_rate: float = Field(default=0.1, gt=0)
        clip: float = Field(default=10.0, gt=0)
        checkpoint_every: int = Field(default=10, ge=1)

    def __init__(self, params: Params) -> None:
        self.params = params

    def model(self, schema: TableSchema) -> LinearModel:
        """The model it fits, before any fitting; what evaluation is then asked about."""
        return LinearModel.zero(self.params.family, schema, self.params.features, self.params.target)

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"model", "coefficients", "history": mean local loss by round}."""
        model, p = self.model(cohort.schema), self.params
        weights, history = (start["weights"], start["history"].tolist()) if start else (model.weights, [])
        state = {"weights": weights, "loss": np.zeros(())}
        fields = Update.fields(state, value_bound=p.clip, weight_bound=cohort.schema.max_rows, step=1e-9)
        for number in range(len(history), p.rounds):
            total = yield Round("train", Sum(), fields, {"weights": weights})
            mean = Update.from_sum(total, ("weights", "loss")).mean()
            weights = weights + mean["weights"]
            history.append(float(mean["loss"]))
            yield Metrics(number, {"loss": history[-1]})
            if (number + 1) % p.checkpoint_every == 0:
                yield Checkpoint({"weights": weights, "history": np.array(history)})
        model = model.with_weights(weights)
        intercept, slopes = model.coefficients()
        named = {"intercept": intercept, **dict(zip(model.features, slopes.tolist(), strict=True))}
        return {"model": model, "coefficients": named, "history": history, "iterations": p.rounds}

    @handler("train", groups=("weight",))
    def train(self, site: SiteView, task: Task) -> Reply:
        """At the site: ClientUpdate(k, w) of Algorithm 1, and the mean loss before it."""
        p, model = self.params, self.model(site.table.schema)
        sent = task.take("weights", model.weights.shape)
        if not len(site.table):
            return Update.zero_like({"weights": sent, "loss": np.zeros(())}).reply()
        design, y = (np.concatenate(parts) for parts in zip(*xy(model, site.table), strict=True))
        weights, shuffler = sent.copy(), task.shuffler()
        loss = model.loss(design @ weights, y).mean()
        for epoch in range(p.local_epochs):
            order = shuffler.permutation(len(y))
            for start in range(0, len(y), p.batch_size):
                batch = order[start : start + p.batch_size]
                error = model.mean(design[batch] @ weights) - y[batch]
                weights -= p.learning_rate * design[batch].T @ error / len(batch)
            site.progress(epoch + 1, p.local_epochs)
        change = np.clip(weights - sent, -p.clip, p.clip)
        return Update.of({"weights": change, "loss": np.clip(loss, -p.clip, p.clip)}, len(y)).reply()
