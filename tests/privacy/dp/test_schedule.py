"""Noise by stage: every schedule meets the total, from below, whatever its shape."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.contract.errors import PlanError
from atoll.privacy.dp import discrete_gaussian, gaussian, laplace
from atoll.privacy.dp.accounting import epsilon
from atoll.privacy.dp.schedule import multipliers, shape

EVENTS = {
    "gaussian": gaussian.event,
    "sampled": partial(gaussian.event, sampling_rate=0.05),
    "discrete": partial(discrete_gaussian.event, sampling_rate=0.05),
    "laplace": laplace.event,
}


@pytest.mark.parametrize("kind", ["constant", "rising", "falling"])
@pytest.mark.parametrize("mechanism", EVENTS)
def test_every_schedule_spends_its_total_and_no_more(kind, mechanism):
    event = EVENTS[mechanism]
    z = multipliers(2.0, 1e-5, shape(60, kind, 3.0, stages=3), event=event)
    total = epsilon([(event(one), 1) for one in z], 1e-5)
    assert 0.98 * 2.0 <= total <= 2.0
    assert len(z) == 60
    ratio = max(z) / min(z)
    assert ratio == pytest.approx(1.0 if kind == "constant" else 3.0)
    assert z == sorted(z, reverse=kind == "falling")


def test_what_else_the_total_pays_for_is_counted():
    besides = [(gaussian.event(4.0), 1)]
    z = multipliers(1.5, 1e-5, shape(20, "rising"), besides=besides)
    total = epsilon([*besides, *((gaussian.event(one), 1) for one in z)], 1e-5)
    assert 0.98 * 1.5 <= total <= 1.5
    assert min(z) > min(multipliers(1.5, 1e-5, shape(20, "rising")))


@given(
    releases=st.integers(1, 200),
    kind=st.sampled_from(["constant", "rising", "falling"]),
    ratio=st.floats(1, 50),
    stages=st.integers(1, 20),
)
def test_shapes_are_monotone_geometric_and_of_few_stages(releases, kind, ratio, stages):
    noise = shape(releases, kind, ratio, stages=stages)
    assert len(noise) == releases
    assert len(set(noise)) <= min(stages, releases)
    assert noise == sorted(noise, reverse=kind == "falling")
    if kind != "constant" and min(stages, releases) > 1:
        assert max(noise) / min(noise) == pytest.approx(ratio)


def test_a_ratio_of_budget_is_the_square_of_noise():
    assert shape(2, "rising", 9.0, measure="rho") == pytest.approx([1, 3])
    assert shape(3, "falling", 4.0, stages=3) == pytest.approx([4, 2, 1])


@pytest.mark.parametrize(
    "bad", [(0, "rising", 2.0), (5, "sideways", 2.0), (5, "rising", 0.5), (5, "rising", float("nan"))]
)
def test_malformed_schedules_are_refused(bad):
    with pytest.raises(PlanError) as caught:
        shape(*bad)
    assert caught.value.code == "dp.schedule"
