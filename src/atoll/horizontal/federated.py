"""What the algorithms of federated averaging's family do alike: who is asked, what travels, the average, checkpoints.

An algorithm derives from :class:`Federated`, mostly by way of ``FedAvg``, and says what its paper adds: ``begin``, the
coordinator's state; ``extras``, what sites send beside the change of the weights; ``local``, a site's round; ``step``,
the coordinator's; ``stays`` and ``mine``, what a site has of its own.

Parties: sites and coordinator. Messages: "weights", and what else an algorithm's coordinator keeps for its sites
(``told``), go out; each round is one Sum of weight · (change of weights, mean loss, ``extras``) and of the weight. The
coordinator learns the weighted means, each site's under ``plain``. Dropout: the round is of the survivors; a site whose
training diverges drops out. Cost: one round trip of the model's size per round and site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.aggregation.rule import MEAN, Aggregation
from atoll.aggregation.suspicion import Evidence
from atoll.compression.downlink import received
from atoll.compression.known import Known
from atoll.compression.link import Link
from atoll.compression.update import Compression
from atoll.contract.capabilities import Capabilities
from atoll.contract.disclosure import check_groups
from atoll.contract.errors import PlanError, PolicyError, refuse_all
from atoll.contract.program import Cohort, SiteView, handler
from atoll.contract.rounds import (
    Checkpoint,
    Metrics,
    Reply,
    Round,
    Steps,
    Sum,
    Task,
)
from atoll.contract.rounds import Field as Declared
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms
from atoll.contract.updates import Update
from atoll.contract.wire import Array
from atoll.horizontal.alone import Alone
from atoll.horizontal.factored import Collecting as Collecting
from atoll.horizontal.factored import Factored
from atoll.horizontal.factored import State as State
from atoll.horizontal.local import Kept, Local, LocalParams, layers_of, still
from atoll.horizontal.payload import Payload, narrowed
from atoll.horizontal.personal import Personal
from atoll.horizontal.single import Single
from atoll.horizontal.stopping import LOSS, Stop, Watch
from atoll.models.linear import named
from atoll.models.model import Model
from atoll.statistics.evaluation import scored

OFFERS = {"bounded", "resolution", "bounded-weight"}


class FederatedParams(LocalParams):
    """decay: the learning rate of round t is learning_rate / (1 + decay · t). sites_per_round: how many are drawn for
    each round (default: all). weighting: by "rows", or every site alike. aggregate: how the sites' changes become one.
    clip: a site's change of any one weight per round is clipped to it (this is the bound); clip_norm_l2: and the
    change as a whole to this norm. evaluate_every: score on held-out rows after so many rounds. alone: in the end, ask
    what each site would have by itself (see ``horizontal/alone.py``). stop: when to end before the last round. keep:
    whose weights become the model: the last round's, or those whose evaluation was best, by ``stop.metric`` if that is
    evaluated."""

    rounds: int = Field(default=20, ge=1)
    decay: float = Field(default=0.0, ge=0)
    sites_per_round: int | None = Field(default=None, ge=1)
    weighting: Literal["rows", "sites"] = "rows"
    clip: float = Field(default=10.0, gt=0)
    clip_norm_l2: float | None = Field(default=None, gt=0)
    compress: Compression = Compression()
    aggregate: Aggregation = Aggregation()
    evaluate_every: int | None = Field(default=None, ge=1)
    checkpoint_every: int = Field(default=10, ge=1)
    alone: bool = False
    stop: Stop = Stop()
    keep: Literal["last", "best"] = "last"

    def scaled(self, change: Array) -> Array:
        """A change of the weights within ``clip_norm_l2``."""
        if self.clip_norm_l2 is not None:
            change = change * (self.clip_norm_l2 / max(float(np.linalg.norm(change)), self.clip_norm_l2))
        return change

    def bounded(self, change: Array) -> Array:
        """A change of the weights as it may leave a site."""
        return np.clip(self.scaled(change), -self.clip, self.clip)


class Federated(Alone, Factored, Personal, Single):
    """See the module's docstring. told: the names of what is sent to sites of the coordinator's state, each as long as
    "weights". personal: does each site end with a model of its own? gaps: may a round find no rows at all? stateful:
    does what a site sends follow from what it learned in earlier rounds?"""

    declared: ClassVar[Capabilities]
    told: ClassVar[tuple[str, ...]] = ("weights",)
    gaps: ClassVar[bool] = False
    stateful: ClassVar[bool] = False

    def __init__(self, params: Any) -> None:
        self.params, self._kept = params, Kept(params)
        self._payload: Payload | None = None

    @property
    def capabilities(self) -> Capabilities:
        """Sums are enough for the mean, and for rules over groups of sites, unless every reply is compressed alone."""
        needs = {"gather"} if self.params.aggregate.single or self.params.compress.alone else {"sum"}
        return replace(self.declared, needs=self.declared.needs - {"sum"} | needs)

    @property
    def remembers(self) -> bool:
        """Does what a site sends follow from earlier rounds' questions, which may have been others at other sites?"""
        return bool(self.stateful or self.params.compress.keeps)

    @property
    def narrows(self) -> bool:
        """Do the bounds of its rounds follow from what sums said before? Sites keep to them by themselves, too."""
        return bool(self.params.compress.grid == "told")

    def model(self, schema: TableSchema) -> Model:
        """The model it fits, before any fitting; what evaluation is then asked about."""
        return self._kept.model(schema)

    # -- what an algorithm says

    def size(self, model: Model) -> int:
        """How long "weights" is, and all that is ``told``."""
        return len(model.weights)

    def begin(self, model: Model, cohort: Cohort) -> State:
        """The coordinator's state before the first round."""
        return {"weights": model.initial(cohort.seed)}

    def extras(self, model: Model) -> Mapping[str, tuple[tuple[int, ...], float]]:
        """What a site sends beside the change of "weights" and its "loss": shape, and bound of each element. What it
        sends of something ``told`` is of the weights that travel, [:meth:`_moving`], and the mean of it is [size]."""
        return {}

    def stays(self, model: Model) -> NDArray[np.bool_]:
        """Weights that sites learn and do not send, [size]."""
        return np.zeros(self.size(model), bool)

    def local(self, at: Local, sent: State) -> Mapping[str, Any]:
        """A site's round: {"weights": its change [size], "loss": …, extras}, before weighting."""
        raise NotImplementedError

    def step(self, state: State, mean: Mapping[str, Array], share: float) -> None:
        """The coordinator's round. mean: the weighted mean of what sites sent, zero where nothing travels, and their
        summed "weight"; share: of the cohort that is in it."""
        raise NotImplementedError

    # -- at the coordinator

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"model", "history": mean local loss by round, and a linear model's "coefficients"}."""
        model, p, payload = self.model(cohort.schema), self.params, self.payload(cohort.schema)
        refuse_all(PlanError, "plan.refused", p.compress.conflicts(p.aggregate.rule, p.aggregate.groups is not None))
        state = dict(start) if start else self.begin(model, cohort)
        history = state.pop("history", np.empty(0)).tolist()
        moving, first = payload.moving, self._all(model, state)
        known = Known(len(moving), cohort.seed).resumed(state)
        link = self.link = Link(p.compress, first, cohort.seed, cohort.sites, payload.factors).resumed(state)
        self.evidence = Evidence(cohort.sites, cohort.seed, p.aggregate.single, not p.compress.common).resumed(state)
        watch = self._watch(model).resumed(state)
        fields, used_up = payload.fields(cohort.exact), None
        for number in range(len(history), p.rounds):
            support = p.compress.support(known, cohort.seed, number)
            sent = {**self._told(model, state, number), **p.compress.telling(known, p.clip, cohort.seed, number)}
            wanted = narrowed(fields, p.compress.reach(known, p.clip) / p.clip)
            update, sites = yield from self.collect(cohort, wanted, sent, number, state)
            link.answered(sites, payload.size)
            certain = cohort.exact and not self.gaps and p.sites_per_round is None  # that somebody has rows
            some = update if certain else replace(update, weight=max(update.weight, 1.0))
            mean = {**some.mean(), "weight": np.array(update.weight)}
            known.note(support, mean["weights"], number)
            for name in mean.keys() & {"weights", *self.told}:
                spread = np.zeros(self.size(model))
                spread[moving[support] if name == "weights" else moving] = mean[name]
                mean[name] = spread
            self.step(state, mean, len(sites) / len(cohort.sites))
            history.append(float(mean["loss"]))
            used_up = yield Metrics(number, {"loss": history[-1], **self.watched(model, state)})
            over, done = watch.enough({LOSS: history[-1]}, number), number + 1
            if p.evaluate_every and done % p.evaluate_every == 0 and (done < p.rounds or p.keep == "best"):
                yield from self._personalised(model, state, done)
                weights = self.final(model, state).weights
                found = yield from scored(self, cohort, weights, number)
                over = watch.enough(found, number, weights)
            if used_up or (over and used_up is not None):  # None: rounds are only counted
                break
            if done % p.checkpoint_every == 0:
                own = {**known.arrays(p.compress.remembers), **link.arrays(), **self.evidence.arrays()}
                yield Checkpoint({**state, **own, **watch.arrays(), "history": np.array(history)})
        yield from self._personalised(model, state, len(history))
        more = {**self.reported(model, state), **self.evidence.told(), **link.told()}
        more |= watch.told(used_up=bool(used_up))
        more |= yield from self.compared(cohort, len(history))
        model = self.final(model, state)
        model = model.with_weights(watch.weights) if len(watch.weights) else model
        return {"model": model, "history": history, "iterations": len(history), **named(model), **more}

    def _watch(self, model: Model) -> Watch:
        """What ends the run, and which weights are kept; raises PlanError where nothing tells it."""
        p = self.params
        if (p.stop.evaluated or p.keep == "best") and not p.evaluate_every:
            raise PlanError("plan.no-evaluation", "nothing is evaluated on the way", field="params.evaluate_every",
                            remedy="set evaluate_every, or watch the training loss")  # fmt: skip
        if p.keep == "best" and self.personal:
            raise PlanError("plan.keep-personal", "sites keep the models that they ended with", field="params.keep",
                            remedy="choose keep: last")  # fmt: skip
        scored = "log_loss" if model.task in ("binary", "classes") else "rmse"
        return Watch(p.stop, p.keep, scored if p.stop.metric == LOSS else p.stop.metric)

    def fewest(self, num_sites: int) -> int:
        """Those drawn for a round, or a group of them."""
        drawn = min(self.params.sites_per_round or num_sites, num_sites)
        return drawn // (self.params.aggregate.groups or 1)

    def collect(
        self, cohort: Cohort, fields: Mapping[str, Declared], sent: State, number: int, state: State
    ) -> Collecting:
        """One round of the sites' training: (weighted sums of what they send, who is in them)."""
        p, names = self.params, tuple(name for name in fields if name != "weight")
        if p.compress.rank is not None:
            return (yield from self._factored(cohort, fields, sent))
        if p.aggregate.rule == MEAN and not p.compress.alone:
            total = yield Round("train", Sum(), fields, sent, self.link.apart, draw=p.sites_per_round, paced=True)
            return Update.from_sum(total, names), total.sites
        return (yield from self._single(cohort, fields, sent, number))

    def final(self, model: Model, state: State) -> Model:
        """The federation's model after a round."""
        return model.with_weights(state["weights"])

    def watched(self, model: Model, state: State) -> Mapping[str, float]:
        """What is worth showing after a round, beside the loss."""
        return {}

    def reported(self, model: Model, state: State) -> Mapping[str, Any]:
        """What the result holds beside the model; its "arrays" are stored with the model's."""
        return {}

    def _told(self, model: Model, state: State, number: int) -> State:
        """What is sent with round *number*."""
        if self.params.compress.down.active:
            told: State = self.link.sent(self._all(model, state), number)
        else:
            told = {name: state[name].astype(model.dtype) for name in self.told}
        return told | ({"decay": np.array(1 / (1 + self.params.decay * number))} if self.params.decay else {})

    def _all(self, model: Model, state: State) -> Array:
        """All that is ``told``, one after another."""
        return np.concatenate([state[name].astype(model.dtype) for name in self.told])

    # -- declared

    def _moving(self, model: Model) -> NDArray[np.int64]:
        """Places in "weights" that travel, in order."""
        frozen = np.tile(layers_of(model, self.params.freeze), self.size(model) // len(model.weights))
        moving = np.flatnonzero(~frozen & ~self.stays(model))
        if not len(moving):
            raise PlanError(
                "plan.nothing-travels", "no weights are left that sites learn together", field="params.freeze",
                remedy="freeze, or keep at the sites, fewer layers",
            )  # fmt: skip
        return moving

    def payload(self, schema: TableSchema) -> Payload:
        """What a site sends of its round."""
        model, p = self.model(schema), self.params
        if self._payload is None or self._payload.model is not model:  # simulated sites ask for it again and again
            moving, extras, most = self._moving(model), self.extras(model), self._most(schema)
            self._payload = Payload(model, moving, extras, most, p.compress, p.clip, p.clip_norm_l2)
        return self._payload

    def _most(self, schema: TableSchema) -> float:
        """A site's weight in the mean is at most this."""
        return schema.max_rows if self.params.weighting == "rows" else 1.0

    def _per_site(self, schema: TableSchema, sent: Mapping[str, Array]) -> Mapping[str, Norms]:
        return self.payload(schema).norms()

    # -- at a site

    def _at(self, site: SiteView, task: Task) -> tuple[Local, State]:
        model = self.model(site.table.schema)
        sent = self._sent(site, task, model)
        examples, params = self._kept.examples(site.table), self.params
        if params.decay:
            rate = params.learning_rate * float(np.clip(task.take("decay", ()), 0, 1))
            params = params.model_copy(update={"learning_rate": max(rate, np.finfo(float).tiny)})
        if "effort" in task.arrays:
            params = params.paced(float(np.clip(task.take("effort", ()), 0, 1)), len(examples))
        return Local(params, model, examples, site, task, still(model, self.params.freeze)), sent

    def _sent(self, site: SiteView, task: Task, model: Model) -> State:
        """What is ``told``, each [size]."""
        down, size = self.params.compress.down, self.size(model)
        if not down.active:
            return {name: task.take(name, (size,)) for name in self.told}
        total, dtype = size * len(self.told), np.dtype(model.dtype)

        def first(seed: int) -> Array:
            return self._all(model, self.begin(model, Cohort((), site.table.schema, seed)))

        read = received(down, task, site.state, total, dtype, first) if down.changes else down.taken(task, total, dtype)
        return dict(zip(self.told, np.split(read.astype(np.float64), len(self.told)), strict=True))

    @handler("train_single", reduce="gather")
    def train_single(self, site: SiteView, task: Task) -> Reply:
        """As "train", where the plan's rule, or its compression, needs every site's own change."""
        if not (self.params.aggregate.single or self.params.compress.alone):
            raise PolicyError("policy.not-in-plan", "the plan asks for sums only", field="train_single",
                              remedy="the coordinator does not keep the plan: do not go on with it")  # fmt: skip
        return self.train(site, task)

    @handler("train", site=_per_site)
    def train(self, site: SiteView, task: Task) -> Reply:
        """At the site: the change of the weights by its own training, and the mean loss on the way."""
        p, (at, sent) = self.params, self._at(site, task)
        if not len(at.examples):
            payload = self.payload(site.table.schema)
            found = payload.zeros()
            if p.compress.alone:
                found["weights"] = p.compress.nothing(len(payload.moving), task)
            self._counts(site, 0.0)
            return {**found, "weight": 0.0}
        check_groups({"weight": np.array(len(at.examples))}, frozenset({"weight"}), site.min_group_size)
        return self.handed(at, sent, dict(self.local(at, sent)))

    def handed(self, at: Local, sent: State, found: dict[str, Any]) -> Reply:
        """What a site sends of what it *found* in its round (see :meth:`local`)."""
        site, payload = at.site, self.payload(at.site.table.schema)
        change = np.asarray(found["weights"], np.float64)[payload.moving]
        found["weights"], message = self._compressed(at, change)
        means = {name: np.clip(found[name], -bound, bound) for name, (_, bound) in payload.shapes.items()}
        weight = self.weight(at, sent, means)
        self._counts(site, weight)
        reply = Update.of(means, weight).reply()
        return reply if message is None else {**reply, "weights": message}

    def _compressed(self, at: Local, change: Array) -> tuple[Array, Array | None]:
        """(what of a site's *change* [of the weights that travel] leaves, and as a message, if it stands alone)."""
        p, compress, state = self.params, self.params.compress, at.site.state
        whole, message = compress.carried(change, state), None
        if compress.rank is not None:
            return self._left(at, p.scaled(whole)), None
        reach = compress.reached(at.task, p.clip)
        places = compress.told(at.task, len(whole)) if compress.common else np.arange(len(whole))
        chosen = compress.chosen(whole[places])
        part = p.scaled(whole[places[chosen]])
        sent = np.clip(part, -reach, reach)
        if compress.alone:
            message, sent = compress.written(sent, chosen, len(places), at.task)
        else:
            sent = compress.rounded(sent, reach, at.task)
        whole[places[chosen]] = part - sent
        compress.kept(whole, state, at.model.dtype)
        return sent, message

    def weight(self, at: Local, sent: State, means: Mapping[str, Array]) -> float:
        """How much the site's change counts, at most :meth:`_most`."""
        return float(len(at.examples)) if self.params.weighting == "rows" else 1.0
