"""FedAsync: the paper's mixing written a second time, for a recorded order of arrivals; and runs that are resumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError, ProtocolError
from atoll.contract.program import Cohort, build
from atoll.contract.rounds import Arrival
from atoll.contract.wire import decode

SIZES = (40, 25, 33, 20)


class Died(BaseException):
    """Stands for the process being killed: nothing catches it."""


def params_of(study: Any, **more: Any) -> dict[str, Any]:
    return study.params(**{"rounds": 20, "learning_rate": 0.2, "batch_size": 9, "proximal": 0.0, **more})


def shuffled(seed: int = 2) -> Callable[[Sequence[Arrival]], int]:
    random = np.random.default_rng(seed)
    return lambda flying: int(random.integers(len(flying)))


def second(study: Any, p: dict[str, Any], rounds: Sequence[tuple[Sequence[str], str]]) -> tuple[Any, list[int]]:
    """Algorithm 1 in plain numpy, of (sites asked, site that answered) of all rounds: weights, and changes' ages."""
    w, flying, ages = np.zeros(3), dict[str, tuple[int, Any, Any]](), []
    after, slope, rho = p.get("after", 4), p.get("slope", 10), p["proximal"]
    for number, (asked, arrived) in enumerate(rounds):
        for site in asked:
            x = w.copy()
            batches = study.batches(site, number, p["batch_size"])
            flying[site] = (number, w, study.sgd(site, w, batches, 0.2, drawn=lambda v, x=x: rho * (v - x)))
        since, _, new = flying.pop(arrived)
        ages.append(number - since)
        if p.get("staleness", {}).get("decay") == "hinge":
            share = 1.0 if ages[-1] <= after else 1 / (slope * (ages[-1] - after) + 1)
        else:
            share = (1 + ages[-1]) ** -0.5
        rate = p.get("mixing", 0.6) * share
        w = (1 - rate) * w + rate * new
    return w, ages


def answered(driven: Any) -> list[tuple[Sequence[str], str]]:
    return [(item.sites, arrived.site) for item, arrived in zip(driven.rounds, driven.reduced, strict=True)]


@pytest.mark.parametrize(
    "more",
    [{}, {"mixing": 0.9, "proximal": 0.3}, {"staleness": {"decay": "hinge", "after": 4, "slope": 10}}],
    ids=str,
)
def test_it_is_the_papers_mixing(drive: Any, hospitals: Any, more: dict[str, Any]) -> None:
    study = hospitals(sizes=SIZES)
    params = params_of(study, **more)
    driven = study.train(drive, "horizontal.fedasync", params, arrives=shuffled())
    wanted, ages = second(study, params, answered(driven))
    assert max(ages) >= 4 and min(ages) == 0
    assert np.allclose(driven.result["model"].weights, wanted, rtol=0, atol=1e-12)
    assert all(len(item.sites) == 1 for item in driven.rounds[1:]), "who answered is asked again"


def test_one_site_alone_is_fedavg_with_a_shorter_step(drive: Any, hospitals: Any) -> None:
    """w + α·Δ: with α = 1, plain SGD."""
    study = hospitals(sizes=(40,))
    params = params_of(study, mixing=1.0, rounds=5)
    found = study.train(drive, "horizontal.fedasync", params).result["model"].weights
    common = {name: value for name, value in params.items() if name not in ("mixing", "proximal")}
    wanted = study.train(drive, "horizontal.fedavg", common).result["model"].weights
    assert np.allclose(found, wanted, rtol=0, atol=1e-13)


def test_a_site_without_rows_moves_nothing(drive: Any, hospitals: Any) -> None:
    study = hospitals(sizes=SIZES)
    params = params_of(study)
    study.tables["s3"] = study.tables["s3"].rows(np.zeros(20, bool))
    driven = study.train(drive, "horizontal.fedasync", params, arrives=shuffled())
    sent = [np.asarray(item.send["weights"]) for item in driven.rounds]
    came = [arrived.site for arrived in driven.reduced]
    assert "s3" in came[:-1]
    for number, site in enumerate(came[:-1]):
        assert np.array_equal(sent[number], sent[number + 1]) == (site == "s3")


def test_a_change_that_is_too_old_is_not_mixed_in(drive: Any, hospitals: Any) -> None:
    study = hospitals(sizes=SIZES)
    driven = study.train(
        drive, "horizontal.fedasync", params_of(study, staleness={"most": 0}, rounds=4), arrives=lambda _: 0
    )
    sent = [np.asarray(item.send["weights"]) for item in driven.rounds]
    assert sent[1].any(), "the first is as old as can be"
    assert np.array_equal(sent[1], sent[2]) and np.array_equal(sent[2], sent[3]), "the others are not"


def test_only_so_many_train_at_the_same_time(drive: Any, hospitals: Any) -> None:
    study = hospitals(sizes=SIZES)
    driven = study.train(drive, "horizontal.fedasync", params_of(study, sites_per_round=2), arrives=shuffled())
    assert [len(item.sites) for item in driven.rounds] == [2, *[1] * 19]
    assert {arrived.site for arrived in driven.reduced} == {"s0", "s1", "s2", "s3"}


@pytest.mark.parametrize(
    "more", [{"compress": {"keep": 0.5}}, {"aggregate": {"rule": "krum", "attackers": 1}}], ids=str
)
def test_what_it_cannot_do_is_refused(hospitals: Any, more: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        build("horizontal.fedasync", params_of(hospitals(sizes=SIZES), **more))


@pytest.mark.parametrize("protection", ["secagg", "paillier"])
def test_it_does_not_run_where_single_changes_must_stay_hidden(
    federation: Any, hospitals: Any, protection: str
) -> None:
    study = hospitals(sizes=SIZES)
    with pytest.raises(PlanError) as caught:
        federation.run(
            federation.plan("horizontal.fedasync", params_of(study), study.tables, protection=protection), study.tables
        )
    codes = {caught.value.code, *[part.code for part in caught.value.parts]}
    assert "plan.illegal-combination" in codes


def test_who_was_not_asked_cannot_answer(hospitals: Any) -> None:
    study = hospitals(sizes=SIZES)
    steps = build("horizontal.fedasync", params_of(study, sites_per_round=1)).coordinate(
        Cohort(tuple(study.tables), study.tables["s0"].schema)
    )
    asked = next(steps).sites[0]
    other = next(site for site in study.tables if site != asked)
    values = {"weights": np.zeros(3), "loss": np.array(0.0), "weight": np.array(1.0)}
    with pytest.raises(ProtocolError, match="not asked"):
        steps.send(Arrival(other, 0, values))


def rounds_of(federation: Any) -> list[tuple[Sequence[str], str]]:
    """(sites asked, site that answered) of all rounds of a run."""
    asked: dict[int, set[str]] = {}
    for site, way, content in federation.wire:
        message = decode(content)
        if way == "to" and message.kind == "task":
            asked.setdefault(message.meta["round"], set()).add(site)
    number = len(federation.store.rounds(federation.run_id))
    stored = [federation.store.reduced(federation.run_id, n) for n in range(number)]
    return [(sorted(asked.get(n, ())), str(message.meta["sites"][0])) for n, message in enumerate(stored)]


@pytest.mark.parametrize("every", [100, 1, 4])
def test_a_run_that_is_resumed_goes_on_with_what_was_in_flight(federation: Any, hospitals: Any, every: int) -> None:
    """Nobody computes twice for one task, and every task that was asked is still answered."""
    study = hospitals(sizes=SIZES)
    for dies_at in (1, 5, 9):
        params = params_of(study, rounds=12, batch_size=1000, checkpoint_every=every)
        plan = federation.plan("horizontal.fedasync", params, study.tables)
        federation.build(study.tables)
        run = federation.submit(plan)

        def die(event: dict[str, Any], at: int = dies_at) -> None:
            if event.get("round") == at:
                raise Died

        with pytest.raises(Died):
            federation.drive(on_event=die)
        federation.start_coordinator()
        federation.start_transport()
        found = federation.drive(run)["result"]["model"].weights
        released = [(body["site"], body["round"]) for body in federation.releases()]
        assert len(released) == len(set(released))
        assert len(federation.store.rounds(run)) == 12
        if every == 100:
            assert np.allclose(found, second(study, params, rounds_of(federation))[0], rtol=0, atol=1e-12)
        else:
            assert np.isfinite(found).all()
        for ledger in federation.ledgers().values():
            assert len(ledger.unacknowledged) <= 1, "what is in flight in the end nobody waits for"
