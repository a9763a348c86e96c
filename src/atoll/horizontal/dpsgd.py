"""DP-SGD over sites: every round is one sum of clipped per-example gradients over a Poisson sample.

Sources: Abadi et al. 2016, Deep Learning with Differential Privacy (CCS), Algorithm 1; Andrew, Thakkar, McMahan &
Ramaswamy 2021, Differentially Private Learning with Adaptive Clipping (NeurIPS). As in the first, with the lot drawn
at the sites: a row is in it with probability ``sampling_rate``, whoever else is, so that the sample of the cohort is
a Poisson sample of the pooled rows, and the accounting is that of the subsampled Gaussian mechanism.

Parties: sites and coordinator. Messages: the weights go out; each round is one Sum of Σ clip(∇ℓ). The coordinator
learns that sum, with the plan's noise (each site's under ``plain``); nothing else leaves: no loss, no size of a
sample, no number of rows. Who is in a sample is drawn from the site's own secret; a sampling that the
coordinator knew would not amplify privacy. Noise is added by the site's gate, from the norm declared here.
Threat model: the protection's, for what is seen of a sum; the noise's, for what a sum tells. Dropout: the sum is
that of the survivors, divided as ever: a shorter step. Cost: one round trip of the model's size per round and site.

The divisor is public: ``sampling_rate · expected_rows``, with ``expected_rows`` the size of the cohort's training
rows as its operators state it (or as a study of counts has told). Were it counted, it would cost budget in
every run; wrong by some per cent, it changes the learning rate by as much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from pydantic import Field

from atoll.contract.errors import DisclosureError
from atoll.contract.program import Cohort, SiteView, handler, program
from atoll.contract.rounds import Checkpoint, Metrics, Reply, Round, Steps, Sum, Task, not_taken, real
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, within
from atoll.contract.wire import Array
from atoll.models.linear import named
from atoll.models.model import LearnerParams, Model, by_row
from atoll.privacy.dp.clipping import QuantileClip

VOTES = 0.02
"""The clip's own share of the budget, where it moves (Andrew et al. 2021: about the same)."""
PIECE = 1024
"""Rows of a sample whose gradients are added before progress is told."""


@program("horizontal.dpsgd", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class DpSgd:
    """Stochastic gradient descent with clipped per-example gradients, for differential privacy of records."""

    class Params(LearnerParams):
        """sampling_rate: the probability of each row to be in a round. expected_rows: of all sites together, public.
        clip_norm_l2: of one row's gradient; at first, where *clip_quantile* is set: then it moves towards the
        norm that this share of rows stays below. decay: the learning rate of round t is
        learning_rate / (1 + decay · t)."""

        expected_rows: int = Field(ge=1)
        rounds: int = Field(default=100, ge=1)
        sampling_rate: float = Field(default=0.05, gt=0, le=1)
        clip_norm_l2: float = Field(default=1.0, gt=0)
        clip_quantile: float | None = Field(default=None, gt=0, lt=1)
        learning_rate: float = Field(default=0.5, gt=0)
        decay: float = Field(default=0.0, ge=0)
        momentum: float = Field(default=0.0, ge=0, lt=1)
        checkpoint_every: int = Field(default=50, ge=1)

    def __init__(self, params: Params) -> None:
        self.params = params
        self.sampling_rate = params.sampling_rate
        """For the accountant: every round is of a Poisson sample at this rate."""

    def model(self, schema: TableSchema) -> Model:
        """The model it fits, before any fitting; what evaluation is then asked about."""
        return by_row(self.params.unfitted(schema))

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"model", "history": norm of the mean gradient by round, and a linear model's "coefficients"}."""
        model, p = self.model(cohort.schema), self.params
        weights = start["weights"] if start else model.initial(cohort.seed)
        velocity = start["velocity"] if start else np.zeros_like(weights)
        history = start["history"].tolist() if start else []
        clip = QuantileClip(float(start["clip"]) if start else p.clip_norm_l2, p.clip_quantile or 0.5)
        units, most = p.sampling_rate * p.expected_rows, self._most(cohort.schema)
        for number in range(len(history), p.rounds):
            fields = {"gradient": real(len(weights), bound=clip.norm * most, step=clip.norm / 2**20)}
            if p.clip_quantile is not None:
                fields["votes"] = real(bound=most / 2, step=0.5)
            total = yield Round("gradient", Sum(), fields, {"weights": weights, "clip": np.array(clip.norm)})
            mean = total["gradient"] / units
            if p.clip_quantile is not None:
                clip = clip.updated(float(total["votes"]), units)
            velocity = p.momentum * velocity + mean
            weights = weights - p.learning_rate / (1 + p.decay * number) * velocity
            history.append(float(np.linalg.norm(mean)))
            used_up = yield Metrics(number, {"gradient_norm_l2": history[-1]})
            if used_up:
                break
            if (number + 1) % p.checkpoint_every == 0:
                state = {"weights": weights, "velocity": velocity, "history": np.array(history)}
                yield Checkpoint({**state, "clip": np.array(clip.norm)})
        model = model.with_weights(weights)
        return {"model": model, "history": history, "iterations": len(history), **named(model)}

    def _most(self, schema: TableSchema) -> float:
        """A sample's size, but once in 10²⁰; the gate clips to it. That moves two sums no further apart, so a record's
        norm still holds."""
        expected = self.params.sampling_rate * schema.max_rows
        return min(float(schema.max_rows), expected + 10 * math.sqrt(expected) + 50)

    def _per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        norms = {"gradient": within(float(sent["clip"]), len(self.model(schema).weights))}
        return norms if self.params.clip_quantile is None else {**norms, "votes": Norms(0.5, 0.5, VOTES)}

    @handler("gradient", record=_per_record)
    def gradient(self, site: SiteView, task: Task) -> Reply:
        """At the site: Σ of the gradients of a Poisson sample's rows, each clipped to the norm."""
        p, model = self.params, self.model(site.table.schema)
        weights, total = task.take("weights", model.weights.shape), np.zeros(model.weights.shape)
        clip, within_clip = float(task.take("clip", ())), 0.0
        if clip <= 0:
            raise not_taken("clip")
        sample = poisson_sample(len(site.table), p.sampling_rate, task)
        if 0 < len(sample) < site.min_group_size:
            raise DisclosureError(
                "disclosure.small-group", "others would see the gradient of too few people", field="gradient",
                remedy="use a protection that shows only sums, or a higher sampling_rate",
            )  # fmt: skip
        if not len(sample):
            return self._told(total, 0.0)
        examples = model.examples(site.table)
        site.progress(0, 1)  # once: how far would tell the sample's size
        for first in range(0, len(sample), PIECE):
            batch = examples.take(sample[first : first + PIECE])
            gradient, clipped, _ = model.clipped_gradient_sum(weights, batch, clip)
            total += gradient
            within_clip += len(batch) / 2 - clipped  # ±1/2 a row
        return self._told(total, within_clip)

    def _told(self, total: Array, votes: float) -> Reply:
        return {"gradient": total} if self.params.clip_quantile is None else {"gradient": total, "votes": votes}


def poisson_sample(num_rows: int, rate: float, task: Task) -> Array:
    """The rows of a sample, in order: each with probability *rate* (to 2⁻⁶⁴, never more), by the site's secret."""
    drawn = np.frombuffer(task.secret("poisson sample").bytes(8 * num_rows), "<u8")
    limit = int(rate * 2**64)
    return np.flatnonzero(drawn < np.uint64(limit)) if limit < 2**64 else np.arange(num_rows)
