"""Sparse and quantised updates: sums stay sums, nothing is lost, and rounding is right on average."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.compression import coded
from atoll.compression.known import Known
from atoll.compression.update import PLACES, Compression
from atoll.contract.errors import PlanError, ProtocolError
from atoll.contract.program import Cohort, build
from atoll.contract.rounds import Task, TaskId
from atoll.runtime.study import check_plan

DRAWN = [25, 58, 72, 85, 103, 117, 139, 165, 179, 198]


def task(seed: int = 0, **arrays: Any) -> Task:
    return Task(TaskId("0" * 32, 0, 0, "reply", "s"), arrays, (seed,))


def knowing(last: Any) -> Known:
    known = Known(len(last), 1)
    known.note(np.arange(len(last)), np.asarray(last, float), 0)
    return known


@given(
    size=st.integers(1, 300),
    keep=st.floats(0.01, 1),
    number=st.integers(1, 50),
    choose=st.sampled_from(["random", "top", "due"]),
)
def test_the_support_is_the_same_for_everybody(size: int, keep: float, number: int, choose: Any) -> None:
    rule, known = Compression(keep=keep, choose=choose), knowing(np.arange(size))
    support = rule.support(known, 7, number)
    assert len(support) == max(1, round(keep * size))
    assert (np.diff(support) > 0).all() and support[0] >= 0 and support[-1] < size
    told = rule.telling(known, 1.0, 7, number)
    if keep < 1:
        assert np.array_equal(rule.told(task(**told), size), support)
    assert sum(array.nbytes for array in told.values()) <= 16 + (16 + size // 8 + 1 + size) * (choose != "random")


def test_what_is_drawn_is_every_coordinates_turn() -> None:
    rule, times = Compression(keep=0.1), np.zeros(200)
    for number in range(1000):
        times[rule.support(knowing(times), 3, number)] += 1
    assert abs(times - 100).max() < 5 * np.sqrt(1000 * 0.1 * 0.9)


def test_the_draw_is_the_same_for_every_version_of_numpy() -> None:
    assert Compression(keep=0.05).support(knowing(np.zeros(200)), 7, 3).tolist() == DRAWN


def test_top_takes_the_largest_sums() -> None:
    last = np.zeros(100)
    last[[3, 50, 77]] = 5, -9, 4
    support = Compression(keep=0.06, choose="top").support(knowing(last), 1, 1)
    assert {3, 50, 77} <= set(support.tolist()) and len(support) == 6


def test_due_are_those_that_have_moved_most_since_they_were_asked_for() -> None:
    known = knowing([1.0, 0.3, 0.0, 0.1])
    assert np.allclose(known.due(1), [1, 0.3, 0, 0.1]) and np.allclose(known.due(3), [3, 0.9, 0, 0.3])
    known.note(np.array([0]), np.array([-4.0]), 3)  # after three rounds: 4/3 in each
    assert np.allclose(known.due(4), [4 / 3, 1.2, 0, 0.4])
    again = Known(4, 1).resumed(known.arrays(("last", "pace", "seen")))
    assert np.array_equal(again.due(5), known.due(5)) and again.last.tolist() == [-4, 0.3, 0, 0.1]


def test_what_was_never_asked_for_is_taken_to_move_as_the_others_do() -> None:
    known = Known(1000, 1)
    known.note(np.arange(500), np.full(500, 2.0), 0)
    due = known.due(1)
    assert due[:500].tolist() == [2.0] * 500 and 1.9 * 2 < due[500:].mean() < 2.1 * 2
    rounds, asked = Compression(keep=0.1, choose="due"), set[int]()
    for number in range(1, 16):
        support = rounds.support(known, 0, number)
        asked |= set(support.tolist())
        known.note(support, np.full(len(support), 1.0), number)
    assert len(asked) > 800


@pytest.mark.parametrize(("last", "reach"), [([0, 0], 1.0), ([0.01, -0.01], 0.08), ([5, 5], 1.0), ([1e-9, 0], 1e-4)])
def test_a_told_grid_reaches_as_far_as_sums_make_likely(last: list[float], reach: float) -> None:
    rule = Compression(bits=4, grid="told")
    assert rule.reach(knowing(last), 1.0) == pytest.approx(reach)
    assert rule.reached(task(**rule.telling(knowing(last), 1.0, 0, 0)), 1.0) == pytest.approx(reach)
    assert rule.reached(task(reach=np.array(7.0)), 1.0) == 1.0


@pytest.mark.parametrize("draw", [None, [0], [0, -1], [0.0, 1.0], [[0, 1]]])
def test_a_malformed_draw_is_refused(draw: Any) -> None:
    given = {} if draw is None else {"draw": np.array(draw)}
    with pytest.raises(ProtocolError):
        Compression(keep=0.3).told(task(**given), 10)


@pytest.mark.parametrize("best", [None, [1], [1, 2, 3], [8, 99]])
def test_malformed_best_coordinates_are_refused(best: Any) -> None:
    given = {"draw": np.array([0, 1])}
    if best is not None:
        given["best"] = coded.encode(np.zeros(len(best), np.uint8), np.array(best), 100, PLACES)
    with pytest.raises(ProtocolError):
        Compression(keep=0.5, choose="top").told(task(**given), 10)


@given(st.lists(st.floats(-5, 5), min_size=4, max_size=40), st.integers(1, 30), st.sampled_from(["random", "own"]))
def test_what_is_left_out_is_sent_later(values: list[float], rounds: int, choose: Any) -> None:
    change, state = np.array(values), dict[str, np.ndarray]()
    rule, sent = Compression(keep=0.25, bits=4, choose=choose), np.zeros(len(values))
    for number in range(rounds):
        whole = rule.carried(change.copy(), state)
        places = rule.support(knowing(change), 3, number)
        places = places[rule.chosen(whole[places])]
        if rule.own:
            told = rule.written(whole[places], places, len(whole), task(number))[1]
        else:
            told = rule.rounded(whole[places], 50.0, task(number))
        sent[places] += told
        whole[places] -= told
        rule.kept(whole, state)
    assert len(places) == max(1, round(0.25 * len(values)))
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


def sites(federation: Any, names: str = "abc") -> dict[str, Any]:
    random = np.random.default_rng(2)
    tables, truth = {}, random.normal(0, 1, 20)
    for site in names:
        x = random.normal(0, 1, (150, 20)).clip(-4, 4)
        y = (random.random(150) < 1 / (1 + np.exp(-x @ truth))).astype(float)
        tables[site] = federation.table({**{f"x{i}": x[:, i] for i in range(20)}, "y": y}, COLUMNS, max_rows=1000)
    return tables


@pytest.mark.parametrize(
    "compress",
    [{"keep": 0.25}, {"keep": 0.25, "choose": "top", "down": {"changes": True, "keep": 0.5}}, {"bits": 8},
     {"keep": 0.5, "bits": 8, "down": {"changes": True, "bits": 8, "lossless": True}}],
    ids=str,
)  # fmt: skip
def test_averaging_learns_with_it(federation: Any, drive: Any, compress: dict[str, Any]) -> None:
    tables = sites(federation)
    whole, less = (driven(drive, tables, {**PARAMS, "compress": rule}).result for rule in ({}, compress))
    assert less["history"][-1] < whole["history"][0] * 0.75
    assert np.corrcoef(whole["model"].weights, less["model"].weights)[0, 1] > 0.9


ALONE: list[dict[str, Any]] = [
    {"choose": "own", "keep": 0.3}, {"choose": "own", "keep": 0.3, "bits": 6, "lossless": True},
    {"precision": "bfloat16"}, {"lossless": True}, {"keep": 0.5, "precision": "float16"},
]  # fmt: skip


@pytest.mark.parametrize("compress", ALONE, ids=str)
def test_messages_that_stand_alone_need_single_replies(federation: Any, drive: Any, compress: dict[str, Any]) -> None:
    tables, params = sites(federation), {**PARAMS, "compress": compress}
    made = build("horizontal.fedavg", params)
    assert made.capabilities.needs >= {"gather"} and "sum" not in made.capabilities.needs
    for protection in ("secagg", "paillier"):
        with pytest.raises(PlanError) as caught:
            check_plan(federation.plan("horizontal.fedavg", params, tables, protection=protection))
        assert caught.value.code == "plan.illegal-combination" and caught.value.field == "gather"
    told = driven(drive, tables, params).result
    whole = driven(drive, tables, PARAMS).result
    assert np.corrcoef(told["model"].weights, whole["model"].weights)[0, 1] > 0.9


NOTHING_LOST: list[dict[str, Any]] = [
    {}, {"choose": "top"}, {"choose": "own"}, {"down": {"changes": True}}, {"down": {"lossless": True}},
    {"down": {"changes": True, "lossless": True}},
]  # fmt: skip


@pytest.mark.parametrize("compress", NOTHING_LOST, ids=str)
def test_where_nothing_is_lost_it_is_the_plain_algorithm(federation: Any, drive: Any, compress: Any) -> None:
    tables = sites(federation)
    plain = driven(drive, tables, PARAMS | {"rounds": 6}).result
    other = driven(drive, tables, PARAMS | {"rounds": 6, "compress": compress}).result
    assert other["model"].weights.tobytes() == plain["model"].weights.tobytes()


EVERYTHING: list[dict[str, Any]] = [
    {"keep": 0.3, "choose": "top", "bits": 6, "down": {"changes": True, "keep": 0.4, "bits": 8}},
    {"choose": "own", "keep": 0.2, "bits": 4, "lossless": True, "down": {"changes": True, "precision": "float16"}},
    {"keep": 0.3, "choose": "due", "bits": 4, "grid": "told", "down": {"bits": 8}},
]


def absent(number: int) -> list[str]:
    """Sites come and go."""
    return {1: ["a"], 2: ["a", "b"], 4: ["c"], 5: ["c", "d"]}.get(number, [])


@pytest.mark.parametrize("compress", EVERYTHING, ids=str)
@pytest.mark.parametrize("drawn", [None, 3])
def test_it_goes_on_from_any_checkpoint(federation: Any, drive: Any, compress: Any, drawn: int | None) -> None:
    tables = sites(federation, "abcd")
    params = PARAMS | {"rounds": 9, "checkpoint_every": 2, "compress": compress, "sites_per_round": drawn}
    away: Any = {} if drawn else {"absent": absent}
    whole = driven(drive, tables, params, **away)
    for (done, checkpoint), kept in zip(whole.checkpoints, whole.kept, strict=True):
        more = {**away, "first_round": done, "kept": kept}
        again = driven(drive, tables, params, start=dict(checkpoint.state), **more)
        assert again.result["model"].weights.tobytes() == whole.result["model"].weights.tobytes()
        assert again.result["dense"] == whole.result["dense"]


def test_all_that_cannot_be_combined_is_told_at_once_before_data_is_read(federation: Any) -> None:
    compress = {"rank": 2, "choose": "own", "keep": 0.1, "bits": 4, "precision": "float16", "down": {"keep": 0.1}}
    params = {**PARAMS, "compress": compress, "aggregate": {"rule": "median", "groups": 2}}
    tables = sites(federation)
    with pytest.raises(PlanError) as caught:
        check_plan(federation.plan("horizontal.fedavg", params, tables, protection="secagg"))
    text = str(caught.value)
    for said in ("down.changes", "bits and precision", "aggregate.groups", "aggregate.rule", "rank and keep", "gather"):
        assert said in text, said


def bytes_back(federation: Any) -> list[int]:
    return [body["bytes"] for body in federation.releases() if body["handler"] == "train" and body["step"] == "reply"]


@pytest.mark.parametrize(
    ("protection", "bits", "weighting", "each"),
    [("plain", 4, "rows", 0.5), ("plain", 12, "sites", 1.5), ("secagg", 4, "sites", 1), ("secagg", 8, "rows", 4)],
)  # fmt: skip
def test_so_many_bits_travel(federation: Any, protection: str, bits: Any, weighting: Any, each: float) -> None:
    random, size = np.random.default_rng(0), 400
    columns = {**{f"x{i}": {"range": [-4, 4]} for i in range(size)}, "y": COLUMNS["y"]}
    tables = {}
    for site in "abc":
        data = {f"x{i}": random.normal(0, 1, 30).clip(-4, 4) for i in range(size)}
        tables[site] = federation.table({**data, "y": random.integers(0, 2, 30)}, columns, max_rows=1000)
    params = {**PARAMS, "features": [f"x{i}" for i in range(size)], "rounds": 1, "weighting": weighting}
    plan = federation.plan("horizontal.fedavg", {**params, "compress": {"bits": bits}}, tables, protection=protection)
    federation.run(plan, tables)
    assert all(sent - each * size < 80 for sent in bytes_back(federation))


@pytest.mark.parametrize("compress", [{"bits": 12}, {"keep": 0.3, "bits": 4, "grid": "told"}], ids=str)
def test_masks_change_a_compressed_sum_by_no_more_than_its_resolution(federation: Any, compress: Any) -> None:
    tables, found = sites(federation), []
    for protection in ("plain", "secagg"):
        params = {**PARAMS, "rounds": 2, "compress": compress}
        plan = federation.plan("horizontal.fedavg", params, tables, protection=protection)
        found.append(federation.run(plan, tables)["result"]["model"].weights)
    assert np.allclose(*found, rtol=0, atol=1e-12)


def test_the_ratio_is_told(federation: Any) -> None:
    tables = sites(federation)
    params = {**PARAMS, "rounds": 2, "compress": {"bits": 8, "down": {"changes": True}}}
    federation.run(federation.plan("horizontal.fedavg", params, tables), tables)
    result, _ = federation.store.result(federation.run_id)
    told, wire = result["compression"], result["wire"]
    assert told["dense_to_sites_bytes"] == 2 * 3 * 21 * 4 and told["dense_from_sites_bytes"] == 2 * 3 * 22 * 4
    assert told["ratio_to_sites"] == wire["to_sites_bytes"] / told["dense_to_sites_bytes"]
    assert "dense" not in result["output"]


# ---------------------------------------------------------------- low rank


def of_a_network(random: np.random.Generator, rows: int) -> dict[str, Any]:
    x = random.normal(0, 1, (rows, 20)).clip(-4, 4)
    return {**{f"x{i}": x[:, i] for i in range(20)}, "y": (x[:, 0] * x[:, 1] > 0).astype(float)}


NETWORK = {
    "model": {"kind": "mlp", "features": [f"x{i}" for i in range(20)], "hidden": [24, 12]}, "target": "y",
    "rounds": 6, "learning_rate": 0.3, "local_epochs": 1, "clip": 1.0, "batch_size": 16,
}  # fmt: skip


def networks(federation: Any) -> dict[str, Any]:
    random = np.random.default_rng(3)
    return {
        s: federation.table(of_a_network(random, n), COLUMNS, max_rows=200)
        for s, n in zip("abcd", (40, 60, 50, 30), strict=True)
    }


def test_low_rank_rounds_are_sums_under_every_mask(federation: Any) -> None:
    pytest.importorskip("torch")
    tables, found = networks(federation), {}
    for protection in ("plain", "secagg"):
        params = {**NETWORK, "rounds": 3, "compress": {"rank": 2, "down": {"changes": True}}}
        plan = federation.plan("horizontal.fedavg", params, tables, protection=protection)
        found[protection] = federation.run(plan, tables)["result"]
    assert found["plain"]["history"][-1] < found["plain"]["history"][0]
    assert np.allclose(found["plain"]["model"].weights, found["secagg"]["model"].weights, rtol=0, atol=2e-4)
    sent = {body["handler"] for body in federation.releases() if body["step"] == "reply"}
    assert sent == {"train", "train_right"}


def test_a_rank_that_is_enough_is_averaging_and_a_site_that_is_gone_halfway_keeps_its_change(
    drive: Any, federation: Any
) -> None:
    pytest.importorskip("torch")
    tables = networks(federation)
    params = {**NETWORK, "rounds": 1, "compress": {"rank": 2}}
    whole = driven(drive, tables, {**NETWORK, "rounds": 1}).reduced[0]
    halfway = driven(drive, tables, params, absent=lambda number: ["b"] if number == 1 else [])
    made = build("horizontal.fedavg", params)
    model = made.model(tables["a"].schema)
    mean = whole["weights"] / whole["weight"]
    first = made.begin(model, Cohort(tuple(tables), tables["a"].schema, 5))["weights"]
    moved = driven(drive, tables, params).result["model"].weights - first
    biases = [where for name, where in model.layers.items() if name.endswith("bias")]
    assert all(np.allclose(moved[where], mean[where], atol=1e-5) for where in biases)
    assert 0.1 < np.linalg.norm(moved) / np.linalg.norm(mean) <= 1.0 + 1e-6
    whole_change, rest = (run.desks["b"].state["residual"] for run in (halfway, driven(drive, tables, params)))
    assert np.linalg.norm(rest) < np.linalg.norm(whole_change) and halfway.rounds[1].sites == tuple("abcd")


@pytest.mark.parametrize("handler", ["train_right"])
def test_a_coordinator_cannot_ask_for_factors_that_the_plan_has_not(federation: Any, handler: str) -> None:
    table = sites(federation)["a"]
    made: Any = build("horizontal.fedavg", PARAMS)
    with pytest.raises(ProtocolError) as caught:
        made.train_right(SimpleNamespace(table=table, state={}), task(left=np.zeros(0)))
    assert caught.value.code == "task.order"


def driven(drive: Any, tables: Any, params: Any, start: Any = None, **more: Any) -> Any:
    steps = build("horizontal.fedavg", params).coordinate(Cohort(tuple(tables), tables["a"].schema, 5), start)
    return drive(steps, tables, **more)
