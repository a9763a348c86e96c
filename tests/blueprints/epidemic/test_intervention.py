"""The twin draws what it says, and interventions differ from doing nothing by their effect, not by luck."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from atoll.blueprints.epidemic import twin as drawing
from atoll.blueprints.epidemic.intervention import MEASURES, compare
from atoll.blueprints.epidemic.outbreak import Region, Scenario, simulate
from atoll.blueprints.epidemic.seir import SeirFit, State, fit, project
from atoll.blueprints.epidemic.twin import Measure, Twin, gravity
from atoll.contract.errors import PlanError

REGIONS = (Region("one", {"a": 5e7}, imports_per_day=15), Region("two", {"b": 2e7}, imports_per_day=8))
NOTHING = Measure(name="nothing")


@pytest.fixture(scope="module")
def fits() -> dict[str, SeirFit]:
    """Two regions, fitted to 30 days of their onsets."""
    cases = simulate(Scenario(REGIONS, days=30, imports=(0, 10), travel=0.0), 1).daily("infectious")
    found = {region.name: fit(cases[:, n], region.population) for n, region in enumerate(REGIONS)}
    assert all(isinstance(f, SeirFit) for f in found.values())
    return found  # type: ignore[return-value]


@pytest.fixture(scope="module")
def twin(fits: dict[str, SeirFit]) -> Twin:
    return Twin.of(fits)


def small(mix: object = None, exposed: tuple[float, float] = (300.0, 0.0)) -> Twin:
    """Two towns, of which the first is ill."""
    sizes = np.array([2e6, 1e6])
    state = State(sizes[None] - exposed, np.array([exposed]), np.zeros((1, 2)))
    mix = gravity(sizes) if mix is None else np.array(mix)
    return Twin(("one", "two"), sizes, np.full((1, 2), 2.0), state, mix, np.ones(2), 3.69, 3.47)


def test_draws_are_quantiles() -> None:
    uniform = np.random.default_rng(0).random(500)
    for most, within in ((3000, 0), (10**8, 1)):
        number = np.random.default_rng(1).integers(0, most, 500).astype(float)
        for chance in (0.01, 0.27, 0.9, 1.0):
            found = drawing._binomial(uniform, number, chance)
            assert np.abs(found - stats.binom.ppf(uniform, number, chance).clip(0)).max() <= within, chance
    for mean in (0.0, 0.01, 0.5, 3.0, 50.0, 999.0, 1001.0, 1e4, 1e7):
        found = drawing._poisson(uniform, np.full(500, mean))
        assert np.abs(found - stats.poisson.ppf(uniform, mean).clip(0)).max() <= (mean > 1000), mean
    expected = stats.gamma.ppf(uniform, 3 * 0.43, scale=1 / 0.43)
    assert np.allclose(drawing._gamma(uniform, np.full(500, 3.0), 0.43), expected)


def test_nothing_averts_exactly_nothing(twin: Twin) -> None:
    none, nothing, again = compare(twin, 14, (NOTHING, (NOTHING, NOTHING)), draws=60)
    for effect in (none, nothing, again):
        assert (effect.averted, effect.averted_low, effect.averted_high) == (0, 0, 0)
        assert effect.cases == none.cases
    assert nothing.effect == "nothing"
    assert np.array_equal(twin.run(9, 20, 5), twin.run(9, 20, 5, (NOTHING,)))
    assert not np.array_equal(twin.run(9, 20, 5), twin.run(9, 20, 6))


@pytest.mark.parametrize("what", ["contact", "infectious"])
def test_stronger_averts_no_fewer(twin: Twin, what: str) -> None:
    measures = [Measure(name=str(f), **{what: f}) for f in (1.0, 0.9, 0.7, 0.5, 0.3, 0.0)]  # type: ignore[arg-type]
    effects = compare(twin, 14, measures, draws=60)[1:]
    averted = [effect.averted for effect in effects]
    assert averted[0] == 0
    assert (np.diff(averted) >= 0).all()
    assert effects[1].averted_low > 0  # a tenth less shows through the pairing
    assert averted[-1] < effects[0].cases


def test_pairs_see_what_luck_would_hide(twin: Twin) -> None:
    slight = (Measure(name="slight", contact=0.98),)
    free = twin.run(10, 80, 1).sum(axis=(1, 2))
    paired, apart = (
        free - twin.run(10, 80, 1, slight).sum(axis=(1, 2)),
        free - twin.run(10, 80, 2, slight).sum(axis=(1, 2)),
    )
    assert paired.std() < apart.std() / 5
    assert np.quantile(paired, 0.025) > 0


def test_a_late_or_ended_or_regional_measure(twin: Twin) -> None:
    late = twin.run(12, 40, 0, (Measure(name="late", contact=0.2, start=6),))
    free = twin.run(12, 40, 0)
    assert np.array_equal(late[:, :7], free[:, :7])
    assert late[:, 7:].sum() < free[:, 7:].sum()
    ended = twin.run(12, 40, 0, (Measure(name="ended", contact=0.2, end=3),))
    assert late.sum() != ended.sum() < free.sum()
    here = compare(twin, 12, (Measure(name="here", contact=0.2, regions=("one",)),), draws=40)[1]
    assert here.by_region[0] > 20 * abs(here.by_region[1])
    assert "in one" in here.effect


def test_closed_borders_keep_it_out() -> None:
    town = small()
    shut = town.run(30, 50, 0, (Measure(name="shut", mobility=0.0),))
    assert shut[:, :, 1].sum() == 0
    assert town.run(30, 50, 0)[:, :, 1].sum() > 50
    half = compare(town, 30, [Measure(name="m", mobility=m) for m in (1.0, 0.5, 0.1, 0.0)], draws=50)[1:]
    there = [effect.by_region[1] for effect in half]
    assert there[0] == 0
    assert (np.diff(there) > 0).all()
    one_side = town.run(30, 50, 0, (Measure(name="one side", mobility=0.0, regions=("two",)),))
    assert one_side[:, :, 1].sum() == 0  # a closed region is not entered either


def test_no_contact_no_infection() -> None:
    alone = small(mix=[[1.0, 0.0], [0.0, 1.0]])
    cases = alone.run(60, 50, 0, (Measure(name="all", contact=0.0),))
    assert (cases.sum(axis=1) == [300, 0]).all()  # the exposed fall ill, and nobody else
    assert alone.run(60, 50, 0)[:, :, 1].sum() == 0


def test_offspring_of_the_twin_have_the_dispersion() -> None:
    """From one infectious person: how often nobody is infected in the end (R = 2; a branching process)."""
    sizes = np.array([1e9])
    start = State(np.array([[1e9]]), np.zeros((1, 1)), np.ones((1, 1)))
    quiet = {}
    for k in (0.2, 50.0):
        one = Twin(("one",), sizes, np.full((1, 1), 2.0), start, np.eye(1), np.ones(1), 3.69, 3.47, dispersion=k)
        quiet[k] = float((one.run(40, 1000, 3).sum(axis=(1, 2)) == 0).mean())
    # one already infectious has, being without memory, 3.47 days less one ahead
    q = 1 / 3.47
    for k, seen in quiet.items():
        left = np.arange(1, 200)
        none = (1 + 2 / k) ** (-k * (left - 1) / 3.47)
        assert seen == pytest.approx((q * (1 - q) ** (left - 1) * none).sum(), abs=0.04)


def test_the_twin_goes_on_as_the_fit_projects(fits: dict[str, SeirFit], twin: Twin) -> None:
    apart = Twin.of(fits, mix=np.eye(2))
    mean = apart.run(10, 200).mean(axis=0)
    for n, name in enumerate(fits):
        assert mean[:, n] == pytest.approx(project(fits[name], 10).mean, rel=0.06)


def test_the_truth_of_an_intervention_is_foretold(fits: dict[str, SeirFit]) -> None:
    """The generator's own course with contacts halved from day 30 on, against the twin fitted before."""
    course = Scenario(REGIONS, days=45, imports=(0, 10), travel=0.0, contact=((0, 1.0), (30, 0.5)))
    true = simulate(course, 1).daily("infectious")[30:].sum()
    free = simulate(Scenario(REGIONS, days=45, imports=(0, 10), travel=0.0), 1).daily("infectious")[30:].sum()
    half = compare(Twin.of(fits, mix=np.eye(2)), 15, (Measure(name="half", contact=0.5),))[1]
    assert half.cases == pytest.approx(true, rel=0.15)
    assert half.averted == pytest.approx(free - true, rel=0.25)


def test_a_sum_is_split_by_shares(fits: dict[str, SeirFit]) -> None:
    whole = fits["one"]
    split = Twin.split(whole, {"a": 3e7, "b": 2e7}, shares=(3, 1))
    assert split.state.exposed.sum(axis=1) == pytest.approx(whole.state.exposed)
    assert split.state.exposed[:, 0] == pytest.approx(3 * split.state.exposed[:, 1])
    assert Twin.split(whole, {"a": 3e7, "b": 2e7}).run(5, 200).sum(axis=2).mean(axis=0) == pytest.approx(
        project(whole, 5).mean, rel=0.06
    )


def test_examples_do_what_they_say(twin: Twin) -> None:
    effects = {effect.name: effect for effect in compare(twin, 14, (*MEASURES, MEASURES[:2]), draws=40)}
    assert set(effects) == {"none", "closing", "testing", "mobility", "closing and testing"}
    assert effects["closing and testing"].averted > effects["closing"].averted > effects["testing"].averted > 0
    assert effects["closing"].effect == "contacts less by 55%, from day 1"


def test_impossible_twins_and_measures_are_refused(fits: dict[str, SeirFit]) -> None:
    with pytest.raises(PlanError):
        Twin.of({})
    with pytest.raises(PlanError):
        Twin.of(fits, mix=np.ones((2, 2)))
    with pytest.raises(PlanError):
        Twin.split(fits["one"], {"a": 1e6}, shares=(1, 2))
    with pytest.raises(PlanError):
        Twin.split(fits["one"], {"a": 0.0})
    for wrong in ({"contact": 1.5}, {"mobility": -0.1}, {"contact": float("nan")}, {"typo": 1}):
        with pytest.raises(ValidationError):
            Measure(name="wrong", **wrong)  # type: ignore[arg-type]
