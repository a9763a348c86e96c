"""Clipping: bounds hold in every float type, and the adaptive clip finds its quantile."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from atoll.contract.errors import PlanError
from atoll.privacy.dp import gaussian
from atoll.privacy.dp.accounting import epsilon
from atoll.privacy.dp.clipping import QuantileClip, clip, clip_rows, split, votes


@given(
    rows=hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=8),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    ),
    norm=st.floats(1e-3, 1e3),
)
def test_rows_end_within_the_norm_and_keep_their_direction(rows, norm):
    bounded, clipped = clip_rows(rows, norm)
    assert bounded.dtype == rows.dtype
    before, after = (np.linalg.norm(part.astype(float), axis=1) for part in (rows, bounded))
    assert (after <= norm).all()
    assert (bounded[~clipped] == rows[~clipped]).all()
    assert (clipped == ~(before <= norm)).sum() >= len(rows) - (np.abs(before / norm - 1) < 1e-12).sum()
    assert np.allclose(after[clipped], norm, rtol=1e-5)
    assert np.allclose(bounded[clipped] * (before[clipped] / norm)[:, None], rows[clipped], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
def test_what_is_not_finite_becomes_zero_and_touches_no_other_row(bad):
    rows = np.array([[1.0, bad], [0.3, 0.4]])
    bounded, clipped = clip_rows(rows, 1.0)
    assert bounded.tolist() == [[0, 0], [0.3, 0.4]]
    assert clipped.tolist() == [True, False]


def test_flat_clipping_is_of_the_whole():
    matrix = np.full((2, 2, 2), 3.0)
    bounded, clipped = clip(matrix, 1.0)
    assert clipped
    assert bounded.shape == matrix.shape
    assert np.linalg.norm(bounded) == pytest.approx(1.0)
    same, clipped = clip(matrix, 100.0)
    assert not clipped
    assert (same == matrix).all()


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("start", [0.01, 50.0])
def test_the_clip_finds_its_quantile_under_noise(shake, quantile, start):
    norms = np.random.default_rng(1).lognormal(0.5, 0.7, 2000)
    adaptive, stream = QuantileClip(start, quantile), shake(1)
    for _ in range(150):
        noise = gaussian.sample((), 2000 / 20, stream)
        adaptive = adaptive.updated(votes(norms <= adaptive.norm) + float(noise), 2000)
    assert abs((norms <= adaptive.norm).mean() - quantile) < 0.05


def test_one_step_is_the_papers():
    assert QuantileClip(2.0, 0.5, 0.2).updated(30.0, 100).norm == pytest.approx(2.0 * math.exp(-0.2 * 0.3))
    assert QuantileClip(2.0).updated(1e9, 100).norm == pytest.approx(2.0 * math.exp(-0.2 * 0.5))


def test_a_unit_moves_the_votes_by_half():
    within = np.array([True, False, True, True])
    assert votes(within) == 1.0
    assert abs(votes(within) - votes(within[1:])) == 0.5
    assert abs(votes(within) - votes(within[:1])) <= 1.5


@given(z=st.floats(0.1, 50), excess=st.floats(1.05, 100))
def test_values_and_votes_together_cost_the_noise_multiplier(z, excess):
    vote_sigma = z / 2 * excess
    values = split(z, vote_sigma)
    assert values > z
    assert values**-2 + (2 * vote_sigma) ** -2 == pytest.approx(z**-2)


def test_the_split_costs_one_release():
    values = split(1.5, 40.0)
    together = epsilon([(gaussian.event(values), 1), (gaussian.event(40.0 / 0.5), 1)], 1e-6)
    assert together == pytest.approx(epsilon([(gaussian.event(1.5), 1)], 1e-6), rel=1e-6)


@pytest.mark.parametrize("vote_sigma", [0.0, 0.4, 0.5])
def test_too_little_noise_on_votes_is_refused(vote_sigma):
    with pytest.raises(PlanError) as caught:
        split(1.0, vote_sigma)
    assert caught.value.code == "dp.vote-noise"
