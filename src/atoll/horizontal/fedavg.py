"""FedAvg: local epochs of mini-batch SGD, then the average weighted by rows.

Source: McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from
Decentralized Data (AISTATS), Algorithm 1.

Parties: sites and coordinator. Messages: the weights go out; each round is one Sum of
(rows · change of weights, rows). The coordinator learns the weighted mean change per
round (each site's under ``plain``) and the mean local loss. Dropout: the round averages
the survivors. Cost: one round trip of the model's size per round and site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from pydantic import Field

from atoll.compression.update import Compression
from atoll.contract.program import Cohort, SiteView, handler, program
from atoll.contract.rounds import Checkpoint, Metrics, Reply, Round, Steps, Sum, Task
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches, within
from atoll.contract.updates import Update
from atoll.contract.wire import Array
from atoll.models.linear import named
from atoll.models.model import LearnerParams, Model


@program("horizontal.fedavg", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class FedAvg:
    """Federated averaging of a model with local epochs and mini-batches."""

    class Params(LearnerParams):
        """local_steps: that many mini-batches a round, instead of epochs. clip: a site's change of any one weight
        per round is clipped to it (this is the bound); clip_norm_l2: and the change as a whole to this norm."""

        rounds: int = Field(default=20, ge=1)
        local_epochs: int = Field(default=1, ge=1)
        local_steps: int | None = Field(default=None, ge=1)
        batch_size: int = Field(default=32, ge=1)
        learning_rate: float = Field(default=0.1, gt=0)
        clip: float = Field(default=10.0, gt=0)
        clip_norm_l2: float | None = Field(default=None, gt=0)
        compress: Compression = Compression()
        checkpoint_every: int = Field(default=10, ge=1)

    def __init__(self, params: Params) -> None:
        self.params = params

    def model(self, schema: TableSchema) -> Model:
        """The model it fits, before any fitting; what evaluation is then asked about."""
        return self.params.unfitted(schema)

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"model", "history": mean local loss by round, and a linear model's "coefficients"}."""
        model, p = self.model(cohort.schema), self.params
        weights, history = (start["weights"], start["history"].tolist()) if start else (model.initial(cohort.seed), [])
        last, step = np.zeros_like(weights), p.compress.step(p.clip)
        for number in range(len(history), p.rounds):
            support = p.compress.support(last, cohort.seed, number)
            state = {"weights": weights[support], "loss": np.zeros(())}
            fields = Update.fields(state, value_bound=p.clip, weight_bound=cohort.schema.max_rows, step=step)
            total = yield Round("train", Sum(), fields, {"weights": weights, "support": support})
            update = Update.from_sum(total, ("weights", "loss"))
            mean = (update if cohort.exact else replace(update, weight=max(update.weight, 1.0))).mean()
            weights, last[support] = weights.copy(), mean["weights"]
            weights[support] += last[support]
            history.append(float(mean["loss"]))
            yield Metrics(number, {"loss": history[-1]})
            if (number + 1) % p.checkpoint_every == 0:
                yield Checkpoint({"weights": weights, "history": np.array(history)})
        model = model.with_weights(weights)
        return {"model": model, "history": history, "iterations": p.rounds, **named(model)}

    def _per_site(self, schema: TableSchema, sent: Mapping[str, Array]) -> Mapping[str, Norms]:
        p, rows = self.params, schema.max_rows
        size = p.compress.count(len(self.model(schema).weights))
        rounding = size**0.5 * p.compress.step(p.clip) if p.compress.bits else 0.0
        norm = min(p.clip * size**0.5, (p.clip_norm_l2 or np.inf) + rounding)
        return {"weights": within(norm, size) * rows, "loss": touches(1, p.clip) * rows, "weight": touches(1, rows)}

    @handler("train", groups=("weight",), site=_per_site)
    def train(self, site: SiteView, task: Task) -> Reply:
        """At the site: ClientUpdate(k, w) of Algorithm 1, and the mean loss on the way."""
        p, model = self.params, self.model(site.table.schema)
        sent = task.take("weights", model.weights.shape)
        if not len(site.table):
            return Update.zero_like({"weights": sent, "loss": np.zeros(())}).reply()
        examples, weights, losses = model.examples(site.table), sent.copy(), []
        for rows in self._batches(len(examples), task, site):
            loss, gradient = model.loss_and_gradient(weights, examples.take(rows))
            weights -= p.learning_rate * gradient
            losses.append(loss)
        change = p.compress.carried(weights - sent, p.compress.told(task, len(sent)), site.state)
        if p.clip_norm_l2 is not None:
            change *= p.clip_norm_l2 / max(float(np.linalg.norm(change)), p.clip_norm_l2)
        means = {"weights": p.compress.rounded(change, p.clip, task), "loss": np.array(np.mean(losses))}
        return Update.of({name: np.clip(x, -p.clip, p.clip) for name, x in means.items()}, len(examples)).reply()

    def _batches(self, num_rows: int, task: Task, site: SiteView) -> Iterator[Array]:
        p, shuffler, in_epoch = self.params, task.shuffler(), -(-num_rows // self.params.batch_size)
        steps = p.local_steps or p.local_epochs * in_epoch
        for step in range(steps):
            if step % in_epoch == 0:
                order = shuffler.permutation(num_rows)
                site.progress(step, steps)
            yield order[step % in_epoch * p.batch_size :][: p.batch_size]
