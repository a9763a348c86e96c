"""What the coordinator sees of a round under each protection: the attacker's view, and nothing else.

``plain``: each site's gradient. ``dp``: each site's gradient of clipped records, with noise. ``secagg``: one masked
vector a site, uniform on the ring, and the sum over all sites. ``secagg+dp``: the same, with noise in the sum.

A sum over two sites tells each of them the other's share (it can subtract its own), and a sum over very few rows is
to an attacker a batch of that many rows: secure aggregation hides *whose* a share is, not what the total says. So the
sum is attacked too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atoll.audit.network import Gradient, batch_gradient
from atoll.contract.errors import PlanError

Kind = Literal["plain", "dp", "secagg", "secagg+dp"]
Batch = tuple[Tensor, Tensor]
"""Inputs [num_rows, ...] and labels [num_rows]."""
STEP = 2.0**-32
"""Resolution of the fixed point in which a masked vector is summed, modulo 2⁶⁴."""


@dataclass(frozen=True, slots=True)
class Protection:
    """kind: which view. clip_norm_l2, noise_multiplier: of DP, for neighbours that differ in one record: noise of
    standard deviation noise_multiplier · clip_norm_l2 in a sum of gradients. epsilon: what that is claimed to cost,
    to be shown."""

    kind: Kind = "plain"
    clip_norm_l2: float | None = None
    noise_multiplier: float = 0.0
    epsilon: float | None = None

    def __post_init__(self) -> None:
        if "dp" in self.kind and (self.clip_norm_l2 is None or self.noise_multiplier <= 0):
            raise PlanError(
                "audit.no-noise", "a view with DP needs a clip and noise", field="noise_multiplier",
                remedy="give clip_norm_l2 and a noise_multiplier above 0",
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Observation:
    """One vector in the coordinator's hands, read as the mean gradient over num_rows rows. sites: whose."""

    what: Literal["update", "masked", "sum"]
    gradient: Gradient
    num_rows: int
    sites: tuple[str, ...]


def observe(
    model: nn.Module, sites: Mapping[str, Batch], protection: Protection, random: np.random.Generator
) -> list[Observation]:
    """One round of one local step: what the coordinator sees of *sites*' batches. *random* makes masks and noise of
    this simulation (production draws them from the operating system)."""
    clip = protection.clip_norm_l2 if "dp" in protection.kind else None
    sums = {name: (_flat(batch_gradient(model, x, y, clip)) * len(x), len(x)) for name, (x, y) in sites.items()}
    return observe_sums(model, sums, protection, random)


def observe_sums(
    model: nn.Module, sums: Mapping[str, tuple[NDArray[np.float64], int]], protection: Protection,
    random: np.random.Generator,
) -> list[Observation]:  # fmt: skip
    """As :func:`observe`, from each site's summed gradients [num_parameters] and its number of rows."""
    scale = protection.noise_multiplier * (protection.clip_norm_l2 or 0) if "dp" in protection.kind else 0.0
    rows = {name: n for name, (_, n) in sums.items()}
    if protection.kind in ("plain", "dp"):
        noisy = {name: total + random.normal(0, scale, len(total)) for name, (total, _) in sums.items()}
        return [Observation("update", _read(model, v / rows[s]), rows[s], (s,)) for s, v in noisy.items()]
    share = scale / np.sqrt(len(sums))  # each site's part of the noise
    fixed = {name: encode(total + random.normal(0, share, len(total))) for name, (total, _) in sums.items()}
    masked = mask(fixed, random)
    total = decode(np.sum(list(masked.values()), axis=0, dtype=np.uint64))
    n = sum(rows.values())
    seen = [Observation("masked", _read(model, decode(v) / rows[s]), rows[s], (s,)) for s, v in masked.items()]
    return [*seen, Observation("sum", _read(model, total / n), n, tuple(sums))]


def captured(
    model: nn.Module, what: Literal["update", "masked", "sum"], mean: NDArray[np.float64], num_rows: int,
    sites: tuple[str, ...],
) -> Observation:  # fmt: skip
    """An observation that was made, not simulated. mean: of gradients, in the order of the model's parameters."""
    return Observation(what, _read(model, mean), num_rows, sites)


def encode(values: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Fixed point of step 2⁻³² modulo 2⁶⁴."""
    return np.round(values / STEP).astype(np.int64).view(np.uint64)


def decode(values: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Inverse of :func:`encode`, for magnitudes below 2³¹."""
    return values.view(np.int64).astype(np.float64) * STEP


def mask(fixed: Mapping[str, NDArray[np.uint64]], random: np.random.Generator) -> dict[str, NDArray[np.uint64]]:
    """Pairwise masks: each pair's is uniform, added by one, taken off by the other (Bonawitz et al. 2017, §4.0.1)."""
    masked = {name: vector.copy() for name, vector in fixed.items()}
    names = list(masked)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            pad = random.integers(0, 2**64, len(masked[one]), dtype=np.uint64)
            masked[one] += pad
            masked[other] -= pad
    return masked


def _flat(gradient: Gradient) -> NDArray[np.float64]:
    return torch.cat([value.flatten() for value in gradient.values()]).double().numpy()


def _read(model: nn.Module, vector: NDArray[np.float64]) -> dict[str, Tensor]:
    """A flat vector in the order of the model's parameters, as float32 (that is what an update is sent as)."""
    shaped: dict[str, Tensor] = {}
    at = 0
    for name, value in model.named_parameters():
        shaped[name] = torch.from_numpy(vector[at : at + value.numel()]).float().reshape(value.shape)
        at += value.numel()
    return shaped
