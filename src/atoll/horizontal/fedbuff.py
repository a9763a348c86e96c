"""FedBuff: sites train at their own pace, and the coordinator moves whenever so many of them have a change ready.

Source: Nguyen et al. 2022, Federated Learning with Buffered Asynchronous Aggregation (AISTATS), Algorithms 1 and 2:
w ← w + η_g · Σₖ nₖ·s(τₖ)·Δₖ / Σₖ nₖ over a buffer of K changes, with s(τ) = 1 / √(1 + τ) by default, τ being by how
many such steps w moved since site k was sent it. With a buffer of all sites and η_g = 1 it is FedAvg.

Parties: sites and coordinator. Messages: "begin" sends the weights to sites that have nothing to do; each says when it
is ready, and nothing else. As soon as K are, "hand_in" is one Sum among exactly these, as in FedAvg, of changes to
which the sites themselves apply s(τ): single changes stay hidden under every protection of sums. What the coordinator
learns: who was ready when, and the mean of each buffer (each site's change under ``plain``). Threat model: a curious
coordinator; an active one could begin sites with other weights, or make all but one too old to count, so plans with
``adversary: active`` are refused without ``privacy``. A site forgets a change that it handed in: nothing of it leaves
twice. Dropout: of a site that trains: it is asked again when it comes back, and what it does then is as old as it is;
of one that is ready: the sum is of the others, and it begins anew.
Cost: one round trip of the model's size per site and change, and two short ones. Differential privacy (unit site):
there are as many sums as steps, each among K sites of which at least the cohort's ``min_sites`` are left, and shares of
the noise are of so many. Who is in which sum is decided on the way, so each site is charged as if it were in all up to
the one that it answers. That it was ready, and when, is told without noise: as of any answer, its time is no secret.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field, field_validator

from atoll.aggregation.optimizers import move, started
from atoll.aggregation.rule import MEAN, Aggregation
from atoll.aggregation.staleness import Staleness
from atoll.compression.update import Compression
from atoll.contract.disclosure import check_groups
from atoll.contract.errors import ProtocolError
from atoll.contract.program import Cohort, SiteView, handler, program
from atoll.contract.rounds import Field as Declared
from atoll.contract.rounds import Ready, Reply, Round, Sum, Task, not_taken
from atoll.contract.updates import Update
from atoll.contract.wire import Array
from atoll.horizontal.fedavg import FedAvg
from atoll.horizontal.federated import OFFERS, Collecting, FederatedParams, State
from atoll.horizontal.local import Local, still
from atoll.models.model import Model

READY = "ready "
"""Under such names a site keeps what it found in its round, until it hands it in."""


class AsyncParams(FederatedParams):
    """rounds: steps of the coordinator. sites_per_round: how many sites train at the same time. staleness: how much an
    old change counts."""

    staleness: Staleness = Staleness()

    @field_validator("aggregate")
    @classmethod
    def _mean(cls, aggregate: Aggregation) -> Aggregation:
        if aggregate.rule != MEAN:
            raise ValueError("changes that come one by one, or in buffers, are averaged: choose the rule mean")
        return aggregate

    @field_validator("compress")
    @classmethod
    def _alike(cls, compress: Compression) -> Compression:
        if compress.alone or compress.rank is not None or compress.down.active:
            raise ValueError("of changes of several ages only keep (not choose: own) and bits are understood")
        return compress


class FedBuffParams(AsyncParams):
    """buffer: K, how many changes make a step (default: those of more than half of the sites that train at the same
    time). server_learning_rate: η_g."""

    buffer: int | None = Field(default=None, ge=1)
    server_learning_rate: float = Field(default=1.0, gt=0)

    def wanted(self, num_sites: int) -> int:
        """K, of a cohort of so many."""
        training = min(self.sites_per_round or num_sites, num_sites)
        return min(self.buffer or training // 2 + 1, training)


def sent_out(cohort: Cohort, state: State, number: int, most: int | None) -> tuple[str, ...]:
    """Who of the sites that have nothing to do trains next, so that at most so many (default: all) do at a time. Keeps
    "idle" [num_sites], 1 for those."""
    idle = np.flatnonzero(state["idle"])
    room = (most or len(cohort.sites)) - (len(cohort.sites) - len(idle))
    if room < len(idle):
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((cohort.seed, number, 5))))
        idle = np.sort(random.choice(idle, max(room, 0), replace=False))
    state["idle"] = state["idle"].copy()
    state["idle"][idle] = 0
    return tuple(cohort.sites[place] for place in idle)


def came_back(cohort: Cohort, state: State, sites: Sequence[str]) -> None:
    """These have nothing to do again; raises ProtocolError if one of them had nothing to do before."""
    places = [cohort.sites.index(site) for site in sites]
    if state["idle"][places].any() or len(set(places)) < len(places):
        raise ProtocolError("async.twice", "a site answered that was not asked", field=", ".join(sites))
    state["idle"][places] = 1


@program("horizontal.fedbuff", needs={"sum", "ready"}, offers=OFFERS)
class FedBuff(FedAvg):
    """Buffered asynchronous FedAvg: slow sites hold nobody up."""

    Params = FedBuffParams
    gaps: ClassVar[bool] = True

    # -- at the coordinator

    def begin(self, model: Model, cohort: Cohort) -> State:
        """Nobody has anything to do."""
        return {**started(model.initial(cohort.seed), model.running), "idle": np.ones(len(cohort.sites), np.int64)}

    def fewest(self, num_sites: int) -> int:
        """A buffer."""
        return int(self.params.wanted(num_sites))

    def collect(
        self, cohort: Cohort, fields: Mapping[str, Declared], sent: State, number: int, state: State
    ) -> Collecting:
        """Algorithm 1: wait for a full buffer, and have it handed in."""
        p, version, ready = self.params, {"version": np.array(float(number))}, list[str]()
        asked = sent_out(cohort, state, number, p.sites_per_round)
        begun = {name: value for name, value in sent.items() if name in (*self.told, "decay")}
        while len(ready) < p.wanted(len(cohort.sites)):
            arrival = yield Round("begin", Ready(), {}, begun | version, sites=asked)
            ready.append(arrival.site)
            came_back(cohort, state, ready[-1:])
            asked = ()
        places = {name: value for name, value in sent.items() if name not in begun}
        sites = tuple(site for site in cohort.sites if site in ready)
        total = yield Round("hand_in", Sum(), fields, places | version, sites=sites, among=True)
        return Update.from_sum(total, tuple(name for name in fields if name != "weight")), total.sites

    def step(self, state: State, mean: Mapping[str, Array], share: float) -> None:
        """w ← w + η_g · Δ."""
        move(state, self.params.server_learning_rate * mean["weights"], mean["weights"])

    # -- at a site

    @handler("begin", reduce="ready")
    def train_ahead(self, site: SiteView, task: Task) -> Reply:
        """Algorithm 2: train from the weights that were sent, and keep what comes of it."""
        at, sent = self._at(site, task)
        forget(site.state)
        if len(at.examples):
            check_groups({"weight": np.array(len(at.examples))}, frozenset({"weight"}), site.min_group_size)
            site.state.update({READY + name: np.asarray(value) for name, value in self.local(at, sent).items()})
        site.state["begun"] = np.array(self._version(task))
        return {}

    def _version(self, task: Task) -> float:
        """The coordinator's step, as it is told; raises ProtocolError for one that the plan does not lead to."""
        version = float(task.take("version", ()))
        if not (0 <= version < self.params.rounds and version.is_integer()):
            raise not_taken("version")
        return version

    @handler("hand_in", site=FedAvg._per_site)
    def hand_in(self, site: SiteView, task: Task) -> Reply:
        """What came of it, by its age; and nothing of it is kept."""
        if "begun" not in site.state:
            raise ProtocolError(
                "async.nothing-ready", "a change is asked for that was handed in, or never begun", field="hand_in",
                remedy="the coordinator does not keep the protocol: do not go on with it",
            )  # fmt: skip
        age = max(self._version(task) - float(site.state["begun"]), 0.0)
        found = {n.removeprefix(READY): value for n, value in site.state.items() if n.startswith(READY)}
        forget(site.state)
        model, examples = self.model(site.table.schema), self._kept.examples(site.table)
        scale = self.params.staleness.of(age)
        if not found or not scale:
            return Update.zero_like(self.payload(site.table.schema).zeros()).reply()
        at = Local(self.params, model, examples, site, task, still(model, self.params.freeze))
        return self.handed(at, {}, {**found, "weights": found["weights"] * scale})


def forget(state: State) -> None:
    """Nothing is ready."""
    for name in [name for name in state if name == "begun" or name.startswith(READY)]:
        del state[name]
