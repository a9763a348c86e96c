"""From sensitivity to scales and shares: the noise adds up to what accounting was told."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.contract.errors import PlanError, PrivacyBudgetError
from atoll.contract.sensitivity import Norms, touches, within
from atoll.privacy.dp import discrete_gaussian
from atoll.privacy.dp.noise import delta_warning, field_scales, honest, on_grid, reach, share

names = st.sampled_from("abcdef")
norms_of = st.dictionaries(names, st.floats(1e-3, 1e3).map(lambda d: Norms(2 * d, d)), min_size=1)


@given(total=st.floats(0.1, 1e6), survivors=st.integers(1, 100), more=st.integers(0, 50))
def test_the_fewest_honest_survivors_make_the_whole_noise(total, survivors, more):
    one = share(total, survivors)
    assert math.sqrt(survivors) * one == pytest.approx(total)
    assert math.sqrt(survivors + more) * one >= total * (1 - 1e-12)


@pytest.mark.parametrize(("survivors", "colluders"), [(3, 3), (2, 5), (0, 0)])
def test_nobody_honest_is_refused(survivors, colluders):
    with pytest.raises(PrivacyBudgetError) as caught:
        honest(survivors, colluders)
    assert caught.value.code == "dp.no-honest-site"
    with pytest.raises(PrivacyBudgetError):
        share(1.0, survivors - colluders)
    assert honest(5, 2) == 3


@given(norms=norms_of, z=st.floats(0.1, 100))
def test_fields_together_have_the_noise_multiplier(norms, z):
    scales = field_scales(norms, z)
    assert sum((norms[f].l2 / scales[f]) ** 2 for f in norms) == pytest.approx(z**-2)
    assert all(scales[f] == pytest.approx(z * math.sqrt(len(norms)) * norms[f].l2) for f in norms)
    scales = field_scales(norms, z, norm="l1")
    assert sum(norms[f].l1 / scales[f] for f in norms) == pytest.approx(1 / z)


@given(norms=norms_of, z=st.floats(0.1, 100), data=st.data())
def test_any_split_keeps_the_total(norms, z, data):
    split = {name: data.draw(st.floats(0.01, 10)) for name in norms}
    for kind, power in (("l2", 2), ("l1", 1)):
        scales = field_scales(norms, z, split=split, norm=kind)
        assert sum((getattr(norms[f], kind) / scales[f]) ** power for f in norms) == pytest.approx(z**-power)


def test_least_error_is_the_documented_split():
    norms, sizes = {"a": within(1.0, 100), "b": within(5.0, 4)}, {"a": 100, "b": 4}

    def error(split):
        return sum(sizes[f] * sigma**2 for f, sigma in field_scales(norms, 1.0, split=split).items())

    best = {f: norms[f].l2 * math.sqrt(sizes[f]) for f in norms}
    for nudge in (0.5, 0.9, 1.1, 2.0):
        assert error(best) < error({**best, "a": best["a"] * nudge})


def test_the_largest_weight_decides_and_unmoved_fields_are_free():
    norms = {"moved": touches(1), "fixed": Norms(0, 0)}
    assert field_scales(norms, 2.0, weights=[0.2, 1.5, -3.0]) == {"moved": 6.0, "fixed": 0.0}


@pytest.mark.parametrize("change", [math.inf, math.nan])
def test_unbounded_fields_are_refused(change):
    with pytest.raises(PlanError) as caught:
        field_scales({"x": Norms(change, change)}, 1.0)
    assert caught.value.code == "dp.unbounded"


def test_a_split_must_serve_every_field():
    with pytest.raises(PlanError) as caught:
        field_scales({"x": touches(1), "y": touches(1)}, 1.0, split={"x": 1.0})
    assert caught.value.code == "dp.split"


@given(
    rows=st.lists(st.lists(st.floats(-1, 1), min_size=3, max_size=3), min_size=1, max_size=6),
    step=st.floats(1e-3, 2),
)
def test_rounding_is_within_the_sensitivity_on_the_grid(rows, step):
    table = np.array(rows)
    with_it, without = (np.rint(part.sum(0) / step) for part in (table, table[1:]))
    moved = np.abs(with_it - without)
    allowed = on_grid(Norms(np.abs(table[0]).sum(), np.linalg.norm(table[0])), step, 3)
    assert moved.sum() <= allowed.l1 + 1e-6
    assert np.linalg.norm(moved) <= allowed.l2 + 1e-6


def test_counts_are_on_their_grid():
    assert on_grid(touches(1), 1, 50, exact=True) == touches(1)


def test_noise_stays_within_its_reach(shake):
    drawn = discrete_gaussian.sample(200_000, 20.0, shake(1))
    assert np.abs(drawn).max() < reach(20.0, drawn.size)
    assert np.abs(drawn).max() > reach(20.0, drawn.size, failure=0.99) * 0.7


def test_large_deltas_are_warned_about():
    assert "1/1000" in delta_warning(1e-3, 1000)
    assert delta_warning(1e-6, 1000) == ""
