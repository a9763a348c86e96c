"""What sites are sent: all who take part hold the same bits, whatever they missed, and nothing is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.compression.downlink import Downlink, Versions, digest, received
from atoll.contract.errors import ProtocolError
from atoll.contract.rounds import APART, Task, TaskId

SIZE, SITES = 400, ("a", "b", "c", "d")
RULES: list[dict[str, Any]] = [
    {}, {"lossless": True}, {"keep": 0.1}, {"keep": 0.2, "bits": 4}, {"bits": 8, "lossless": True},
    {"precision": "float16"}, {"keep": 0.3, "precision": "bfloat16", "lossless": True},
]  # fmt: skip


def first(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, SIZE).astype(np.float32)


def task(sent: dict[str, Any]) -> Task:
    return Task(TaskId("0" * 32, 0, 0, "reply", "s"), {k: np.asarray(v) for k, v in sent.items()}, (0,))


def take(rule: Downlink, common: Any, apart: Any, state: dict[str, Any]) -> np.ndarray:
    return received(rule, task({**common, **apart}), state, SIZE, np.dtype(np.float32), first)


@settings(max_examples=30)
@given(
    rule=st.sampled_from(RULES),
    there=st.lists(st.sets(st.sampled_from(SITES), min_size=1), min_size=1, max_size=15),
    lost=st.sets(st.integers(0, 14)),
    seed=st.integers(0, 9),
)
def test_sites_that_miss_rounds_and_answers_hold_the_same(rule: Any, there: Any, lost: set[int], seed: int) -> None:
    down = Downlink(changes=True, **rule)
    versions, states = Versions(down, first(7), 7, SITES), {site: dict[str, Any]() for site in SITES}
    random, model = np.random.default_rng(seed), first(7)
    for number, sites in enumerate(there):
        common, apart = versions.towards(model)
        held = [take(down, common, apart[site], states[site]) for site in sorted(sites)]
        assert all(np.array_equal(one, versions.held) for one in held)
        if number not in lost:  # else the sites have it, and the coordinator does not know
            versions.answered(sorted(sites))
        model = model + random.normal(0, 0.01, SIZE).astype(np.float32) * (random.random(SIZE) < 0.2)
        model = model.astype(np.float32)
        versions = Versions(down, first(7), 7, SITES).restore(versions.arrays())  # as after a restart


def test_without_rounding_the_version_is_the_model() -> None:
    versions, model = Versions(Downlink(changes=True), first(1), 1, SITES), first(1)
    assert versions.towards(model)[0]["version"].tolist() == [1, 0]
    for step in range(4):
        model = model + np.float32(0.1) * first(step + 5)
        versions.towards(model)
        assert np.array_equal(versions.held, model)


@pytest.mark.parametrize("rule", RULES[2:], ids=str)
def test_what_a_message_leaves_out_comes_later(rule: Any) -> None:
    versions, model = Versions(Downlink(changes=True, **rule), first(1), 1, SITES), first(2)
    apart = [np.abs(model - versions.held).max()]
    for _ in range(40):
        versions.towards(model)
        apart.append(np.abs(model - versions.held).max())
    assert apart[-1] < 1e-6 * apart[0] or np.array_equal(versions.held, model)


def test_the_first_version_is_not_sent_and_a_change_costs_what_changed() -> None:
    versions, model = Versions(Downlink(changes=True), first(1), 1, SITES), first(1)
    common, apart = versions.towards(model)
    assert sum(a.nbytes for a in (*common.values(), *apart["a"].values())) < 60
    model[[3, 77]] += 1
    common, apart = versions.towards(model)
    assert sum(a.nbytes for a in (*common.values(), *apart["a"].values())) < 60 + 16 + 2 * 5 + 8


def test_a_site_that_missed_much_is_sent_the_whole() -> None:
    down = Downlink(changes=True)
    versions, model, state = Versions(down, first(1), 1, SITES), first(1), dict[str, Any]()
    for step in range(5):
        model[step * 50 : step * 50 + 150] += np.float32(0.5)
        common, apart = versions.towards(model)
        versions.answered(["b"] if step < 4 else [])
    assert APART + "whole" in apart["a"] and APART + "changes" in apart["b"]
    assert np.array_equal(take(down, common, apart["a"], state), model)
    assert sum(map(len, versions.messages)) <= model.nbytes


def test_sites_at_the_same_version_share_what_they_are_sent() -> None:
    _, apart = Versions(Downlink(changes=True), first(1), 1, SITES).towards(first(2))
    assert apart["a"] is apart["d"]


@pytest.mark.parametrize("spoilt", ["digest", "version", APART + "changes", APART + "sizes", "base"])
def test_other_weights_than_all_are_asked_about_are_refused(spoilt: str) -> None:
    down, state = Downlink(changes=True, bits=4), dict[str, Any]()
    versions = Versions(down, first(1), 1, SITES)
    common, apart = versions.towards(first(2))
    sent = {name: value.copy() for name, value in {**common, **apart["a"]}.items()}
    assert np.array_equal(take(down, sent, {}, {}), versions.held)
    if spoilt == "base":
        state |= {"held": first(3), "held version": np.array(0)}
    elif spoilt == APART + "changes":
        sent[spoilt][40] ^= 1
    else:
        sent[spoilt].reshape(-1)[-1] += 1
    before = dict(state)
    with pytest.raises(ProtocolError):
        take(down, sent, {}, state)
    assert state == before


def test_a_site_without_the_model_says_so() -> None:
    down = Downlink(changes=True)
    versions = Versions(down, first(1), 1, SITES)
    for seed in (2, 3):
        model = first(1)
        model[seed] += 1
        common, apart = versions.towards(model)
        versions.answered(["b"]) if seed == 2 else None
    with pytest.raises(ProtocolError) as caught:
        take(down, common, apart["b"], {})
    assert caught.value.code == "compression.no-base"


@pytest.mark.parametrize(
    "rule", [{"bits": 8}, {"precision": "float16"}, {"bits": 4, "lossless": True}, {"lossless": True}]
)
def test_the_whole_in_fewer_bits_is_right_on_average(rule: Any) -> None:
    down, model = Downlink(**rule), first(3)
    read = [down.taken(task(down.whole(model, 0, n)), SIZE, model.dtype).astype(float) for n in range(300)]
    wide = {8: 0.004, 4: 0.06}.get(rule.get("bits"), 2e-4)
    assert np.abs(read[0] - model).max() <= wide and np.abs(np.mean(read, axis=0) - model).max() <= wide / 4 + 1e-4
    assert down.whole(model, 0, 1)["coded"].nbytes < model.nbytes + 20


@pytest.mark.parametrize("rule", [{"keep": 0.5}, {"bits": 4, "precision": "float16"}])
def test_what_cannot_be_combined_is_told(rule: Any) -> None:
    assert [error.code for error in Downlink(**rule).conflicts()] == ["plan.illegal-compression"]


def test_a_digest_is_of_the_bits() -> None:
    zeros = np.zeros(3, np.float32)
    assert not np.array_equal(digest(zeros), digest(-zeros)) and digest(zeros).shape == (32,)
