"""Numbers as people read them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from atoll.report.plots import by_magnitude
from atoll.report.words import duration, fixed, listed, moment, p_value, percent, real, significant, size, whole


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (significant(14.1272), "14.13"),
        (significant(-0.00123456, 3), "−0.00123"),
        (significant(12345.678), "12,346"),
        (significant(10.0), "10"),
        (significant(3.2e-9, 2), "3 × 10⁻⁹"),
        (significant(np.float64(0.5)), "0.5000"),
        (fixed(-0.12345), "−0.123"),
        (fixed(1e12), "1.00 × 10¹²"),
        (whole(np.int64(12345)), "12,345"),
        (percent(12, 569), "2.1 %"),
        (percent(1, 0), "–"),
        (p_value(0.0004), "< 0.001"),
        (p_value(0.046), "0.046"),
        (size(0), "0 B"),
        (size(999), "999 B"),
        (size(999.9), "1.0 kB"),
        (size(1000), "1.0 kB"),
        (size(161_856), "161.9 kB"),
        (size(10**9), "1.0 GB"),
        (size(5 * 10**15), "5,000.0 TB"),
        (duration(0.0124), "12 ms"),
        (duration(0.2), "0.20 s"),
        (duration(9.96), "10 s"),
        (duration(59.7), "1 min 0 s"),
        (duration(7_500), "2 h 5 min"),
        (moment("2025-03-12T14:05:59+00:00"), "2025-03-12 14:05 UTC"),
        (moment("yesterday"), "yesterday"),
        (listed([]), "–"),
        (listed(["a"]), "a"),
        (listed(list("abcdefg"), 3), "a, b and 5 more"),
    ],
)
def test_said(said: str, expected: str) -> None:
    assert said == expected


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "1", True, [], {}])
def test_what_is_no_number_is_a_dash(value: object) -> None:
    assert real(value) is None
    assert {fixed(value), significant(value), whole(value), size(value), duration(value), p_value(value)} == {"–"}


def test_coefficients_of_like_magnitude_share_a_panel() -> None:
    rows = [("a", 0.02, 0.01), ("b", 1.0, 0.5), ("c", -0.3, 0.1), ("d", 0.0, 0.004)]
    assert by_magnitude(rows) == [[rows[1], rows[2]], [rows[0], rows[3]]]
