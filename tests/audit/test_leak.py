"""SSIM against a second implementation, matching, and the pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

torch = pytest.importorskip("torch")

from atoll.audit.leak import (  # noqa: E402
    Criterion,
    match_images,
    match_rows,
    pictures,
    similarities,
    ssim,
    wilson,
)  # fmt: skip
from atoll.contract.errors import PlanError  # noqa: E402


def naive_ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Wang et al. 2004 by scipy's Gaussian filter, cut to 11 pixels, over places where it fits."""

    def blurred(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    x, y = blurred(one), blurred(other)
    xx, yy, xy = blurred(one**2) - x**2, blurred(other**2) - y**2, blurred(one * other) - x * y
    return float((((2 * x * y + 1e-4) * (2 * xy + 9e-4)) / ((x**2 + y**2 + 1e-4) * (xx + yy + 9e-4))).mean())


def test_ssim_equals_a_second_implementation() -> None:
    made = np.random.default_rng(0)
    one = gaussian_filter(made.random((6, 28, 31)), (0, 2, 2))
    other = np.clip(one + made.normal(0, 0.05, one.shape), 0, 1)
    got = ssim(torch.from_numpy(one)[:, None], torch.from_numpy(other)[:, None])
    assert got == pytest.approx([naive_ssim(a, b) for a, b in zip(one, other, strict=True)], abs=1e-12)


def test_ssim_is_one_for_the_same_low_for_others_and_symmetric() -> None:
    made = torch.Generator().manual_seed(0)
    one, other = torch.rand(2, 3, 1, 16, 16, generator=made)
    assert ssim(one, one) == pytest.approx([1, 1, 1])
    assert (ssim(one, other) < 0.3).all()
    assert ssim(one, other) == pytest.approx(ssim(other, one))
    pairs = similarities(one, torch.cat([other, one]))
    assert pairs.argmax(1).tolist() == [3, 4, 5]
    assert np.diag(pairs) == pytest.approx(ssim(one, other), abs=1e-12)
    colour = torch.rand(2, 3, 12, 14, generator=made)
    flipped = colour.flip(0)
    assert ssim(colour, flipped)[0] == pytest.approx(
        np.mean([naive_ssim(colour[0, c].double().numpy(), colour[1, c].double().numpy()) for c in range(3)])
    )


def test_images_below_the_window_are_refused() -> None:
    with pytest.raises(PlanError) as caught:
        ssim(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))
    assert caught.value.code == "audit.image-too-small"


def test_one_reconstruction_counts_once() -> None:
    made = torch.Generator().manual_seed(0)
    true = torch.rand(4, 1, 16, 16, generator=made)
    true[1] = true[0]  # two samples that look alike, one reconstruction
    match = match_images(true, true[[0, 3]], np.zeros(4), Criterion())
    assert match.leaked.sum() == 2
    assert match.leaked[3]
    assert (match.assigned >= 0).sum() == 2
    assert match_images(true, true[:0], np.zeros(4), Criterion()).leaked.sum() == 0


def test_a_leak_must_be_much_closer_than_the_nearest_public_image() -> None:
    met = Criterion(ssim=0.5, margin=0.5).met
    found = np.array([0.49, 0.51, 0.87, 0.90])
    assert met(found, np.full(4, 0.78)).tolist() == [False, False, False, True]
    assert met(found, np.full(4, -0.1)).tolist() == [False, True, True, True]


def test_rows_match_in_every_feature_or_not() -> None:
    true = torch.tensor([[0.0, 0.0], [0.5, -0.5], [0.9, 0.9]])
    found = torch.tensor([[0.51, -0.49], [0.0, 0.03], [float("nan"), 0.0]])
    assert match_rows(true, found, 0.02).leaked.tolist() == [False, True, False]


def test_intervals_of_rates() -> None:
    assert wilson(0, 300) == pytest.approx((0, 0.01264), abs=1e-4)
    low, high = wilson(150, 300)
    assert (low, high) == pytest.approx((0.4437, 0.5563), abs=1e-4)
    assert wilson(0, 0) == (0, 1)


def test_pictures_are_a_png_of_all_rows() -> None:
    true = torch.rand(3, 1, 16, 16)
    png = pictures(true, [("linear-layer", true, [1.0, 0.5, 0.2]), ("generative", true, [0.3, 0.3, 0.3])])
    with Image.open(io.BytesIO(png)) as sheet:
        assert sheet.format == "PNG"
        assert sheet.size == (150 + 3 * (48 + 4), 3 * (48 + 14 + 4))
        assert abs(int(sheet.getpixel((151, 1))) - int(true[0, 0, 0, 0] * 255)) <= 1
