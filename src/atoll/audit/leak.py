"""Leak rate: reconstructed samples / attacked samples, and pictures of them side by side.

A sample counts as reconstructed when a reconstruction is assigned to it (each to one sample, by the Hungarian
method) and they match. For images: SSIM at least ``ssim`` *and* the reconstruction is closer than the nearest public
image by ``margin``, because X-rays all look alike: the nearest of 500 other people's reaches an SSIM of 0.77, so that
a threshold of 0.5 alone is met by pictures made without any gradient. For tables: every feature within 1 % of range.

Sources: Wang et al. 2004, Image Quality Assessment: From Error Visibility to Structural Similarity, Section III; Kuhn
1955 (assignment).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from atoll.contract.errors import PlanError

Floats = NDArray[np.float64]
WINDOW, SIGMA = 11, 1.5


def ssim(one: Tensor, other: Tensor) -> Floats:
    """Structural similarity of images [num_images, channels, height, width] in [0, 1], pair by pair, [num_images]: the
    mean over channels.

    A Gaussian window of 11 × 11, σ = 1.5, K₁ = 0.01, K₂ = 0.03, over places where the window fits; weighted (not
    sample) variances, as in the paper. Raises PlanError for images smaller than the window.
    """
    if min(one.shape[-2:]) < WINDOW:
        raise PlanError("audit.image-too-small", "SSIM needs images of 11 × 11 pixels or more", field="image",
                        remedy="audit larger images, or as a table")  # fmt: skip
    window, number = _window()[None, None], len(one)
    one, other = one.double().flatten(0, 1)[:, None], other.double().flatten(0, 1)[:, None]
    mean_1, mean_2, square_1, square_2, product = (
        functional.conv2d(image, window) for image in (one, other, one * one, other * other, one * other)
    )
    c1, c2 = 0.01**2, 0.03**2
    covariance = product - mean_1 * mean_2
    variances = square_1 + square_2 - mean_1**2 - mean_2**2
    index = (2 * mean_1 * mean_2 + c1) * (2 * covariance + c2) / ((mean_1**2 + mean_2**2 + c1) * (variances + c2))
    return np.asarray(index.reshape(number, -1).mean(1).numpy(), np.float64)


def _window() -> Tensor:
    at = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    line = torch.exp(-(at**2) / (2 * SIGMA**2))
    return line[:, None] * line / line.sum() ** 2


def similarities(true: Tensor, others: Tensor) -> Floats:
    """SSIM of every true image with every other, [num_true, num_others]: all pairs of windows as matrix products."""
    if min(true.shape[-2:]) < WINDOW:
        return ssim(true, true)[:, None]  # which refuses
    if not len(others):
        return np.empty((len(true), 0))
    window, c1, c2 = _window().flatten(), 0.01**2, 0.03**2
    b = functional.unfold(others.double().flatten(0, 1)[:, None], WINDOW)
    b = b.reshape(len(others), -1, len(window), b.shape[-1]).permute(1, 3, 0, 2).flatten(0, 1)
    mean_b = b @ window
    spread_b = b.square() @ window - mean_b.square()
    rows = []
    for some in true.split(32):  # type: ignore[no-untyped-call]
        a = functional.unfold(some.double().flatten(0, 1)[:, None], WINDOW)
        a = a.reshape(len(some), -1, len(window), a.shape[-1]).permute(1, 3, 0, 2).flatten(0, 1)
        mean_a = a @ window
        spread_a = a.square() @ window - mean_a.square()
        total = torch.zeros(len(some), len(others), dtype=torch.float64)
        for at in range(len(a)):  # each place of the window
            means = mean_a[at][:, None] * mean_b[at]
            squares = mean_a[at].square()[:, None] + mean_b[at].square()
            covariance = (a[at] * window) @ b[at].T - means
            spreads = spread_a[at][:, None] + spread_b[at]
            total += (2 * means + c1) * (2 * covariance + c2) / ((squares + c1) * (spreads + c2))
        rows.append(total / len(a))
    return np.asarray(torch.cat(rows).numpy() if rows else np.empty((0, len(others))), np.float64)


@dataclass(frozen=True, slots=True)
class Criterion:
    """When an image counts as reconstructed. ssim: at least; margin: by which share the reconstruction must lessen the
    dissimilarity (1 − SSIM) that the nearest public image leaves: 0 is "closer than it", 0.5 is "halves it". Of
    384 X-rays in batches of 64, pictures of the prior alone passed for 50 at 0, for 8 at 0.2, and for none at 0.3."""

    ssim: float = 0.5
    margin: float = 0.3

    def met(self, found: Floats, nearest: Floats) -> NDArray[np.bool_]:
        """For each sample: by its reconstruction's SSIM and its nearest public image's."""
        return (found >= self.ssim) & (1 - found < (1 - self.margin) * (1 - nearest))


@dataclass(frozen=True, slots=True)
class Match:
    """For each true sample: its reconstruction's place (−1: none), its score (SSIM, −1 for none; or minus the largest
    difference, −∞ for none) and whether it leaked."""

    assigned: NDArray[np.int64]
    score: Floats
    leaked: NDArray[np.bool_]


def match_images(true: Tensor, found: Tensor, nearest: Floats, criterion: Criterion) -> Match:
    """Images in [0, 1]. nearest: each true image's SSIM with the public image nearest to it."""
    assigned, score = _assign(similarities(true, found.clamp(0, 1)), -1.0)
    return Match(assigned, score, (assigned >= 0) & criterion.met(score, nearest))


def match_rows(true: Tensor, found: Tensor, tolerance: float) -> Match:
    """Rows of features in the same units: a match is within *tolerance* in every one. score: −largest difference."""
    distance = (true[:, None].double() - found[None].double()).abs().flatten(2).amax(2).numpy()
    assigned, score = _assign(-np.nan_to_num(distance, nan=1e9, posinf=1e9), -np.inf)
    return Match(assigned, score, (assigned >= 0) & (score >= -tolerance))


def _assign(score: Floats, none: float) -> tuple[NDArray[np.int64], Floats]:
    assigned, value = np.full(len(score), -1), np.full(len(score), none)
    row, column = linear_sum_assignment(score, maximize=True)
    assigned[row], value[row] = column, score[row, column]
    return assigned, value


def wilson(hits: int, tried: int) -> tuple[float, float]:
    """95 % interval of a rate (Wilson 1927)."""
    if tried == 0:
        return 0.0, 1.0
    z2, p = 1.959964**2, hits / tried
    middle, half = p + z2 / (2 * tried), float(np.sqrt(z2 * (p * (1 - p) + z2 / (4 * tried)) / tried))
    return max((middle - half) / (1 + z2 / tried), 0.0), min((middle + half) / (1 + z2 / tried), 1.0)


def pictures(true: Tensor, rows: Sequence[tuple[str, Tensor, Sequence[float]]], zoom: int = 3) -> bytes:
    """A PNG: the true images [num_images, 1, height, width] in the first row, then one row an attack, (title,
    reconstructions in the same order, SSIM of each, printed below it)."""
    number, height, width = len(true), true.shape[-2] * zoom, true.shape[-1] * zoom
    gap, text, left = 4, 14, 150
    sheet = Image.new("L", (left + number * (width + gap), (1 + len(rows)) * (height + text + gap)), 255)
    draw = ImageDraw.Draw(sheet)
    none: list[float] = []
    lines: list[tuple[str, Tensor, Sequence[float]]] = [("true", true, none), *rows]
    for r, (title, images, scores) in enumerate(lines):
        top = r * (height + text + gap)
        draw.text((4, top + height // 2), title, fill=0)
        for c, image in enumerate(images[:number]):
            grey = (image.clamp(0, 1).mean(0).numpy() * 255).round().astype(np.uint8)
            tile: Any = Image.fromarray(grey).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + c * (width + gap), top))
            if c < len(scores):
                draw.text((left + c * (width + gap) + 2, top + height), f"SSIM {scores[c]:.2f}", fill=0)
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()
