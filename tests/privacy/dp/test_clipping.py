"""The adaptive clip finds its quantile."""

import math

import numpy as np
import pytest

from atoll.privacy.dp import gaussian
from atoll.privacy.dp.clipping import QuantileClip


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("start", [0.01, 50.0])
def test_the_clip_finds_its_quantile_under_noise(shake, quantile, start):
    norms = np.random.default_rng(1).lognormal(0.5, 0.7, 2000)
    adaptive, stream = QuantileClip(start, quantile), shake(1)
    for _ in range(150):
        noise = gaussian.sample((), 2000 / 20, stream)
        adaptive = adaptive.updated(float(((norms <= adaptive.norm) - 0.5).sum()) + float(noise), 2000)
    assert abs((norms <= adaptive.norm).mean() - quantile) < 0.05


def test_one_step_is_the_papers():
    assert QuantileClip(2.0, 0.5, 0.2).updated(30.0, 100).norm == pytest.approx(2.0 * math.exp(-0.2 * 0.3))
    assert QuantileClip(2.0).updated(1e9, 100).norm == pytest.approx(2.0 * math.exp(-0.2 * 0.5))
