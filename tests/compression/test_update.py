"""Sparse and quantised updates: sums stay sums, nothing is lost, and rounding is right on average."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.compression.update import Compression
from atoll.contract.errors import ProtocolError
from atoll.contract.rounds import Task, TaskId


def task(seed: int = 0, **arrays: Any) -> Task:
    return Task(TaskId("0" * 32, 0, 0, "reply", "s"), arrays, (seed,))


@given(
    size=st.integers(1, 300),
    keep=st.floats(0.01, 1),
    number=st.integers(0, 50),
    choose=st.sampled_from(["random", "top"]),
)
def test_the_support_is_the_same_for_everybody(size: int, keep: float, number: int, choose: Any) -> None:
    rule, last = Compression(keep=keep, choose=choose), np.arange(size, dtype=float)
    support = rule.support(last, 7, number)
    assert np.array_equal(support, rule.support(last.copy(), 7, number))
    assert len(support) == max(1, round(keep * size))
    assert (np.diff(support) > 0).all() and support[0] >= 0 and support[-1] < size
    assert rule.told(task(support=support), size) is support


def test_top_takes_the_largest_sums() -> None:
    last = np.zeros(100)
    last[[3, 50, 77]] = 5, -9, 4
    support = Compression(keep=0.06, choose="top").support(last, 1, 1)
    assert {3, 50, 77} <= set(support.tolist()) and len(support) == 6


@pytest.mark.parametrize(
    "support", [None, [0, 1], [1, 1, 2], [2, 1, 0], [-1, 0, 1], [8, 9, 10], [0.0, 1.0, 2.0], [[0, 1, 2]]]
)
def test_a_malformed_support_is_refused(support: Any) -> None:
    given = {} if support is None else {"support": np.array(support)}
    with pytest.raises(ProtocolError):
        Compression(keep=0.3).told(task(**given), 10)


@given(st.lists(st.floats(-5, 5), min_size=4, max_size=40), st.integers(1, 30))
def test_what_is_left_out_is_sent_later(values: list[float], rounds: int) -> None:
    change, state = np.array(values), dict[str, np.ndarray]()
    rule, sent = Compression(keep=0.25), np.zeros(len(values))
    for number in range(rounds):
        support = rule.support(change, 3, number)
        sent[support] += rule.carried(change.copy(), support, state)
    assert np.allclose(sent + state["residual"], rounds * change)


@given(bits=st.integers(2, 12), values=st.lists(st.floats(-1, 1), min_size=1, max_size=20))
def test_rounding_is_on_the_grid_and_within_a_step(bits: int, values: list[float]) -> None:
    rule = Compression(bits=bits)
    step = rule.step(1.0)
    rounded = rule.rounded(np.array(values), 1.0, task())
    assert np.allclose(rounded / step, np.rint(rounded / step)) and np.abs(rounded).max() <= 1
    assert np.abs(rounded - values).max() <= step * 1.0001


def test_rounding_is_right_on_average() -> None:
    rule, value = Compression(bits=3), np.full(20_000, 0.123)
    rounded = rule.rounded(value, 1.0, task(5))
    assert abs(rounded.mean() - 0.123) < 4 * rule.step(1.0) / 2 / np.sqrt(20_000)


PARAMS = {"family": "logistic", "target": "y", "features": [f"x{i}" for i in range(20)], "rounds": 60, "clip": 1.0}
COLUMNS: dict[str, dict[str, Any]] = {
    **{f"x{i}": {"range": [-4, 4]} for i in range(20)},
    "y": {"dtype": "integer", "values": [0, 1], "role": "label"},
}


@pytest.mark.parametrize("protection", ["plain", "secagg"])
@pytest.mark.parametrize(
    "compress", [{"keep": 0.25}, {"keep": 0.25, "choose": "top"}, {"bits": 8}, {"keep": 0.5, "bits": 8}]
)
def test_averaging_learns_with_it_under_masks(federation: Any, protection: str, compress: dict[str, Any]) -> None:
    random = np.random.default_rng(2)
    tables, truth = {}, random.normal(0, 1, 20)
    for site in ("a", "b", "c"):
        x = random.normal(0, 1, (150, 20)).clip(-4, 4)
        y = (random.random(150) < 1 / (1 + np.exp(-x @ truth))).astype(float)
        tables[site] = federation.table({**{f"x{i}": x[:, i] for i in range(20)}, "y": y}, COLUMNS, max_rows=1000)
    runs = {}
    for name, rule in (("whole", {}), ("less", compress)):
        plan = federation.plan("horizontal.fedavg", {**PARAMS, "compress": rule}, tables, protection=protection)
        runs[name] = federation.run(plan, tables)["result"]
        runs[f"{name} bytes"] = sum(b["bytes"] for b in federation.releases() if b["step"] == "reply")
    assert runs["less"]["history"][-1] < runs["whole"]["history"][0] * 0.75
    one, other = runs["whole"]["model"].weights, runs["less"]["model"].weights
    assert np.corrcoef(one, other)[0, 1] > 0.9
    if "keep" in compress or protection == "secagg":
        assert runs["less bytes"] < 0.8 * runs["whole bytes"]
