"""FedMD: each site has a model of its own architecture; what travels is what they say of rows that everybody may see.

Source: Li & Wang 2019, FedMD: Heterogenous Federated Learning via Model Distillation, Algorithm 1. A round is its
Distribute, Digest, Revisit and Communicate in one message each way: a site's model takes ``distil_steps`` steps towards
the consensus of the round before, learns from the site's own rows, and is asked about the public ones. The first round
is its "transfer learning": from the labels of the public rows, where the plan gives them, and then from the site's own.
Class scores are told as log-odds or log-probabilities, and digested by cross-entropy, as in FedDF (the paper: by
absolute differences). Sites' models stay at the sites, where evaluation scores them as personal models. Beside them the
coordinator's own model digests every consensus, for sites without rows and for whoever has none: it is the result.

Parties: sites and coordinator. Messages: the last consensus goes out; each round is one Sum of weight · (scores of the
public rows, mean loss) and of the weight. The coordinator learns the weighted means, each site's under ``plain``: no
weights, and so no model, leave a site. Dropout: the consensus is of the survivors; a site that comes back digests the
latest. Cost: one round trip of 8 bytes for each score, whatever the models' sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import numpy as np
from pydantic import Field

from atoll.compression.update import FINE
from atoll.contract.disclosure import check_groups
from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, SiteView, handler, program
from atoll.contract.rounds import Checkpoint, Metrics, Reply, Round, Steps, Sum, Task, count
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms
from atoll.contract.updates import Update
from atoll.contract.wire import Array, Json
from atoll.horizontal.distillation import FAR, DistillationParams, at_coordinator, distilled, scores, taught, width
from atoll.horizontal.federated import OFFERS
from atoll.horizontal.local import Kept, Local, layers_of, still
from atoll.models.linear import named
from atoll.models.model import Model, kept
from atoll.models.rows import Rows
from atoll.statistics.evaluation import scored


class FedMdParams(DistillationParams):
    """models: of sites with another architecture than *model*, by the site's name: {kind: …} and its settings.
    weighting: of a site's scores in the consensus. evaluate_every: score on held-out rows after so many rounds."""

    models: dict[str, dict[str, Json]] = Field(default_factory=dict)
    rounds: int = Field(default=20, ge=1)
    weighting: Literal["rows", "sites"] = "sites"
    evaluate_every: int | None = Field(default=None, ge=1)
    checkpoint_every: int = Field(default=10, ge=1)

    def of(self, site: str) -> Self:
        """The parameters as they are for one site."""
        change = {"model": self.models[site], "family": None, "features": ()} if site in self.models else {}
        return self.model_copy(update=change)

    def architectures(self, rows: Rows) -> dict[str, Model]:
        """Unfitted models by site, that of all other sites as "". Raises PlanError where one does not fit the schema,
        the public rows, what is frozen, or the others."""
        found = {site: self.of(site).unfitted(rows.schema) for site in ("", *self.models)}
        for site, model in found.items():
            model.examples(rows)
            layers_of(model, self.freeze)
            if model.task != found[""].task:
                raise PlanError(
                    "distil.other-task", "the sites' models do not all predict the same", field=f"params.models.{site}",
                    remedy="choose models whose predictions can be averaged",
                )  # fmt: skip
        return found


@program("horizontal.fedmd", needs={"sum"}, offers=OFFERS)
class FedMd:
    """Distillation between sites' models of different architecture, by their predictions on public rows."""

    Params = FedMdParams
    remembers = True
    personal = True

    def __init__(self, params: FedMdParams) -> None:
        self.params = params
        self._kept: dict[str, Kept] = {}

    def model(self, schema: TableSchema) -> Model:
        """The coordinator's, before any fitting."""
        return self.params.unfitted(schema)

    # -- at the coordinator

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"model": the coordinator's, "history": mean local loss by round, a linear one's "coefficients"}."""
        p, schema = self.params, cohort.schema
        rows = p.rows(schema)
        model = p.architectures(rows)[""]
        shape = (len(rows), width(model, rows))
        state = dict(start or {"weights": model.initial(cohort.seed), "scores": np.zeros(shape)})
        history = state.pop("history", np.empty(0)).tolist()
        fields = Update.fields(
            {"scores": np.zeros(shape), "loss": np.zeros(())},
            value_bound=FAR,
            weight_bound=self._most(schema),
            step=FINE,
        )
        for number in range(len(history), p.rounds):
            sent = {"scores": state["scores"], "digest": np.array(float(number > 0))}
            update = Update.from_sum((yield Round("train", Sum(), fields, sent)), ("scores", "loss"))
            if not cohort.exact:
                update = Update(update.values, max(update.weight, 1.0))
            mean = update.mean()
            state["scores"], at = mean["scores"], at_coordinator(p, model, rows, cohort.seed, number)
            state["weights"] = distilled(at, rows, mean["scores"], state["weights"])
            history.append(float(mean["loss"]))
            used_up = yield Metrics(number, {"loss": history[-1]})
            done = number + 1
            if p.evaluate_every and done % p.evaluate_every == 0 and done < p.rounds:
                yield Round("personalise", Sum(), {"sites": count(bound=1)})
                yield from scored(self, cohort, state["weights"], number)
            if used_up:
                break
            if done % p.checkpoint_every == 0:
                yield Checkpoint({**state, "history": np.array(history)})
        yield Round("personalise", Sum(), {"sites": count(bound=1)})
        model = model.with_weights(state["weights"])
        return {"model": model, "history": history, "iterations": len(history), **named(model)}

    def _most(self, schema: TableSchema) -> float:
        return float(schema.max_rows) if self.params.weighting == "rows" else 1.0

    # -- at a site

    def _at(self, site: SiteView, task: Task) -> Local:
        own = self._own(site)
        model = own.model(site.table.schema)
        return Local(own.params, model, own.examples(site.table), site, task, still(model, self.params.freeze))

    def _own(self, site: SiteView) -> Kept:
        """The site's own model and examples, of which every round makes use."""
        return self._kept.setdefault(site.name, Kept(self.params.of(site.name)))

    @handler("train")
    def train(self, site: SiteView, task: Task) -> Reply:
        """At the site: what its own model says of the public rows, and its mean loss, after it digested the consensus
        and learned from the site's rows."""
        at, rows = self._at(site, task), self.params.rows(site.table.schema)
        consensus, digest = task.take("scores", (len(rows), width(at.model, rows))), bool(task.take("digest", ()))
        if not len(at.examples):
            return Update.zero_like({"scores": consensus, "loss": np.zeros(())}).reply()
        check_groups({"weight": np.array(len(at.examples))}, frozenset({"weight"}), site.min_group_size)
        weights = site.state.get("weights")
        if weights is None:
            weights = at.model.initial(int(task.shuffler().integers(2**63)))
            weights = self._transferred(at, rows, weights)
        if digest:
            weights = distilled(at, rows, consensus, weights)
        done = at.sgd(weights)
        site.state["weights"] = np.asarray(done.weights, np.float64)
        found = {
            "scores": scores(at.model.with_weights(site.state["weights"]), rows),
            "loss": np.clip(done.loss, -FAR, FAR),
        }
        return Update.of(found, len(at.examples) if self.params.weighting == "rows" else 1.0).reply()

    def _transferred(self, at: Local, rows: Rows, weights: Array) -> Array:
        """*weights* after learning from the public rows' labels, if there are any."""
        if not set(at.model.targets) <= set(self.params.public or ()):
            return weights
        return taught(at, at.model.examples(rows), weights, part=2)

    def _nothing(self, schema: TableSchema, sent: Mapping[str, Array]) -> Mapping[str, Norms]:
        return {"sites": Norms(0, 0)}

    @handler("personalise", record=_nothing, site=_nothing)
    def personalise(self, site: SiteView, task: Task) -> Reply:
        """At the site: its own model is what evaluation then scores; what leaves is that it is there."""
        if "weights" in site.state:
            model = self._own(site).model(site.table.schema)
            site.personal.update(kept(model.with_weights(site.state["weights"])))
        return {"sites": 1}
