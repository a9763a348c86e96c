"""Drift detectors: what their papers define, written a second time row by row; few false alarms, short delays."""

from __future__ import annotations

import math

import numpy as np
import pytest

from atoll.statistics.drift import Adwin, Detector, PageHinkley


def fed(detector: Detector, periods: list[np.ndarray]) -> list[int]:
    """The periods in which the detector warns."""
    state, warned = detector.start(), []
    for number, errors in enumerate(periods):
        state, rose = detector.update(state, len(errors), float(errors.mean()), float((errors**2).mean()))
        if rose:
            warned.append(number)
    return warned


def wrong(seed: int, rates: list[float], rows: int = 200) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [(random.random(rows) < rate).astype(float) for rate in rates]


@pytest.mark.parametrize("seed", range(5))
def test_page_hinkley_is_the_test_of_its_definition(seed: int) -> None:
    """m_T = Σ (x_t − x̄_t − δ); alarm when m_T − min m_t > λ (Gama et al. 2014, §3.2); anew after an alarm."""
    values = np.random.default_rng(seed).random(300) * np.repeat([0.3, 0.9, 0.9], 100)
    wanted, seen, sums = [], [], [0.0]
    for number, x in enumerate(values):
        seen.append(x)
        sums.append(sums[-1] + x - np.mean(seen) - 0.02)
        if sums[-1] - min(sums) > 0.8:
            wanted.append(number)
            seen, sums = [], [0.0]
    assert fed(PageHinkley(0.02, 0.8), [np.array([x]) for x in values]) == wanted
    assert wanted


def cut(window: list[float], confidence: float) -> bool | None:
    """Whether any split of a window of rows is cut by §3.1 of the paper, and whether one rises; None: no split is."""
    n = len(window)
    likely = math.log(2 * max(math.log(n), 1) / confidence)
    rises = []
    for split in range(1, n):
        old, new = window[:split], window[split:]
        m = 1 / (1 / len(old) + 1 / len(new))
        bound = math.sqrt(2 / m * np.var(window) * likely) + 2 / (3 * m) * likely
        if abs(np.mean(new) - np.mean(old)) >= bound:
            rises.append(np.mean(new) > np.mean(old))
    return any(rises) if rises else None


@pytest.mark.parametrize("seed", range(4))
def test_adwin_is_figure_1_of_its_paper_when_a_period_is_a_row(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = np.clip(random.normal(np.repeat([0.2, 0.8, 0.3], 60), 0.1), 0, 1)
    window: list[float] = []
    wanted = []
    for number, x in enumerate(values):
        window.append(float(x))
        rose = False
        while len(window) > 1 and (found := cut(window, 0.05)) is not None:
            rose, window = rose or found, window[1:]
        if rose:
            wanted.append(number)
    assert fed(Adwin(0.05), [np.array([x]) for x in values]) == wanted
    assert wanted  # the rise at 60; the fall at 120 only cuts the window
    assert all(60 <= number < 120 for number in wanted)


def test_adwin_of_periods_forgets_what_was_before_the_change() -> None:
    detector, state = Adwin(0.01), np.empty((0, 3))
    for errors in wrong(1, [0.1] * 30 + [0.4] * 3):
        state, _ = detector.update(state, len(errors), float(errors.mean()), float((errors**2).mean()))
    assert len(state) == 3
    assert state[:, 1].sum() / state[:, 0].sum() == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("detector", [Adwin(0.01), PageHinkley(0.02, 0.2)], ids=["adwin", "page-hinkley"])
def test_a_rise_is_seen_within_two_periods_and_steady_errors_raise_no_alarm(detector: Detector) -> None:
    steady, changed = [0.15] * 60, [0.15] * 30 + [0.35] * 5
    assert [fed(detector, wrong(seed, steady)) for seed in range(20)].count([]) >= 19
    found = [fed(detector, wrong(seed, changed)) for seed in range(20)]
    assert all(warned and 30 <= warned[0] <= 31 for warned in found)
    better = [fed(detector, wrong(seed, [0.35] * 30 + [0.15] * 10)) for seed in range(20)]
    assert better.count([]) >= 19  # learning is no drift


def test_rows_that_err_alike_count_as_one_to_adwin() -> None:
    """Each row told ten times over alarms where nothing changed, and with a design effect of ten does as once."""
    once = wrong(3, [0.15] * 60, rows=40)
    told = [np.repeat(errors, 10) for errors in once]
    assert fed(Adwin(0.01), once) == []
    assert fed(Adwin(0.01), told) != []
    assert fed(Adwin(0.01, design_effect=10), told) == []
    changed = [np.repeat(errors, 10) for errors in wrong(3, [0.15] * 30 + [0.5] * 4, rows=40)]
    assert 30 <= fed(Adwin(0.01, design_effect=10), changed)[0] <= 32
