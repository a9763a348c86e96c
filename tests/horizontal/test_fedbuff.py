"""FedBuff: FedAvg when the buffer is everybody's, else a simulation written a second time; who drops out or dies."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from atoll.aggregation.staleness import Staleness
from atoll.contract.errors import PlanError, ProtocolError
from atoll.contract.program import Cohort, build, handler_of
from atoll.contract.rounds import Arrival, Round
from atoll.contract.wire import Message, decode
from atoll.runtime.budget import Budget
from atoll.runtime.noise import noise_of
from atoll.transport.base import Endpoint, Progress

SIZES = (40, 25, 33, 20, 28)
SITES = tuple(f"s{i}" for i in range(len(SIZES)))


class Died(BaseException):
    """Stands for the process being killed: nothing catches it."""


def die_when(test: Callable[[dict[str, Any]], bool]) -> Callable[[dict[str, Any]], None]:
    def listen(event: dict[str, Any]) -> None:
        if test(event):
            raise Died

    return listen


# ---------------------------------------------------------------- written a second time


class Second:
    """The algorithm in plain numpy: what was asked of whom in which round, and who answered, are given."""

    def __init__(self, study: Any, params: dict[str, Any]) -> None:
        self.study, self.p = study, params
        self.w, self.version = np.zeros(3), 0
        self.ready: dict[str, tuple[Any, int]] = {}

    def began(self, number: int, sites: Sequence[str]) -> None:
        for site in sites:
            size = self.p.get("batch_size", 1000)
            batches = self.study.batches(site, number, size, self.p.get("local_epochs", 1))
            moved = self.study.sgd(site, self.w, batches, self.p["learning_rate"]) - self.w
            self.ready[site] = (moved, self.version)

    def handed(self, sites: Sequence[str], most: int | None = None) -> None:
        total, rows = np.zeros(3), 0
        for site in sites:
            change, version = self.ready.pop(site)
            age = self.version - version
            if most is None or age <= most:
                total = total + len(self.study.y[site]) * change / np.sqrt(1 + age)
                rows += len(self.study.y[site])
        self.w = self.w + self.p.get("server_learning_rate", 1.0) * total / max(rows, 1)
        self.version += 1

    def of(self, rounds: Sequence[tuple[int, str, Sequence[str]]]) -> Any:
        """The weights in the end, of (number, handler, sites asked, or in the sum) of all rounds."""
        for number, name, sites in rounds:
            if name == "begin":
                self.began(number, sites)
            elif name == "hand_in":
                self.handed(sites)
        return self.w


def asked_of(driven: Any) -> list[tuple[int, str, Sequence[str]]]:
    return [(n, item.name, item.sites or ()) for n, item in enumerate(driven.rounds)]


def params_of(study: Any, **more: Any) -> dict[str, Any]:
    return study.params(rounds=7, learning_rate=0.2, **more)


def shuffled(seed: int = 2) -> Callable[[Sequence[Arrival]], int]:
    random = np.random.default_rng(seed)
    return lambda flying: int(random.integers(len(flying)))


@pytest.mark.parametrize("more", [{}, {"momentum": 0.5, "decay": 0.2}, {"compress": {"bits": 16}}], ids=str)
def test_with_a_buffer_of_all_sites_it_is_fedavg(drive: Any, hospitals: Any, more: dict[str, Any]) -> None:
    study = hospitals(sizes=SIZES)
    params = params_of(study, batch_size=1000, clip=1.0, **more)
    wanted = study.train(drive, "horizontal.fedavg", params).result
    found = study.train(drive, "horizontal.fedbuff", {**params, "buffer": 5}, arrives=shuffled()).result
    far = 1e-3 if "compress" in more else 1e-14  # its coins are those of another round
    assert np.allclose(found["model"].weights, wanted["model"].weights, rtol=0, atol=far)
    assert np.allclose(found["history"], wanted["history"], atol=far)


@pytest.mark.parametrize("buffer", [1, 2, 3])
@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_it_is_the_same_written_a_second_time(drive: Any, hospitals: Any, buffer: int, rate: float) -> None:
    study = hospitals(sizes=SIZES)
    params = params_of(study, buffer=buffer, server_learning_rate=rate, batch_size=9, local_epochs=2)
    driven = study.train(drive, "horizontal.fedbuff", params, arrives=shuffled())
    handed = [item for item in driven.rounds if item.name == "hand_in"]
    assert [len(item.sites) for item in handed] == [buffer] * 7
    assert all(item.among for item in handed)
    assert np.allclose(driven.result["model"].weights, Second(study, params).of(asked_of(driven)), rtol=0, atol=1e-12)


def test_who_is_asked_again_gets_the_newest_weights(drive: Any, hospitals: Any) -> None:
    study = hospitals(sizes=SIZES)
    driven = study.train(drive, "horizontal.fedbuff", params_of(study, buffer=2), arrives=shuffled())
    versions = [float(item.send["version"]) for item in driven.rounds if item.name == "begin" and item.sites]
    assert versions == [float(n) for n in range(7)]
    ages = Counter[float]()
    begun: dict[str, float] = {}
    for item in driven.rounds:
        if item.name == "begin":
            begun |= dict.fromkeys(item.sites, float(item.send["version"]))
        else:
            ages.update(float(item.send["version"]) - begun[site] for site in item.sites)
    assert len(ages) > 2, "changes of several ages were in the sums"


def test_a_change_that_is_too_old_counts_nothing(drive: Any, hospitals: Any) -> None:
    """s4 is the last to arrive, always."""
    study = hospitals(sizes=SIZES)
    params = params_of(study, buffer=2, batch_size=1000, staleness={"most": 1})

    def late(flying: Sequence[Arrival]) -> int:
        places = [place for place, arrival in enumerate(flying) if arrival.site != "s4"]
        waited = len(driven_rounds) > 20
        return next(p for p, a in enumerate(flying) if a.site == "s4") if waited and len(places) < len(flying) else 0

    driven_rounds: list[int] = []

    def counted(flying: Sequence[Arrival]) -> int:
        driven_rounds.extend([0, 0])
        return late(flying)

    driven = study.train(drive, "horizontal.fedbuff", params, arrives=counted)
    second = Second(study, params)
    zeros = 0
    for (number, name, sites), replies in zip(asked_of(driven), driven.replies, strict=True):
        if name == "begin":
            second.began(number, sites)
        else:
            zeros += sum(not float(reply["weight"]) and not reply["weights"].any() for reply in replies.values())
            second.handed(sites, most=1)
    assert zeros >= 1
    assert np.allclose(driven.result["model"].weights, second.w, rtol=0, atol=1e-12)


def test_only_so_many_train_at_the_same_time(drive: Any, hospitals: Any) -> None:
    study = hospitals(sizes=SIZES)
    driven = study.train(drive, "horizontal.fedbuff", params_of(study, buffer=2, sites_per_round=3), arrives=shuffled())
    busy, most, seen = set[str](), 0, set[str]()
    for item in driven.rounds:
        if item.name == "begin":
            assert not busy & set(item.sites)
            busy |= set(item.sites)
        else:
            busy -= set(item.sites)
        most, seen = max(most, len(busy)), seen | busy
    assert most == 3
    assert seen == set(SITES)
    assert build("horizontal.fedbuff", params_of(study, sites_per_round=3)).fewest(5) == 2


# ---------------------------------------------------------------- what a site refuses


def test_what_was_handed_in_is_not_handed_in_again(drive: Any, hospitals: Any) -> None:
    study = hospitals(sizes=SIZES)
    params = params_of(study, buffer=5)
    driven = study.train(drive, "horizontal.fedbuff", params)
    desk, made = driven.desks["s1"], build("horizontal.fedbuff", params)
    task = study.task("s1", 99, {"version": np.array(7.0)})
    with pytest.raises(ProtocolError) as caught:
        handler_of(made, "hand_in").answer(made, desk, task)
    assert caught.value.code == "async.nothing-ready"
    assert not [name for name in desk.state if name.startswith("ready")]


def test_a_coordinator_that_answers_for_a_site_twice_is_found_out(hospitals: Any) -> None:
    study = hospitals(sizes=SIZES)
    cohort = Cohort(SITES, study.tables["s0"].schema)
    steps = build("horizontal.fedbuff", params_of(study, buffer=3)).coordinate(cohort)
    next(steps)
    assert isinstance(steps.send(Arrival("s2", 0, {})), Round)
    with pytest.raises(ProtocolError) as caught:
        steps.send(Arrival("s2", 0, {}))
    assert caught.value.code == "async.twice"


@pytest.mark.parametrize(
    "more",
    [
        {"aggregate": {"rule": "krum", "attackers": 1}},
        {"compress": {"choose": "own", "keep": 0.5}},
        {"compress": {"rank": 2}},
        {"buffer": 0},
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(hospitals: Any, more: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        build("horizontal.fedbuff", params_of(hospitals(sizes=SIZES), **more))


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_under_privacy_each_step_costs_whoever_is_in_it(federation: Any, hospitals: Any, protection: str) -> None:
    """As many sums as steps, each with noise for the fewest sites that may be left in it."""
    study, steps = hospitals(sizes=SIZES), 4
    privacy = {"unit": "site", "epsilon": 5.0, "delta": 1e-6}
    plan = federation.plan(
        "horizontal.fedbuff", {**params_of(study, buffer=4), "rounds": steps}, study.tables, privacy=privacy,
        protection=protection, cohort={"min_sites": 3},
    )  # fmt: skip
    found = federation.run(plan, study.tables)["result"]
    assert np.isfinite(found["model"].weights).all() and found["iterations"] == steps
    noise = noise_of(plan, len(SIZES))
    assert noise is not None and noise.shares == (3 if protection == "secagg" else 1)
    sums = [number for number, rate in enumerate(noise.rates) if rate]
    assert sums == [4 + 5 * step for step in range(steps)], "four are ready, then they hand in"
    assert noise.costs[sums[0] - 1] == 0 < noise.costs[sums[0]] < noise.costs[sums[-1]] == pytest.approx(5, rel=1e-3)
    charged = {body["round"]: body["epsilon"] for body in federation.releases() if body["epsilon"] is not None}
    assert charged == {number: noise.costs[number] for number in sums}
    for site, journal in federation.journals.items():
        last = max(body["round"] for body in federation.releases() if body["site"] == site and body["epsilon"])
        assert journal.spent("default", Budget()).epsilon == noise.costs[last]
        assert journal.spent("default", Budget()).exact == 0, "who is ready tells nothing else"


def test_noise_is_for_steps_and_not_for_who_is_ready(federation: Any, hospitals: Any) -> None:
    study, scales = hospitals(sizes=SIZES), []
    privacy = {"unit": "site", "epsilon": 5.0, "delta": 1e-6, "stages": "falling"}
    for name, more in (("horizontal.fedbuff", {"buffer": 3}), ("horizontal.fedavg", {})):
        plan = federation.plan(name, params_of(study, **more), study.tables, privacy=privacy, protection="plain")
        noise = noise_of(plan, len(SIZES))
        assert noise is not None
        scales.append([z for z, rate in zip(noise.multipliers, noise.rates, strict=True) if rate])
    assert scales[0] == scales[1] != sorted(scales[0]), "as in rounds of all: a site may be in every step"


def test_privacy_of_a_record_is_refused(federation: Any, hospitals: Any) -> None:
    study = hospitals(sizes=SIZES)
    privacy = {"unit": "record", "epsilon": 5.0, "delta": 1e-6}
    plan = federation.plan("horizontal.fedbuff", params_of(study), study.tables, privacy=privacy, protection="secagg")
    with pytest.raises(PlanError) as caught:
        federation.run(plan, study.tables)
    assert caught.value.code == "privacy.unbounded"


def test_a_buffer_smaller_than_the_cohorts_rule_is_refused(federation: Any, hospitals: Any) -> None:
    study = hospitals(sizes=SIZES)
    plan = federation.plan(
        "horizontal.fedbuff", params_of(study, buffer=2), study.tables, cohort={"sites": SITES, "min_sites": 3}
    )
    with pytest.raises(PlanError, match="too-few-drawn"):
        federation.run(plan, study.tables)


@pytest.mark.parametrize(
    ("staleness", "ages", "wanted"),
    [
        (Staleness(), (0, 1, 3), (1, 2**-0.5, 0.5)),
        (Staleness(exponent=1), (0, 1, 4), (1, 0.5, 0.2)),
        (Staleness(decay="hinge", after=4, slope=10), (0, 4, 5, 6), (1, 1, 1 / 11, 1 / 21)),
        (Staleness(decay="none", most=2), (0, 2, 3), (1, 1, 0)),
    ],
)
def test_older_changes_count_less(staleness: Staleness, ages: tuple[int, ...], wanted: tuple[float, ...]) -> None:
    """The papers' formulas, by hand."""
    assert [staleness.of(age) for age in ages] == pytest.approx(wanted)


# ---------------------------------------------------------------- whole federations


class Paced:
    """Endpoints in which a site begins to train only when it is its turn: so many steps after it was asked."""

    def __init__(self, waits: dict[str, int]) -> None:
        self.waits, self.steps, self.changed = waits, 0, threading.Condition()
        self.trained: list[tuple[str, int]] = []
        self.gone: dict[tuple[str, str, int], int] = {}

    def wrap(self, name: str, endpoint: Endpoint) -> Endpoint:
        def answer(message: Message, progress: Progress) -> Message:
            if message.kind != "task":
                return endpoint(message, progress)
            what, number = message.meta["name"], message.meta["round"]
            if self.gone.get((name, what, number), 0) > 0:
                self.gone[name, what, number] -= 1
                lost = ProtocolError("site.out-of-memory", "not enough memory at the site")
                return Message("failure", {"re": message.meta["id"], **lost.public()})
            with self.changed:
                if what == "begin":
                    until = self.steps + self.waits.get(name, 0)
                    self.changed.wait_for(lambda: self.steps >= until, 20)
                    self.trained.append((name, number))
            return endpoint(message, progress)

        return answer

    def listen(self, event: dict[str, Any]) -> None:
        """A step of the coordinator was made."""
        if "loss" in event.get("metrics", {}):
            with self.changed:
                self.steps += 1
                self.changed.notify_all()

    def drive(self, federation: Any, also: Callable[[dict[str, Any]], None] = lambda _: None) -> Any:
        """Run, or resume, what was submitted; at its end nobody waits any more."""

        def listen(event: dict[str, Any]) -> None:
            self.listen(event)
            also(event)

        try:
            return federation.drive(federation.run_id, on_event=listen)
        finally:
            with self.changed:
                self.steps += 1000
                self.changed.notify_all()


def told(federation: Any) -> list[tuple[int, str, list[str]]]:
    """(number, handler, sites that were asked to train, or are in the sum) of the run's rounds."""
    begun: dict[int, set[str]] = {}
    for site, way, content in federation.wire:
        message = decode(content)
        if way == "to" and message.kind == "task" and message.meta["name"] == "begin":
            begun.setdefault(message.meta["round"], set()).add(site)
    found = []
    for number, row in enumerate(federation.store.rounds(federation.run_id)):
        name = row["name"].rpartition("/")[2]
        sites = sorted(begun.get(number, ()))
        if name == "hand_in":
            sites = [str(site) for site in federation.store.reduced(federation.run_id, number).meta["sites"]]
        found.append((number, name, sites))
    return found


def plan_of(
    federation: Any, study: Any, protection: Any = "plain", run: dict[str, Any] | None = None, **more: Any
) -> Any:
    params = params_of(study, batch_size=1000, checkpoint_every=100, **more)
    return federation.plan(
        "horizontal.fedbuff", params, study.tables, protection=protection, cohort={"min_sites": 2},
        run={"deadline_s": 20, **(run or {})},
    )  # fmt: skip


HOMOMORPHIC = [
    pytest.param({"sum": "paillier", "key_bits": 2048}, id="paillier", marks=pytest.mark.slow),
    pytest.param({"sum": "ckks"}, id="ckks", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("protection", ["plain", "secagg", *HOMOMORPHIC])
def test_slow_sites_hold_nobody_up_and_their_changes_come_late(
    federation: Any, hospitals: Any, protection: Any
) -> None:
    study, paced = hospitals(sizes=SIZES), Paced({"s3": 3, "s4": 4})
    plan = plan_of(federation, study, protection, buffer=3)
    federation.build(study.tables, wrap=paced.wrap, threads=12)
    federation.submit(plan)
    found = paced.drive(federation)["result"]["model"].weights
    rounds = told(federation)
    handed = [sites for _, name, sites in rounds if name == "hand_in"]
    assert handed[0] == ["s0", "s1", "s2"]
    assert {"s3", "s4"} <= {site for sites in handed for site in sites}
    wanted = Second(study, plan.params).of(rounds)
    assert np.allclose(found, wanted, rtol=0, atol=2e-3 if protection == {"sum": "ckks"} else 1e-6)
    for body in federation.releases():
        if body["handler"] == "begin":
            assert (body["fields"], body["bytes"], body["reduce"]) == ([], 0, "ready")
        elif protection != "plain" and body["program"] == "horizontal.fedbuff":
            assert body["protection"] != "plain"


def returning(federation: Any) -> dict[str, int]:
    """How often a site came back; to be counted up by a test."""
    back = dict.fromkeys(SITES, 1)
    federation.transport.sites = lambda: dict(back)
    return back


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_a_site_that_is_lost_when_it_is_ready_begins_anew_when_it_is_back(
    federation: Any, hospitals: Any, protection: str
) -> None:
    study, paced = hospitals(sizes=SIZES), Paced({"s3": 1, "s4": 1})
    federation.build(study.tables, wrap=paced.wrap, threads=12)
    back = returning(federation)
    paced.gone["s1", "hand_in", 3] = 9

    def listen(event: dict[str, Any]) -> None:
        if "step" in event:
            paced.waits["s3"] = 0
        if event.get("step") == 2:
            back["s1"] += 1

    federation.submit(plan_of(federation, study, protection, buffer=3))
    found = paced.drive(federation, listen)["result"]["model"].weights
    rounds = told(federation)
    handed = [sites for _, name, sites in rounds if name == "hand_in"]
    assert handed[0] == ["s0", "s2"]
    assert any("s1" in sites for sites in handed[2:]), "it is in later ones"
    assert [event["dropout"] for event in federation.events if "dropout" in event] == ["s1"]
    asked = {site: number for number, name, sites in rounds if name == "begin" for site in sites if site == "s1"}
    assert asked["s1"] > 3
    begun = [(0, "begin", list(SITES)), *[entry for entry in rounds if entry[0]]]
    version = {0: 0}
    for number, name, _ in begun:
        version[number + 1] = version[number] + (name == "hand_in")
    second = Second(study, plan_of(federation, study, protection, buffer=3).params)
    weights = [second.w]
    for number, name, sites in begun:
        if name == "begin":
            for site in sites:  # s1 is told what was asked when it was away: the weights of then
                when = version[number]
                second.w, now = weights[when], second.w
                kept, second.version = second.version, when
                second.began(number, [site])
                second.w, second.version = now, kept
        else:
            second.handed(sites)
            weights.append(second.w)
    assert np.allclose(found, second.w, rtol=0, atol=1e-6)


def test_a_site_that_is_lost_in_training_is_asked_again_in_the_same_words(federation: Any, hospitals: Any) -> None:
    study, paced = hospitals(sizes=SIZES), Paced({})
    federation.build(study.tables, wrap=paced.wrap, threads=12)
    back = returning(federation)
    paced.gone["s4", "begin", 0] = 1

    def listen(event: dict[str, Any]) -> None:
        if event.get("step") == 1:
            back["s4"] += 1

    federation.submit(plan_of(federation, study, buffer=3))
    paced.drive(federation, listen)
    asked = [
        decode(content) for site, way, content in federation.wire
        if (site, way) == ("s4", "to") and decode(content).meta.get("name") == "begin"
    ]  # fmt: skip
    assert paced.gone["s4", "begin", 0] == 0
    assert asked[0].meta["id"].endswith("/0/0/reply/s4")
    assert not asked[0].arrays["weights"].any(), "those that it was sent at first"
    assert any("s4" in sites for _, name, sites in told(federation) if name == "hand_in")


@pytest.mark.parametrize(
    ("protection", "every", "dies_at"), [("plain", 100, 4), ("secagg", 100, 9), ("secagg", 1, 9), ("plain", 1, 13)]
)
def test_a_coordinator_that_dies_goes_on_with_who_was_in_flight(
    federation: Any, hospitals: Any, protection: str, every: int, dies_at: int
) -> None:
    """With a checkpoint at every step, what was asked before it is known from there alone."""
    study, paced = hospitals(sizes=SIZES), Paced({"s3": 2, "s4": 3})
    params = params_of(study, batch_size=1000, checkpoint_every=every, buffer=3)
    plan = federation.plan("horizontal.fedbuff", params, study.tables, protection=protection, cohort={"min_sites": 2})
    federation.build(study.tables, wrap=paced.wrap, threads=16)
    run = federation.submit(plan)
    with pytest.raises(Died):
        paced.drive(federation, die_when(lambda event: event.get("round") == dies_at))
    paced.steps -= 1000
    federation.start_coordinator()
    found = paced.drive(federation)["result"]["model"].weights
    assert len({site for site, _ in paced.trained}) == 5
    assert len(federation.store.rounds(run)) == 7 * 4
    if every == 100:
        assert np.allclose(found, Second(study, plan.params).of(told(federation)), rtol=0, atol=1e-6)
    ready = Counter((body["site"], body["round"]) for body in federation.releases() if body["handler"] == "begin")
    assert set(ready.values()) == {1}, "nobody trains twice for one task"
    handed = Counter(body["site"] for body in federation.releases() if body["handler"] == "hand_in")
    assert min(handed.values()) >= 1


def test_sites_that_are_not_there_are_waited_for_as_long_as_the_plan_says(federation: Any, hospitals: Any) -> None:
    study, paced = hospitals(sizes=SIZES), Paced({})
    federation.build(study.tables, wrap=paced.wrap, threads=12)
    returning(federation)
    for site in ("s3", "s4"):
        paced.gone[site, "begin", 0] = 9
    federation.submit(plan_of(federation, study, buffer=4, run={"deadline_s": 2.5}))
    with pytest.raises(Exception, match="none of the sites"):
        paced.drive(federation)
    assert federation.store.run(federation.run_id)["status"] == "failed"


@pytest.mark.parametrize(
    "more",
    [{"compress": {"keep": 0.7, "choose": "top"}, "clip": 1.0}, {"compress": {"bits": 12}, "clip": 1.0}],
    ids=["sparse", "quantised"],
)
def test_it_is_evaluated_on_the_way_and_compressed(federation: Any, hospitals: Any, more: dict[str, Any]) -> None:
    study, paced = hospitals(sizes=SIZES), Paced({"s4": 1})
    federation.build(study.tables, wrap=paced.wrap, threads=12)
    plan = plan_of(federation, study, "secagg", {"holdout": 0.3}, buffer=3, evaluate_every=2, **more)
    federation.submit(plan)
    outcome = paced.drive(federation)
    assert outcome["evaluation"]["pooled"]["auc"] > 0.5
    scored = [row for row in federation.store.metrics(federation.run_id) if row["name"] == "auc"]
    assert len(scored) == 3
