"""Noise by stage: every schedule meets the total, from below, whatever its shape."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.contract.errors import PlanError
from atoll.contract.privacy import Privacy
from atoll.privacy.dp import discrete_gaussian, gaussian, laplace, tree
from atoll.privacy.dp.accounting import epsilon
from atoll.privacy.dp.release import SLACK, Noise
from atoll.privacy.dp.schedule import shape

EVENTS = {
    "gaussian": ("gaussian", 1.0, gaussian.event),
    "sampled": ("gaussian", 0.05, partial(gaussian.event, sampling_rate=0.05)),
    "discrete": ("discrete_gaussian", 0.05, partial(discrete_gaussian.event, sampling_rate=0.05, slack=SLACK)),
    "laplace": ("laplace", 1.0, laplace.event),
}


@pytest.mark.parametrize("kind", ["constant", "rising", "falling"])
@pytest.mark.parametrize("case", EVENTS)
def test_every_schedule_spends_its_total_and_no_more(kind, case):
    mechanism, rate, event = EVENTS[case]
    privacy = Privacy(unit="record", epsilon=2.0, delta=1e-5, mechanism=mechanism, stages=kind, ratio=3.0)
    noise = Noise(privacy, [rate] * 60, 1, shared=False)
    z = list(noise.multipliers)
    total = epsilon([(event(one), 1) for one in z], 1e-5)
    assert 0.98 * 2.0 <= total <= 2.0
    assert len(z) == 60
    ratio = max(z) / min(z)
    assert ratio == pytest.approx(1.0 if kind == "constant" else 3.0)
    assert z == sorted(z, reverse=kind == "falling")
    assert noise.costs == sorted(noise.costs) and noise.costs[-1] <= 2.0


def test_what_else_the_total_pays_for_is_counted():
    privacy = Privacy(unit="record", epsilon=1.5, delta=1e-5, mechanism="gaussian", stages="rising")
    alone = Noise(privacy, [1.0] * 20, 1, shared=False)
    beside = Noise(privacy, [1.0] * 28, 1, shared=False, once=range(20, 28))
    z = beside.multipliers
    events = [*((gaussian.event(one), 1) for one in z[:20]), (tree.event(z[20], 8), 1)]
    assert 0.98 * 1.5 <= epsilon(events, 1e-5) <= 1.5
    assert min(z[:20]) > min(alone.multipliers)


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
