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

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.aggregation.rule import MEAN, Aggregation, Combined
from atoll.compression.update import Compression
from atoll.contract.capabilities import Capabilities
from atoll.contract.disclosure import check_groups
from atoll.contract.errors import PlanError, PolicyError, ProtocolError
from atoll.contract.program import Cohort, SiteView, handler
from atoll.contract.rounds import Checkpoint, Gather, Metrics, Reply, Round, Steps, Sum, Task, Together, count
from atoll.contract.rounds import Field as Declared
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches, within
from atoll.contract.updates import Update
from atoll.contract.wire import Array
from atoll.horizontal.local import Kept, Local, LocalParams, diverged, layers_of, still
from atoll.models.linear import named
from atoll.models.model import Model
from atoll.statistics.evaluation import scored

State = dict[str, Array]
Collecting = Generator[Any, Any, tuple[Update, tuple[str, ...]]]
OFFERS = {"bounded", "resolution", "bounded-weight"}


class FederatedParams(LocalParams):
    """decay: the learning rate of round t is learning_rate / (1 + decay · t). sites_per_round: how many are drawn for
    each round (default: all). weighting: by "rows", or every site alike. aggregate: how the sites' changes become one.
    clip: a site's change of any one weight per round is clipped to it (this is the bound); clip_norm_l2: and the
    change as a whole to this norm. evaluate_every: score on held-out rows after so many rounds."""

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

    def bounded(self, change: Array) -> Array:
        """A change of the weights as it may leave a site."""
        if self.clip_norm_l2 is not None:
            change = change * (self.clip_norm_l2 / max(float(np.linalg.norm(change)), self.clip_norm_l2))
        return np.clip(change, -self.clip, self.clip)


class Federated:
    """See the module's docstring. told: the names of what is sent to sites of the coordinator's state, each as long as
    "weights". personal: does each site end with a model of its own? gaps: may a round find no rows at all?"""

    declared: ClassVar[Capabilities]
    told: ClassVar[tuple[str, ...]] = ("weights",)
    personal: ClassVar[bool] = False
    gaps: ClassVar[bool] = False

    def __init__(self, params: Any) -> None:
        self.params, self._kept = params, Kept(params)

    @property
    def capabilities(self) -> Capabilities:
        """Sums are enough for the mean, and for rules over groups of sites."""
        needs = {"gather"} if self.params.aggregate.single else {"sum"}
        return replace(self.declared, needs=self.declared.needs - {"sum"} | needs)

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

    def mine(self, at: Local, sent: State) -> Array:
        """Of personalised learning: a site's own weights [num_weights], when these were sent last."""
        raise NotImplementedError

    # -- at the coordinator

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"model", "history": mean local loss by round, and a linear model's "coefficients"}."""
        model, p, most = self.model(cohort.schema), self.params, self._most(cohort.schema)
        state = dict(start) if start else self.begin(model, cohort)
        history = state.pop("history", np.empty(0)).tolist()
        moving = self._moving(model)
        last = state.pop("last", np.zeros(len(moving)))
        fields = self._fields(model, most, cohort.exact)
        for number in range(len(history), p.rounds):
            support = p.compress.support(last, cohort.seed, number)
            sent = {**self._told(model, state, number), **({"support": support} if p.compress.keep < 1 else {})}
            update, sites = yield from self.collect(cohort, fields, sent, number)
            certain = cohort.exact and not self.gaps and p.sites_per_round is None  # that somebody has rows
            some = update if certain else replace(update, weight=max(update.weight, 1.0))
            mean = {**some.mean(), "weight": np.array(update.weight)}
            last[support] = mean["weights"]
            for name in mean.keys() & {"weights", *self.told}:
                spread = np.zeros(self.size(model))
                spread[moving[support] if name == "weights" else moving] = mean[name]
                mean[name] = spread
            self.step(state, mean, len(sites) / len(cohort.sites))
            history.append(float(mean["loss"]))
            used_up = yield Metrics(number, {"loss": history[-1], **self.watched(model, state)})
            done = number + 1
            if p.evaluate_every and done % p.evaluate_every == 0 and done < p.rounds:
                yield from self._finish(model, state, done)
                yield from scored(self, cohort, self.final(model, state).weights, number)
            if done % p.checkpoint_every == 0:
                whole = {"last": last} if p.compress.keep < 1 else {}
                yield Checkpoint({**state, **whole, "history": np.array(history)})
            if used_up:
                break
        yield from self._finish(model, state, len(history))
        more, model = self.reported(model, state), self.final(model, state)
        return {"model": model, "history": history, "iterations": len(history), **named(model), **more}

    def fewest(self, num_sites: int) -> int:
        """Those drawn for a round, or a group of them."""
        drawn = min(self.params.sites_per_round or num_sites, num_sites)
        return drawn // (self.params.aggregate.groups or 1)

    def collect(self, cohort: Cohort, fields: Mapping[str, Declared], sent: State, number: int) -> Collecting:
        """One round of the sites' training: (weighted sums of what they send, who is in them)."""
        p, rule = self.params, self.params.aggregate
        names = tuple(name for name in fields if name != "weight")
        if rule.rule == MEAN:
            total = yield Round("train", Sum(), fields, sent, draw=p.sites_per_round, paced=True)
            return Update.from_sum(total, names), total.sites
        if rule.single:
            found = yield Round("train_single", Gather(), fields, sent, draw=p.sites_per_round, paced=True)
            told = [(site, Update.from_sum(found[site], names)) for site in found.sites]
        else:
            groups = self._groups(cohort, number)
            sums = yield Together(
                tuple(Round("train", Sum(), fields, sent, sites=group, among=True) for group in groups)
            )
            told = [(" + ".join(one.sites), Update.from_sum(one, names)) for one in sums]
        some = [(name, update) for name, update in told if update.weight > 0]
        means = [update.mean() for _, update in some]
        weights = np.array([update.weight for _, update in some])
        updates = {name: np.stack([mean[name] for mean in means]) for name in names}
        combined = rule.combine(updates, weights, [name for name, _ in some])
        weight = float(np.median(weights)) * len(weights)  # what sites say of themselves is not to be trusted
        values = {name: value * weight for name, value in combined.values.items()}
        self.judged(cohort, number, [name for name, _ in some], updates, weights, combined)
        return Update(values, weight), tuple(name for name, _ in some)

    def judged(
        self, cohort: Cohort, number: int, names: Sequence[str], updates: Mapping[str, Array], weights: Array,
        combined: Combined,
    ) -> None:  # fmt: skip
        """Take note of a round in which single updates, or those of groups, were seen."""

    def _groups(self, cohort: Cohort, number: int) -> list[tuple[str, ...]]:
        """The sites of a round in groups of nearly the same size, drawn by the plan's seed."""
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((cohort.seed, number, 4))))
        order, wanted = random.permutation(len(cohort.sites)), self.params.aggregate.groups or 1
        drawn = [np.sort(part) for part in np.array_split(order[: self.params.sites_per_round], wanted)]
        return [tuple(cohort.sites[place] for place in part) for part in drawn if len(part)]

    def final(self, model: Model, state: State) -> Model:
        """The federation's model after a round."""
        return model.with_weights(state["weights"])

    def watched(self, model: Model, state: State) -> Mapping[str, float]:
        """What is worth showing after a round, beside the loss."""
        return {}

    def reported(self, model: Model, state: State) -> Mapping[str, Any]:
        """What the result holds beside the model; its "arrays" are stored with the model's."""
        return {}

    def _finish(self, model: Model, state: State, number: int) -> Steps:
        if self.personal:
            yield Round("personalise", Sum(), {"sites": count(bound=1)}, self._told(model, state, number))

    def _told(self, model: Model, state: State, number: int) -> State:
        """What is sent with round *number*."""
        told = {name: state[name].astype(model.dtype) for name in self.told}
        return told | ({"decay": np.array(1 / (1 + self.params.decay * number))} if self.params.decay else {})

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

    def _shapes(self, model: Model) -> dict[str, tuple[tuple[int, ...], float]]:
        sent = self.params.compress.count(len(self._moving(model)))
        return {"weights": ((sent,), self.params.clip), "loss": ((), self.params.clip), **self.extras(model)}

    def _most(self, schema: TableSchema) -> float:
        return schema.max_rows if self.params.weighting == "rows" else 1.0

    def _fields(self, model: Model, most: float, exact: bool) -> dict[str, Declared]:
        found: dict[str, Declared] = {}
        for name, (shape, bound) in self._shapes(model).items():
            step = self.params.compress.step(bound)
            made = Update.fields({name: np.zeros(shape)}, value_bound=bound, weight_bound=most, step=step)
            if exact and shape and model.dtype == np.float32:  # no more is known of a network's change
                made[name] = replace(made[name], dtype="<f4")
            found |= made
        return found

    def _per_site(self, schema: TableSchema, sent: Mapping[str, Array]) -> Mapping[str, Norms]:
        p, most = self.params, self._most(schema)
        shapes = self._shapes(self.model(schema))
        found = {name: touches(int(np.prod(shape)), bound) * most for name, (shape, bound) in shapes.items()}
        size = shapes["weights"][0][0]
        rounding = size**0.5 * p.compress.step(p.clip) if p.compress.bits else 0.0
        norm = min(p.clip * size**0.5, (p.clip_norm_l2 or np.inf) + rounding)
        return {**found, "weights": within(norm, size) * most, "weight": touches(1, most)}

    # -- at a site

    def _at(self, site: SiteView, task: Task) -> tuple[Local, State]:
        model = self.model(site.table.schema)
        sent = {name: task.take(name, (self.size(model),)) for name in self.told}
        examples, params = self._kept.examples(site.table), self.params
        if params.decay:
            rate = params.learning_rate * float(np.clip(task.take("decay", ()), 0, 1))
            params = params.model_copy(update={"learning_rate": max(rate, np.finfo(float).tiny)})
        if "effort" in task.arrays:
            params = params.paced(float(np.clip(task.take("effort", ()), 0, 1)), len(examples))
        return Local(params, model, examples, site, task, still(model, self.params.freeze)), sent

    @handler("train_single", reduce="gather")
    def train_single(self, site: SiteView, task: Task) -> Reply:
        """As "train", where the plan's rule needs every site's own change."""
        if not self.params.aggregate.single:
            raise PolicyError("policy.not-in-plan", "the plan asks for sums only", field="train_single",
                              remedy="the coordinator does not keep the plan: do not go on with it")  # fmt: skip
        return self.train(site, task)

    @handler("train", site=_per_site)
    def train(self, site: SiteView, task: Task) -> Reply:
        """At the site: the change of the weights by its own training, and the mean loss on the way."""
        p, (at, sent) = self.params, self._at(site, task)
        shapes = self._shapes(at.model)
        if not len(at.examples):
            return Update.zero_like({name: np.zeros(shape) for name, (shape, _) in shapes.items()}).reply()
        check_groups({"weight": np.array(len(at.examples))}, frozenset({"weight"}), site.min_group_size)
        moving, found = self._moving(at.model), dict(self.local(at, sent))
        support = p.compress.told(task, len(moving)) if p.compress.keep < 1 else slice(None)
        change = p.compress.carried(np.asarray(found["weights"], np.float64)[moving], support, site.state)
        found["weights"] = p.compress.rounded(p.bounded(change), p.clip, task)
        means = {name: np.clip(found[name], -bound, bound) for name, (_, bound) in shapes.items()}
        return Update.of(means, self.weight(at, sent, means)).reply()

    def weight(self, at: Local, sent: State, means: Mapping[str, Array]) -> float:
        """How much the site's change counts, at most :meth:`_most`."""
        return float(len(at.examples)) if self.params.weighting == "rows" else 1.0

    def _nothing(self, schema: TableSchema, sent: Mapping[str, Array]) -> Mapping[str, Norms]:
        return {"sites": Norms(0, 0)}

    @handler("personalise", record=_nothing, site=_nothing)
    def personalise(self, site: SiteView, task: Task) -> Reply:
        """At the site: it keeps a model of its own; what leaves is that it did."""
        at, sent = self._at(site, task)
        self._once_more(site)
        try:
            own = self.mine(at, sent) if len(at.examples) else None
        except ProtocolError as error:
            if error.code != diverged().code:
                raise
            own = None
        if own is None or not np.isfinite(own).all():  # what was sent is better than no model
            own = sent["weights"][: len(at.model.weights)]
        site.personal["weights"] = np.asarray(own, np.float64)
        return {"sites": 1}

    def _once_more(self, site: SiteView) -> None:
        """Raise PolicyError if the site made its model as often as the plan says: what it scores would tell of it."""
        asked, p = int(site.state.get("personalised", 0)), self.params
        if asked > ((p.rounds - 1) // p.evaluate_every if p.evaluate_every else 0):
            raise PolicyError(
                "policy.not-in-plan", "the plan does not lead to another personalised model", field="personalise",
                remedy="the coordinator does not keep the plan: do not go on with it",
            )  # fmt: skip
        site.state["personalised"] = np.array(asked + 1)
