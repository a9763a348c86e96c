"""Boosted trees are those of the pooled rows, to the bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError
from atoll.contract.rounds import Sum
from atoll.models.trees import FEATURE, THRESHOLD

from .boosted_rows import SIZES, halves, params_of, steps, tables_of

SORTS: list[dict[str, Any]] = [
    params_of("value"),
    params_of("binary"),
    params_of("class"),
    params_of("count", objective="poisson"),
    params_of("value", objective={"kind": "quantile", "alpha": 0.8}),
    params_of("time", objective={"kind": "cox", "event": "binary"}),
    params_of("binary", categorical=["n"], monotone={"b": 1, "a": -1}, colsample=0.5),
    params_of("count", objective="poisson", splits="random", trees=6),
    params_of("class", splits="random"),
    params_of("value", max_cells=64, max_depth=4, l2=0.0, min_split_gain=0.5),
    params_of("value", weight="weight"),
    params_of("class", weight="weight", splits="random"),
    params_of("count", objective={"kind": "poisson", "exposure": "years"}, weight="weight", min_child_weight=3),
]


# ---------------------------------------------------------------- the pooled rows' trees


@pytest.mark.parametrize("params", SORTS, ids=lambda p: f"{p.get('objective', p['target'])}-{len(p)}")
def test_they_are_those_of_one_site_that_has_all_rows(federation: Any, drive: Any, params: dict[str, Any]) -> None:
    apart, whole = tables_of(federation)
    one, other = (drive(steps(params, tables), tables) for tables in (whole, apart))
    assert one.result["model"].weights.tobytes() == other.result["model"].weights.tobytes()
    assert one.result["history"] == other.result["history"]
    losses = one.result["history"]
    assert losses[-1] < losses[0], "they learn"
    assert (one.result["model"].words[:, :, FEATURE] >= 0).any()


@pytest.mark.parametrize("protection", ["plain", "secagg", pytest.param("paillier", marks=pytest.mark.slow)])
def test_they_are_so_under_every_exact_protection(federation: Any, protection: str) -> None:
    apart, whole = tables_of(federation, (60, 40, 50))
    params = params_of("class", trees=2, max_depth=2, max_bins=4, features=["a", "kind"])
    federation.run(federation.plan("trees.boosted", params, whole), whole)
    pooled_weights = federation.store.result(federation.run_id)[1]["weights"]
    federation.run(federation.plan("trees.boosted", params, apart, protection=protection), apart)
    assert federation.store.result(federation.run_id)[1]["weights"].tobytes() == pooled_weights.tobytes()


@pytest.mark.slow
def test_they_are_so_under_ckks(federation: Any) -> None:
    pytest.importorskip("tenseal")
    apart, whole = tables_of(federation, (60, 40, 50))
    params = params_of("binary", trees=2, max_depth=2, max_bins=4, features=["a", "kind"])
    federation.run(federation.plan("trees.boosted", params, whole), whole)
    pooled_weights = federation.store.result(federation.run_id)[1]["weights"]
    federation.run(federation.plan("trees.boosted", params, apart, protection="ckks"), apart)
    found = federation.store.result(federation.run_id)[1]["weights"]
    np.testing.assert_allclose(found, pooled_weights, rtol=1e-4, atol=1e-4)


def test_edges_from_quantiles_are_the_pooled_rows_and_so_are_the_trees(federation: Any, drive: Any) -> None:
    apart, whole = tables_of(federation)
    params = params_of("binary", binning="quantiles", max_bins=32)
    one, other = (drive(steps(params, tables), tables).result["model"] for tables in (whole, apart))
    assert one.weights.tobytes() == other.weights.tobytes()
    used = one.words[one.words[:, :, FEATURE] == 2][:, THRESHOLD]
    assert set(used) <= set(range(1, 10)), "few distinct values have an edge each"


def test_given_edges_are_the_only_thresholds(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    params = params_of("value", edges={"a": [-1, 0, 1], "b": [450]}, binning="even")
    driven = drive(steps(params, apart), apart)
    words = driven.result["model"].words
    assert set(words[words[:, :, FEATURE] == 0][:, THRESHOLD]) <= {-1.0, 0.0, 1.0, -float(np.finfo(np.float32).max)}
    assert driven.rounds[0].name == "begin", "no round is spent on edges"


# ---------------------------------------------------------------- rounds and sizes


def test_a_tree_takes_a_round_a_level_and_asks_the_smaller_children(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    driven = drive(steps(params_of("value", min_rows=1, min_child_weight=0), apart), apart)
    names = [item.name for item in driven.rounds]
    assert names == ["begin"] + ["root", "level", "level"] * 4 + ["losses"]
    for item, total in zip(driven.rounds, driven.reduced, strict=True):
        if item.name == "level":
            nodes = np.asarray(item.send["nodes"])
            assert len(nodes) <= 2 ** (int(np.log2(nodes[:, 1].max() + 1)) - 1), "one of two siblings"
            assert total["n"][:, :17].sum(axis=1).max() <= sum(SIZES) / 2, "the smaller one"
    assert "h" not in driven.rounds[1].reply, "a constant Hessian is the count"


def test_a_level_of_many_cells_is_asked_in_several_rounds(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    some = drive(steps(params_of("value", max_cells=64), apart), apart)
    every = drive(steps(params_of("value"), apart), apart)
    assert some.result["model"].weights.tobytes() == every.result["model"].weights.tobytes()
    assert len(some.rounds) > len(every.rounds)
    assert max(math.prod(item.reply["g"].shape) for item in some.rounds if "g" in item.reply) <= 64


def test_only_some_features_cells_are_asked(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    driven = drive(steps(params_of("value", colsample=0.5), apart), apart)
    drawn = [tuple(item.send["columns"]) for item in driven.rounds if item.name == "root"]
    assert all(len(columns) == 2 for columns in drawn) and len(set(drawn)) > 1
    words = driven.result["model"].words
    for step, columns in enumerate(drawn):
        used = words[step, :, FEATURE]
        assert set(used[used >= 0].astype(int)) <= set(columns)


# ---------------------------------------------------------------- rows that count


def test_each_site_draws_its_own_rows_for_each_tree(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    driven = drive(steps(params_of("value", subsample=0.5, binning="even"), apart), apart)
    counted = [int(total["n"][0, :17].sum()) for item, total in zip(driven.rounds, driven.reduced, strict=True)
               if item.name == "root"]  # fmt: skip
    assert len(set(counted)) > 1
    assert all(0.35 * sum(SIZES) < n < 0.65 * sum(SIZES) for n in counted)
    losses = driven.result["history"]
    assert losses[-1] < losses[0]


def test_leaves_hold_as_many_rows_as_the_plans_smallest_group(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    model = drive(steps(params_of("value", min_rows=1), apart, min_group_size=25), apart).result["model"]
    leaves = model.words[:, :, FEATURE] == -1
    assert model.words[:, :, 4][leaves].min() >= 25, "of squared loss the cover is the number of rows"


def test_monotone_constraints_hold_everywhere(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    params = params_of("value", monotone={"b": -1}, trees=8)
    model = drive(steps(params, apart), apart).result["model"]
    table = next(iter(apart.values()))
    x = np.repeat(model.inputs(table)[:20], 50, axis=0)
    x[:, 1] = np.tile(np.linspace(0, 1000, 50), 20)
    assert (np.diff(model.margins(x)[:, 0].reshape(20, 50), axis=1) <= 1e-12).all()


# ---------------------------------------------------------------- ending early


def test_it_ends_where_the_pooled_held_out_rows_say(federation: Any, drive: Any) -> None:
    """Losses by the model itself, of 0, 1, … trees, over all sites' held-out rows together."""
    apart, _ = tables_of(federation)
    params = params_of("binary", trees=14, learning_rate=1.0, stop={"patience": 3}, min_rows=1)
    training, held = halves(apart)
    result = drive(steps(params, training), training, held).result
    labels = np.concatenate([np.asarray(t["binary"]) for t in held.values()])
    model, losses = result["model"], []
    longest = drive(steps({**params, "stop": {}}, training), training, held).result
    for size in range(result["iterations"] + 1):
        words = longest["model"].words.copy()
        words[size:] = 0
        words[size:, :, FEATURE] = -2
        words[size:, 0, FEATURE] = -1
        some = longest["model"].with_weights(np.concatenate([longest["model"].base, words.ravel()]))
        p = np.concatenate([some.predict(t) for t in held.values()])
        losses.append(float(-(labels * np.log(p) + (1 - labels) * np.log1p(-p)).mean()))
    np.testing.assert_allclose(result["held_out"], losses, atol=1e-5)
    best = int(np.argmin(losses))
    assert result["kept"] == best
    assert result["iterations"] == best + 3 < 14
    assert (model.words[best:, 0, FEATURE] == -1).all() and (model.words[:best, 0, FEATURE] >= 0).any()


def test_ending_early_needs_held_out_rows(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    with pytest.raises(PlanError) as caught:
        drive(steps(params_of("binary", stop={"patience": 3}), apart), apart)
    assert caught.value.code == "plan.no-holdout"


# ---------------------------------------------------------------- sites that come and go


@pytest.mark.parametrize("params", [SORTS[1], SORTS[5], {**SORTS[8], "trees": 8}], ids=["logistic", "cox", "random"])
def test_a_site_that_was_away_takes_part_again(federation: Any, drive: Any, params: dict[str, Any]) -> None:
    apart, _ = tables_of(federation)
    away = {3: ["s1"], 4: ["s1"], 5: ["s1"], 8: ["s2"]}
    driven = drive(steps(params, apart), apart, absent=lambda number: away.get(number, []))
    number = max(len(item.send_to) for item in driven.rounds)
    assert number >= 1, "it is sent what it lacks"
    took = [set(reply) for reply in driven.replies]
    assert "s1" not in took[3] and "s1" in took[6]
    assert driven.result["history"][-1] < driven.result["history"][0]


def test_siblings_are_asked_when_a_sum_is_of_other_sites(federation: Any, drive: Any) -> None:
    """A level that only two of three answered: what is grown below is of these two alone, as if the third were not."""
    apart, _ = tables_of(federation)
    params = params_of("value", trees=1)
    driven = drive(steps(params, apart), apart, absent=lambda number: ["s2"] if number >= 2 else [])
    names = [item.name for item in driven.rounds]
    assert names[:4] == ["begin", "root", "level", "level"]
    first, second = (np.asarray(driven.rounds[i].send["nodes"]).tolist() for i in (2, 3))
    assert sorted(first + second) == [[0, 1], [0, 2]], "the smaller child, then its sibling"
    cover = driven.result["model"].words[0, :, 4]
    assert cover[0] == sum(SIZES)
    two = SIZES[0] + SIZES[1]
    assert cover[1] + cover[2] == two


def test_sites_whose_memory_is_lost_go_on_from_their_journal(federation: Any) -> None:
    """Between any two rounds the sites' processes may be new: ``drive`` makes every program anew for each round. Here
    programs are kept, as in a process that lives, and the bits are the same."""
    apart, _ = tables_of(federation)
    params = params_of("class", trees=2)
    federation.run(federation.plan("trees.boosted", params, apart), apart)
    lived = federation.store.result(federation.run_id)[1]["weights"]

    def forgetful(name: str, endpoint: Any) -> Any:
        def handle(message: Any, progress: Any) -> Any:
            for opened in federation.sites[name]._runs.values():
                opened._program = None
            return endpoint(message, progress)

        return handle

    federation.run(federation.plan("trees.boosted", params, apart), apart, wrap=forgetful)
    assert federation.store.result(federation.run_id)[1]["weights"].tobytes() == lived.tobytes()


def test_all_rounds_are_sums(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    assert all(isinstance(item.reduce, Sum) for item in drive(steps(params_of("class"), apart), apart).rounds)
