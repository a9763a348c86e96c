"""Robust rules: each equals a second implementation in plain loops, keeps its invariances, and withstands attackers.

Rules are found by their registration, so that one more is held to the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from atoll.aggregation.rule import RULES, Aggregation, Asked, means
from atoll.contract.errors import PlanError
from atoll.contract.updates import Update

TRANSLATED = sorted(RULES.keys() - {"norm_clipping", "fltrust"})
"""Those for which no change at all is nothing special."""
every_rule = pytest.mark.parametrize("name", sorted(RULES))


def combined(name: str, changes: Any, attackers: int = 1, root: int = 0, **options: Any) -> tuple[Any, Any]:
    rule = RULES[name]
    return rule.combine(np.asarray(changes, float), Asked(attackers, rule.options(**options), root))


def cohort(name: str, seed: int, attackers: int = 2, size: int = 5, more: int = 2) -> Any:
    """Honest changes about a common one: as many as the rule needs, less the attackers, and some more."""
    random = np.random.default_rng(seed)
    count = max(RULES[name].least(attackers), 2 * attackers + 1) - attackers + more
    return random.normal(size=size) + 0.3 * random.normal(size=(count, size))


# ---------------------------------------------------------------- written a second time


def _krum_scores(changes: Any, attackers: int) -> list[float]:
    found = []
    for i, one in enumerate(changes):
        others = sorted(float(((one - other) ** 2).sum()) for j, other in enumerate(changes) if j != i)
        found.append(sum(others[: max(1, len(changes) - attackers - 2)]))
    return found


def naive_median(x: Any, f: int) -> Any:
    return [sorted(c)[len(c) // 2] if len(c) % 2 else sum(sorted(c)[len(c) // 2 - 1 :][:2]) / 2 for c in x.T]


def naive_trimmed_mean(x: Any, f: int) -> Any:
    return [sum(sorted(column)[f : len(column) - f]) / (len(column) - 2 * f) for column in x.T]


def naive_krum(x: Any, f: int) -> Any:
    found = _krum_scores(x, f)
    return x[found.index(min(found))]


def naive_multi_krum(x: Any, f: int) -> Any:
    found = _krum_scores(x, f)
    best = sorted(range(len(x)), key=lambda i: found[i])[: len(x) - f - 2]
    return sum(x[i] for i in best) / len(best)


def naive_bulyan(x: Any, f: int) -> Any:
    left, chosen = list(range(len(x))), []
    for _ in range(len(x) - 2 * f):
        found = _krum_scores(x[left], f)
        total = [sum(float(((x[i] - x[j]) ** 2).sum()) for j in left) for i in left]  # where two are alike
        chosen.append(left.pop(min(range(len(left)), key=lambda i: (found[i], total[i]))))
    result = []
    for column in x[chosen].T:
        middle = float(np.median(column))
        result.append(np.mean(sorted(column, key=lambda value: abs(value - middle))[: len(x) - 4 * f]))
    return result


def naive_geometric_median(x: Any, f: int) -> Any:
    def total(point: Any) -> float:
        return float(np.linalg.norm(x - point, axis=1).sum())

    options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 20_000, "maxfev": 20_000}
    return minimize(total, x.mean(0), method="Nelder-Mead", options=options).x


def naive_norm_clipping(x: Any, f: int) -> Any:
    radius = np.median([np.sqrt((one**2).sum()) for one in x])
    return sum(one * min(1, radius / np.sqrt((one**2).sum())) for one in x) / len(x)


def naive_centred_clipping(x: Any, f: int) -> Any:
    centre = np.array(naive_median(x, f))
    for _ in range(3):
        radius = np.median([np.sqrt(((one - centre) ** 2).sum()) for one in x])
        away = [max(np.sqrt(((one - centre) ** 2).sum()), 1e-300) for one in x]
        steps = [(one - centre) * min(1, radius / d) for one, d in zip(x, away, strict=True)]
        centre = centre + sum(steps) / len(x)
    return centre


def naive_fltrust(x: Any, f: int) -> Any:
    root, length = x[0], np.sqrt((x[0] ** 2).sum())
    lengths = [np.sqrt((one**2).sum()) for one in x]
    trust = [max(0.0, float(one @ root) / (length * own)) for one, own in zip(x, lengths, strict=True)]
    return sum(t * one * length / own for t, one, own in zip(trust, x, lengths, strict=True)) / sum(trust)


NAIVE: dict[str, Callable[[Any, int], Any]] = {
    name.removeprefix("naive_"): made for name, made in list(globals().items()) if name.startswith("naive_")
}


@every_rule
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 4))
def test_it_equals_a_second_implementation(name: str, seed: int, size: int) -> None:
    changes = np.vstack([cohort(name, seed, size=size), 5 + cohort(name, seed + 1, size=size)[:2]])
    value, _ = combined(name, changes, 2)
    naive = np.asarray(NAIVE[name](changes, 2))
    if name == "geometric_median":  # the least sum of distances, which is flat about its minimum
        sums = [float(np.linalg.norm(changes - point, axis=1).sum()) for point in (value, naive)]
        assert sums[0] <= sums[1] * (1 + 1e-6)
    else:
        assert np.allclose(value, naive, rtol=1e-9, atol=1e-12)


def test_krums_choice_in_one_dimension_by_hand() -> None:
    """Of 0, 1, 3, 10, 11 with f = 1 each is scored by its two nearest: 1 has 1 + 4, the least."""
    value, trust = combined("krum", [[0.0], [1], [3], [10], [11]])
    assert value.tolist() == [1] and trust.tolist() == [0, 1, 0, 0, 0]


def test_more_columns_than_are_sorted_at_a_time_are_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    changes = random.normal(size=(11, 1000))
    whole = {name: combined(name, changes, 2) for name in ("median", "trimmed_mean", "bulyan")}
    for module in ("trimmed_mean", "bulyan"):
        monkeypatch.setattr(f"atoll.aggregation.{module}.PIECE", 300)
    for name, (value, trust) in whole.items():
        again = combined(name, changes, 2)
        assert np.array_equal(again[0], value) and np.allclose(again[1], trust)


# ---------------------------------------------------------------- invariances

seeds = given(seed=st.integers(0, 2**32 - 1))


@every_rule
@seeds
def test_the_order_of_the_sites_does_not_matter(name: str, seed: int) -> None:
    changes = cohort(name, seed)
    order = np.random.default_rng(seed).permutation(len(changes))
    value, trust = combined(name, changes, 2)
    again, moved = combined(name, changes[order], 2, root=int(np.flatnonzero(order == 0)[0]))
    assert np.allclose(again, value, rtol=1e-9, atol=1e-12) and np.allclose(moved, trust[order], atol=1e-9)


@every_rule
@given(seed=st.integers(0, 2**32 - 1), factor=st.sampled_from([1e-6, 0.25, 3.0, 1e6]))
def test_changes_in_other_units_give_the_result_in_these(name: str, seed: int, factor: float) -> None:
    changes = cohort(name, seed)
    assert np.allclose(combined(name, factor * changes, 2)[0], factor * combined(name, changes, 2)[0], rtol=1e-8)


@pytest.mark.parametrize("name", TRANSLATED)
@seeds
def test_what_all_have_in_common_is_in_the_result(name: str, seed: int) -> None:
    changes = cohort(name, seed)
    shift = np.random.default_rng(seed).normal(size=changes.shape[1])
    assert np.allclose(combined(name, changes + shift, 2)[0], combined(name, changes, 2)[0] + shift, atol=1e-8)


@every_rule
@seeds
def test_sites_that_agree_are_taken_at_their_word(name: str, seed: int) -> None:
    one = np.random.default_rng(seed).normal(size=4)
    value, trust = combined(name, np.tile(one, (len(cohort(name, 0)), 1)), 2)
    assert np.allclose(value, one, rtol=1e-12)
    assert (trust >= 0).all() and trust.sum() <= 1 + 1e-9


@every_rule
def test_no_change_at_all_is_no_change(name: str) -> None:
    value, trust = combined(name, np.zeros_like(cohort(name, 0)), 2)
    assert not value.any() and np.isfinite(trust).all()


# ---------------------------------------------------------------- breakdown


@every_rule
@given(
    seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1.0, 10.0, 1e6, 1e100]), together=st.booleans(),
    attackers=st.integers(1, 4),
)  # fmt: skip
def test_attackers_of_any_size_move_it_no_further_than_honest_sites_go(
    name: str, seed: int, size: float, together: bool, attackers: int
) -> None:
    """As many attackers as it promises to withstand, and no honest site more than that takes."""
    honest = cohort(name, seed, attackers, more=0)
    random = np.random.default_rng(seed + 1)
    bad = size * random.normal(size=(1 if together else attackers, honest.shape[1]))
    changes = np.vstack([honest, np.broadcast_to(bad, (attackers, honest.shape[1]))])
    value, _ = combined(name, changes, attackers)
    centre, count = honest.mean(0), len(changes)
    radius = float(np.linalg.norm(honest - centre, axis=1).max())
    away = float(np.linalg.norm(value - centre))
    if name in ("median", "trimmed_mean", "bulyan"):
        assert (value >= honest.min(0) - 1e-9).all() and (value <= honest.max(0) + 1e-9).all()
    elif name == "geometric_median":  # Lopuhaä & Rousseeuw 1991
        assert away <= 2 * (count - attackers) / (count - 2 * attackers) * radius * (1 + 1e-6)
    elif name == "norm_clipping":  # the median length is at most an honest one
        assert np.linalg.norm(value) <= np.linalg.norm(honest, axis=1).max() * (1 + 1e-9)
    elif name == "fltrust":
        assert np.linalg.norm(value) <= np.linalg.norm(honest[0]) * (1 + 1e-9)
        assert value @ honest[0] > 0
    else:  # a chosen update has an honest neighbour, and a centre is honest in each coordinate
        assert away <= 4 * radius * (honest.shape[1] ** 0.5 if name == "centred_clipping" else 1)


@every_rule
def test_the_mean_of_forty_per_cent_attackers_is_lost_and_a_rule_that_takes_them_is_not(name: str) -> None:
    attackers = 4
    honest = cohort(name, 1, attackers, size=50)
    changes = np.vstack([honest, np.tile(-100 * honest.mean(0), (attackers, 1))])
    value, trust = combined(name, changes, attackers)
    assert value @ honest.mean(0) > 0 > changes.mean(0) @ honest.mean(0)
    assert trust[-attackers:].max() <= trust[:-attackers].max() * (1 + 1e-9)


# ---------------------------------------------------------------- the plan's aggregate


def test_a_bad_site_cannot_hide_in_an_extra_what_its_weights_do_not_show() -> None:
    """Each array is combined by itself."""
    random = np.random.default_rng(0)
    weights, control = random.normal(size=(9, 6)), 1 + 0.1 * random.normal(size=(9, 2, 3))
    control[4], losses = 1e9, np.r_[np.ones(8), 1e9]
    for name in RULES:
        choice = {"rule": name, "attackers": 1, "root": "s0" if RULES[name].rooted else ""}
        found = Aggregation.model_validate(choice).combine(
            {"weights": weights, "control": control, "loss": losses}, [f"s{i}" for i in range(9)]
        )
        assert found.values["control"].shape == (2, 3) and np.abs(found.values["control"]).max() < 2
        assert found.values["loss"].shape == () and float(found.values["loss"]) < 2
        assert found.trust.shape == (9,)


def test_a_weight_near_nothing_does_not_make_a_mean_beyond_what_one_site_may_send() -> None:
    sent = [
        Update.of({"weights": np.ones(3), "loss": 1.0}, 40),
        Update({"weights": np.full(3, 1e6), "loss": 0.0}, 5e-324),
    ]
    found, beyond = means(sent, {"weights": 2.0, "loss": 2.0})
    assert found["weights"].tolist() == [[1, 1, 1], [2, 2, 2]] and beyond == [False, True]
    assert found["loss"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"rule": "average"}, "there is no rule"),
        ({"rule": "mean", "groups": 3}, "withstands nobody"),
        ({"rule": "mean", "attackers": 1}, "withstands nobody"),
        ({"rule": "krum", "options": {"select": 3}}, "select"),
        ({"rule": "multi_krum", "options": {"select": 0}}, "select"),
        ({"rule": "centred_clipping", "options": {"radius": float("nan")}}, "radius"),
        ({"rule": "fltrust"}, "needs the name of a trusted site"),
        ({"rule": "median", "root": "s0"}, "trusts no site"),
        ({"rule": "fltrust", "root": "s0", "groups": 3}, "own change"),
        ({"rule": "bulyan", "attackers": 1, "groups": 6}, "needs 7 groups"),
    ],
)
def test_what_cannot_work_is_refused(choice: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Aggregation.model_validate(choice)


@pytest.mark.parametrize(
    ("choice", "sites", "drawn", "code"),
    [
        ({"rule": "krum", "attackers": 2}, 6, None, "plan.too-few-updates"),
        ({"rule": "krum", "attackers": 2}, 20, 6, "plan.too-few-updates"),
        ({"rule": "krum", "attackers": 2}, 0, 6, "plan.too-few-updates"),
        ({"rule": "median", "groups": 4}, 11, None, "plan.too-few-updates"),
        ({"rule": "median", "groups": 4}, 12, None, None),
        ({"rule": "krum", "attackers": 2}, 0, None, None),
        ({"rule": "krum", "attackers": 2}, 7, None, None),
        ({"rule": "fltrust", "root": "s9"}, 5, None, "plan.no-root"),
        ({"rule": "fltrust", "root": "s0"}, 5, 3, "plan.no-root"),
        ({"rule": "fltrust", "root": "s0"}, 5, None, None),
    ],
)
def test_a_cohort_that_is_too_small_is_refused(
    choice: dict[str, Any], sites: int, drawn: int | None, code: str | None
) -> None:
    made, names = Aggregation.model_validate(choice), [f"s{i}" for i in range(sites)]
    if code is None:
        made.check_cohort(names, drawn, 3)
    else:
        with pytest.raises(PlanError) as caught:
            made.check_cohort(names, drawn, 3)
        assert caught.value.code == code and caught.value.remedy


def test_too_few_answers_and_a_missing_root_end_the_run() -> None:
    updates = {"weights": np.ones((4, 2))}
    with pytest.raises(PlanError, match="needs 5 updates, and gets 4"):
        Aggregation(rule="median", attackers=2).combine(updates, ["a", "b", "c", "d"])
    with pytest.raises(PlanError, match="did not answer"):
        Aggregation(rule="fltrust", root="e").combine(updates, ["a", "b", "c", "d"])
