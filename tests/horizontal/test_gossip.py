"""Gossip: D-PSGD to the last digit, and a coordinator that sees no model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from atoll.aggregation.topology import heard, mixing, without
from atoll.contract.errors import AtollError, ProtocolError
from atoll.contract.program import Cohort, build, handler_of
from atoll.contract.rounds import Gathered, Task, TaskId
from atoll.contract.wire import Message, decode
from atoll.crypto.identity import Identity
from atoll.crypto.session import Session
from atoll.runtime.mail import Mailbox
from atoll.transport.base import Endpoint, Progress

RATE, SIZE = 0.3, 16
SIZES = (40, 25, 33, 21, 30)
ROUNDS = 4


def reference(
    study: Any, topology: str, rounds: int, absent: Callable[[int], Any] = lambda _: (), epochs: int = 1
) -> dict[str, Any]:
    """Algorithm 1 of Lian et al. 2017, in plain numpy. absent: who is not there in message round *number*."""
    names = sorted(study.tables)
    x = {name: np.zeros(3) for name in names}
    sent: dict[str, Any] = {}
    for k in range(rounds + 1):
        weights, new = mixing(topology, len(names), k), dict[str, Any]()  # type: ignore[arg-type]
        here = [name for name in names if name not in absent(k + 1)]  # the keys' round is the first
        for i, name in enumerate(names):
            if name not in here:
                continue
            row = without(weights[i], i, [j for j in heard(weights, i) if names[j] in sent])
            if k == 0:
                row = np.eye(len(names))[i]
            value = sum(row[j] * (x[name] if j == i else sent[names[j]]) for j in np.flatnonzero(row))
            if k < rounds:
                batches = study.batches(name, k + 1 + study.reports(k), SIZE, epochs)
                value = value + study.sgd(name, x[name], batches, RATE) - x[name]
            new[name] = value
        x |= new
        sent = new
    return x


def trained(study: Any, drive: Any, topology: str, rounds: int = ROUNDS, **more: Any) -> Any:
    study.reports = lambda k: 0
    options = {key: more.pop(key) for key in ("absent",) if key in more}
    params = {"rounds": rounds, "batch_size": SIZE, "learning_rate": RATE, "topology": topology, "report_every": 99}
    return study.train(drive, "horizontal.gossip", study.params(**params, **more), **options)


@pytest.mark.parametrize("topology", ["ring", "mesh", "torus", "complete", "exponential", "one_peer"])
def test_it_is_d_psgd(hospitals: Any, drive: Any, topology: str) -> None:
    study = hospitals("logistic", SIZES)
    driven = trained(study, drive, topology, local_epochs=2)
    wanted = reference(study, topology, ROUNDS, epochs=2)
    for name, desk in driven.desks.items():
        assert np.allclose(desk.personal["weights"], wanted[name], rtol=0, atol=1e-12)
    assert "model" not in driven.result
    assert driven.result["gossip"]["sites"] == len(SIZES)


def test_one_step_on_all_rows_from_everybody_is_gradient_descent(hospitals: Any, drive: Any) -> None:
    """On a complete graph with one full batch, the mean moves as centralised gradient descent does, each site alike."""
    study = hospitals("linear", SIZES)
    driven = study.train(
        drive, "horizontal.gossip",
        study.params(rounds=1, batch_size=1000, learning_rate=RATE, topology="complete"),
    )  # fmt: skip
    wanted = -RATE * np.mean([study.gradient(site, np.zeros(3)) for site in study.tables], 0)
    for desk in driven.desks.values():
        assert np.allclose(desk.personal["weights"], wanted, atol=1e-12)


def test_who_misses_a_neighbour_gives_its_weight_to_itself(hospitals: Any, drive: Any) -> None:
    study = hospitals("logistic", SIZES)
    gone = lambda number: ("s1",) if number in (2, 3) else ()  # noqa: E731
    driven = trained(study, drive, "ring", absent=gone)
    wanted = reference(study, "ring", ROUNDS, gone)
    for name, desk in driven.desks.items():
        assert np.allclose(desk.personal["weights"], wanted[name], rtol=0, atol=1e-12)
    assert not np.allclose(wanted["s0"], reference(study, "ring", ROUNDS)["s0"])


def test_it_tells_how_far_models_are_apart(hospitals: Any, drive: Any) -> None:
    study = hospitals("logistic", SIZES)
    driven = trained(study, drive, "ring", rounds=1)
    study.reports = lambda k: 0
    x = {n: study.sgd(n, np.zeros(3), study.batches(n, 1, SIZE), RATE) for n in study.tables}
    weights, names = mixing("ring", len(x)), sorted(x)
    pairs = [(i, j) for i in range(len(x)) for j in heard(weights, i)]
    energy = sum(weights[i, j] * np.sum((x[names[i]] - x[names[j]]) ** 2) for i, j in pairs)
    told = driven.result["gossip"]
    assert told["apart"] == pytest.approx((energy / sum(weights[i, j] for i, j in pairs)) ** 0.5, rel=1e-9)
    every = np.array([x[name] for name in names])
    from_mean = np.sqrt(np.mean(np.sum((every - every.mean(0)) ** 2, 1)))
    assert from_mean <= told["from_mean_most"] + 1e-12
    assert driven.metrics[-1].values["apart"] == told["apart"]


def plan_of(federation: Any, study: Any, protection: str = "secagg", **more: Any) -> Any:
    params = study.params(rounds=3, batch_size=SIZE, learning_rate=RATE, report_every=2, **more)
    run = {"holdout": 0.4, "seed": 5}
    return federation.plan("horizontal.gossip", params, study.tables, run=run, protection=protection)


def test_no_weight_of_any_model_is_on_the_wire(hospitals: Any, federation: Any) -> None:
    study = hospitals("logistic", SIZES)
    outcome = federation.run(plan_of(federation, study), study.tables)
    own = {n: j.personal(federation.run_id).arrays["weights"] for n, j in federation.journals.items()}
    wire = b"".join(content for _, _, content in federation.wire)
    secret = {value.tobytes() for weights in own.values() for value in weights}
    secret |= {np.float32(value).tobytes() for weights in own.values() for value in weights}
    assert len(secret) == 2 * 3 * len(SIZES)
    assert not [value for value in secret if value in wire]
    assert "model" not in outcome["result"]
    result, arrays = federation.store.result(federation.run_id)
    assert arrays == {}
    assert 0.5 < result["metrics"]["personal"]["accuracy"] <= 1
    assert result["metrics"]["federated"] == {}
    said = result["privacy"]["statement"]
    assert "In horizontal.gossip sites sent each other" in said
    assert "no site saw another" not in said
    assert "single sites' replies to statistics.evaluation." in said
    assert set(federation.ledgers()) == {"coordinator", *study.tables}


@pytest.mark.parametrize(("every", "dies_at"), [(10, 3), (1, 3), (1, 5), (2, 4)])
def test_a_run_that_is_resumed_goes_on(hospitals: Any, federation: Any, every: int, dies_at: int) -> None:
    """From a checkpoint the coordinator has the mail that waits; models are the sites'."""
    study = hospitals("logistic", SIZES)
    outcome = federation.run(plan_of(federation, study, checkpoint_every=every), study.tables)["result"]
    whole = {n: j.personal(federation.run_id).arrays["weights"] for n, j in federation.journals.items()}
    federation.build(study.tables)
    federation.submit(plan_of(federation, study, checkpoint_every=every))
    begun: list[int] = []

    def stop(event: dict[str, Any]) -> None:
        if event.get("round") == dies_at and not begun:
            begun.append(dies_at)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federation.drive(on_event=stop)
    kept = federation.store.checkpoint(federation.run_id)
    assert (kept is not None) == (every < 10)
    federation.start_coordinator()
    federation.start_transport()
    assert federation.drive()["result"] == outcome
    for name, weights in whole.items():
        assert np.array_equal(federation.journals[name].personal(federation.run_id).arrays["weights"], weights)


Change = Callable[[str, dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]], dict[str, np.ndarray]]


def changed(change: Change) -> Callable[[str, Endpoint], Endpoint]:
    """A coordinator that gives sites other arrays in rounds of exchange than the protocol says."""
    seen: dict[str, dict[str, np.ndarray]] = {}

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def ask(message: Message, progress: Progress) -> Message:
            if message.kind == "task" and message.meta["name"] == "exchange":
                message = Message("task", message.meta, change(name, dict(message.arrays), seen))
            return endpoint(message, progress)

        return ask

    return wrap


def replayed(name: str, arrays: dict[str, np.ndarray], seen: dict[str, Any]) -> dict[str, np.ndarray]:
    """An earlier round's envelopes once more."""
    if len(arrays["senders"]):
        arrays |= seen.setdefault(name, {k: arrays[k] for k in ("mail", "senders", "keys", "partners")})
    return arrays


def misdirected(name: str, arrays: dict[str, np.ndarray], seen: dict[str, Any]) -> dict[str, np.ndarray]:
    arrays["mail"] = arrays["mail"][::-1].copy()
    return arrays


def altered(name: str, arrays: dict[str, np.ndarray], seen: dict[str, Any]) -> dict[str, np.ndarray]:
    arrays["mail"] = arrays["mail"] ^ np.uint8(1)
    return arrays


def of_its_own(name: str, arrays: dict[str, np.ndarray], seen: dict[str, Any]) -> dict[str, np.ndarray]:
    """Keys that the coordinator made up, so that models would be sealed for it."""
    arrays["keys"] = np.zeros_like(arrays["keys"])
    return arrays


def too_long(name: str, arrays: dict[str, np.ndarray], seen: dict[str, Any]) -> dict[str, np.ndarray]:
    arrays["mail"] = np.zeros((len(arrays["mail"]), 10_000), np.uint8)
    return arrays


def not_a_neighbour(name: str, arrays: dict[str, np.ndarray], seen: dict[str, Any]) -> dict[str, np.ndarray]:
    arrays["senders"] = np.arange(len(arrays["senders"]))
    return arrays


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (replayed, "envelope.altered"),
        (misdirected, "envelope.altered"),
        (altered, "envelope.altered"),
        (of_its_own, "session.not-signed"),
        (too_long, "task.array"),
        (not_a_neighbour, "task.array"),
    ],
)
def test_a_coordinator_can_leave_mail_out_and_nothing_else(
    hospitals: Any, federation: Any, change: Change, code: str
) -> None:
    study = hospitals("logistic", SIZES)
    with pytest.raises(AtollError) as caught:
        federation.run(plan_of(federation, study), study.tables, wrap=changed(change))
    assert caught.value.code == code


def test_a_round_of_gossip_is_not_asked_twice(hospitals: Any, federation: Any) -> None:
    """Else a site would seal two models under one number."""
    study = hospitals("logistic", SIZES)

    def again(name: str, arrays: dict[str, np.ndarray], seen: dict[str, Any]) -> dict[str, np.ndarray]:
        return {**arrays, "iteration": np.array(0), "mail": arrays["mail"][:0], "senders": arrays["senders"][:0]}

    with pytest.raises(AtollError) as caught:
        federation.run(plan_of(federation, study), study.tables, wrap=changed(again))
    assert caught.value.code == "task.changed"


def test_a_neighbour_that_sends_no_numbers_is_not_heard(hospitals: Any) -> None:
    study = hospitals("linear", (20, 20))
    identities = {name: Identity.generate(name) for name in study.tables}
    roster = {name: identity.public for name, identity in identities.items()}
    boxes = {n: Mailbox(n, "r", "p", Session(Session.fresh()), identities[n].sign, roster, "h") for n in roster}
    made = build("horizontal.gossip", study.params(rounds=2, topology="complete"))
    state: dict[str, Any] = {"weights": np.array([1.0, 2.0, 3.0]), "iteration": np.array(1)}
    view: Any = SimpleNamespace(name="s0", table=study.tables["s0"], mail=boxes["s0"], state=state, personal={})
    for model, wanted in ((np.full(3, np.inf), [1, 2, 3]), (np.array([3.0, 2.0, 1.0]), [2, 2, 2])):
        sealed = boxes["s1"].seal("s0", boxes["s0"].key, "model", 2, model.tobytes())
        numbers = {"iteration": 2, "seed": 0, "last": 1, "senders": [1], "partners": [1]}
        arrays = {name: np.array(value) for name, value in numbers.items()}
        arrays |= {
            "mail": np.frombuffer(sealed, np.uint8)[None],
            "keys": np.frombuffer(boxes["s1"].key, np.uint8)[None],
        }
        state |= {"weights": np.array([1.0, 2.0, 3.0]), "iteration": np.array(1)}
        handler_of(made, "exchange").answer(made, view, Task(TaskId("r", 3, 0, "reply", "s0"), arrays, (1,)))
        assert view.personal["weights"].tolist() == wanted


def test_a_reply_is_an_envelope_for_each_neighbour(hospitals: Any, federation: Any) -> None:
    study = hospitals("logistic", SIZES)
    federation.run(plan_of(federation, study), study.tables)
    messages = [decode(content) for _, way, content in federation.wire if way == "from"]
    mail = [m.arrays["mail"].shape for m in messages if m.kind == "release" and "mail" in m.arrays]
    assert set(mail) == {(2, 3 * 8 + 28), (0, 3 * 8 + 28)}


def test_a_site_that_sends_another_number_of_envelopes_ends_the_run(hospitals: Any) -> None:
    study = hospitals("linear", (20, 20, 20))
    made = build("horizontal.gossip", study.params(rounds=2))
    steps = made.coordinate(Cohort(tuple(study.tables), study.tables["s0"].schema))
    next(steps)
    asked = steps.send(Gathered({name: {"key": np.zeros(96, np.uint8)} for name in study.tables}))
    size = asked.reply["mail"].shape[1]
    with pytest.raises(ProtocolError) as caught:
        steps.send(Gathered({name: {"mail": np.zeros((1 + (name != "s2"), size), np.uint8)} for name in study.tables}))
    assert (caught.value.code, caught.value.where["site"]) == ("reply.shape", "s2")
