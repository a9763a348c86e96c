"""Exact inputs of a network's first fully connected layer from one gradient: no optimisation, no guesses.

For y = Wx + b and any loss, the gradient by row j of W is Σᵢ δᵢⱼ xᵢ and by bⱼ it is Σᵢ δᵢⱼ. So a neuron that one
sample of the batch alone activates shows that sample's input as their ratio (Geiping et al. 2020, Inverting
Gradients, Proposition 3.1; for batches Boenisch et al. 2023, When the Curious Abandon Honesty, Section 4). With a
hidden ReLU layer and one logit, δᵢⱼ = rᵢ vⱼ aᵢⱼ: residual, known weight of the head, and whether neuron j is
active. The difference of two neurons (each divided by vⱼ) that disagree on one sample shows it too, and where fewer
samples than neurons are left, the active patterns are the binary vectors of a known subspace, which a search
finds (Dimitrov et al. 2024, SPEAR: Exact Gradient Inversion of Batches in Federated Learning, Section 4; here
complete, because δ is known up to rᵢ). Each sample found is subtracted, which uncovers others.

Every candidate is checked: it must be possible as an input of the layer, and its residual must be what the network says
of it for one of the labels. So what is returned is not a guess.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import qr
from torch import Tensor, nn

from atoll.audit.network import Gradient, Layers

Floats = NDArray[np.float64]
MOST_PATTERNS = 13
"""Samples up to which all 2ⁿ activity patterns are tried."""


@dataclass(frozen=True, slots=True)
class Found:
    """Inputs of the first fully connected layer, [num_found, num_features]; the labels, −1 where not known."""

    inputs: Tensor
    labels: NDArray[np.int64]


def infer_labels(model: nn.Module, gradient: Gradient, num_rows: int, public: Tensor) -> int | None:
    """How many of a batch's labels are 1, from the bias of the last layer, for one or two logits.

    At batch 1 the sign of the gradient is the label (Zhao et al. 2020, iDLG, Section 3). The gradient of a batch is
    mean(p − y), where mean(p) is taken from the model's answers to *public* inputs (Geng et al. 2021, Towards General
    Deep Leakage in Federated Learning, Section 3).
    """
    name = [key for key, _ in model.named_parameters()][-1]
    slope = gradient[name].double()
    if slope.ndim != 1 or len(slope) > 2:
        return None
    if num_rows == 1:
        return int(slope[-1] < 0)
    with torch.no_grad():
        answer = model(public)
    p = torch.sigmoid(answer[:, -1] - (answer[:, 0] if len(slope) == 2 else 0)).mean()
    return min(max(round(float(num_rows * (p - slope[-1]))), 0), num_rows)


def ratios(gradient: Gradient, layer: str) -> Tensor:
    """Each neuron's gradient by weights over that by bias, [num_neurons with one, num_features]: an input where one
    sample activates the neuron, else a weighted mean of several."""
    weight, bias = gradient[f"{layer}.weight"].double(), gradient[f"{layer}.bias"].double()
    used = bias.abs() > 1e-9 * bias.abs().max().clamp(min=1e-300)
    return weight[used] / bias[used, None]


def guesses(gradient: Gradient, layers: Layers, number: int) -> Tensor:
    """At most *number* inputs that nothing confirms, for gradients with noise: of the strongest direction of all
    neurons together (the best estimate for one sample), then of the single neurons with the largest gradients."""
    weight, bias = gradient[f"{layers.linear}.weight"].double(), gradient[f"{layers.linear}.bias"].double()
    rows = torch.nan_to_num(torch.cat([weight, bias[:, None]], 1))
    strongest = torch.linalg.svd(rows, full_matrices=False)[2][:1]
    rows = torch.cat([strongest, rows[bias.abs().argsort(descending=True)]])[:number]
    found = rows[:, :-1] / torch.where(rows[:, -1:].abs() < 1e-30, 1e-30, rows[:, -1:])
    limits = (0.0, 1e4) if layers.convolutional else (-1e4, 1e4)
    return found.clamp(*limits).float()


@dataclass(frozen=True, slots=True)
class _Check:
    """The rest of the network behind the layer's input, to tell samples from mixtures of them."""

    weight: Floats
    bias: Floats
    head: Floats
    head_bias: float
    num_rows: int
    nonnegative: bool

    def label(self, inputs: Floats, residual: Floats) -> NDArray[np.int64]:
        """For each candidate [n, num_features] with its residual [n]: 0, 1, or −1 where it is no sample."""
        size = np.abs(inputs).max(axis=1, initial=1e-12)
        good = inputs.min(axis=1, initial=0) >= -1e-3 * size if self.nonnegative else np.ones(len(inputs), bool)
        good &= np.isfinite(inputs).all(axis=1) & (size < 1e4)
        p = 1 / (
            1
            + np.exp(
                -np.clip(np.maximum(inputs @ self.weight.T + self.bias, 0) @ self.head + self.head_bias, -500, 500)
            )
        )
        scaled = residual * self.num_rows
        label = np.full(len(inputs), -1)
        for y in (0, 1):
            label[good & (np.abs(scaled - (p - y)) < 2e-4 + 1e-3 * np.abs(p - y))] = y
        return label

    def pattern(self, inputs: Floats) -> Floats:
        """Which neurons each input activates, [n, num_neurons]."""
        return (inputs @ self.weight.T + self.bias > 0).astype(np.float64)


def factorise(model: nn.Module, gradient: Gradient, layers: Layers, num_rows: int) -> Found:
    """Every sample of the batch that can be told apart, through a hidden ReLU layer and one logit (or two).

    num_rows: over how many rows the gradient is a mean. Cost: O(num_neurons² · num_features) a pass, and
    O(2ⁿ · num_neurons) for the last n ≤ 13.
    """
    linear, head = model.get_submodule(layers.linear), model.get_submodule(layers.head or layers.linear)
    if not isinstance(linear, nn.Linear) or not isinstance(head, nn.Linear) or layers.head is None:
        return Found(torch.empty(0, 0), np.empty(0, np.int64))
    top = head.weight.detach().double()
    offset = head.bias.detach().double() if head.bias is not None else torch.zeros(len(top), dtype=torch.float64)
    if len(top) > 2:
        return Found(torch.empty(0, linear.in_features), np.empty(0, np.int64))
    v = (top[-1] - top[0] if len(top) == 2 else top[0]).numpy()
    check = _Check(
        linear.weight.detach().double().numpy(), linear.bias.detach().double().numpy(), v,
        float(offset[-1] - (offset[0] if len(top) == 2 else 0)), num_rows, layers.convolutional,
    )  # fmt: skip
    rows = torch.cat([gradient[f"{layers.linear}.weight"], gradient[f"{layers.linear}.bias"][:, None]], 1)
    mixed = rows.double().numpy() / np.where(np.abs(v) > 1e-9, v, np.inf)[:, None]
    found: list[Floats] = []
    labels: list[int] = []
    while len(found) < num_rows:
        new, residual, label = _next(mixed, check, float(np.abs(mixed).max(initial=0)))
        if not len(new):
            break
        for one, r, y in zip(new, residual, label, strict=True):
            mixed = mixed - np.outer(check.pattern(one[None])[0], r * np.append(one, 1))
            found.append(one)
            labels.append(int(y))
    inputs = torch.from_numpy(np.array(found).reshape(-1, linear.in_features)).float()
    return Found(inputs[:num_rows], np.array(labels[:num_rows], np.int64))


def _next(mixed: Floats, check: _Check, size: float) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Samples that show now: in single neurons, in differences of two, or by the search of patterns."""
    none = np.empty((0, mixed.shape[1] - 1)), np.empty(0), np.empty(0, np.int64)
    if not size > 0:
        return none
    kept = mixed[np.abs(mixed).max(axis=1) > 0]
    _, first = np.unique(np.round(kept / size, 6), axis=0, return_index=True)
    kept = kept[first]
    for shown in (kept, _differences(kept), _patterns(mixed)):
        big = shown[np.abs(shown[:, -1]) * check.num_rows > 1e-3]
        inputs, residual = big[:, :-1] / big[:, -1:], big[:, -1]
        for sign in (1, -1):
            label = check.label(inputs, sign * residual)
            if (good := label >= 0).any():
                return _distinct(inputs[good], sign * residual[good], label[good])
    return none


def _differences(rows: Floats) -> Floats:
    one, other = np.triu_indices(len(rows), 1)
    return rows[one] - rows[other]


def _distinct(inputs: Floats, residual: Floats, label: NDArray[np.int64]) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """One of each: the same sample shows in many places, with the same residual and the same norm."""
    key = np.column_stack([residual / np.abs(residual).max(), np.linalg.norm(inputs, axis=1) / np.abs(inputs).max()])
    _, chosen = np.unique(np.round(key, 3), axis=0, return_index=True)
    return inputs[chosen], residual[chosen], label[chosen]


def _patterns(mixed: Floats) -> Floats:
    """rᵢ · [xᵢ, 1] of samples whose activity patterns are the binary vectors of the column space, if few are left."""
    basis, values, _ = np.linalg.svd(mixed, full_matrices=False)
    rank = int((values > 1e-5 * values[0]).sum())
    if rank > MOST_PATTERNS:
        return np.empty((0, mixed.shape[1]))
    basis = basis[:, :rank]
    pivots = qr(basis.T, pivoting=True, mode="economic")[2][:rank]
    extend = basis @ np.linalg.inv(basis[pivots])
    found: list[Floats] = []
    for start in range(0, 2**rank, 2**12):
        codes = np.arange(start, min(start + 2**12, 2**rank))
        bits = ((codes[:, None] >> np.arange(rank)) & 1).astype(np.float64)
        full = bits @ extend.T
        binary = np.abs(full - np.round(full)).max(axis=1) < 0.02
        binary &= (full.min(axis=1) > -0.5) & (full.max(axis=1) < 1.5) & (codes > 0)
        found.extend(np.round(full[binary]))
    candidates = np.array(found).reshape(-1, len(mixed))
    if len(candidates) <= rank:
        solved: Floats = np.asarray(np.linalg.lstsq(candidates.T, mixed, rcond=1e-6)[0], np.float64)
        return solved if len(candidates) else np.empty((0, mixed.shape[1]))
    random, shown = np.random.default_rng(0), []
    tries = min(40, math.comb(len(candidates), rank))
    for _ in range(tries):  # more binary vectors than samples: other bases of the same space are tried
        chosen = candidates[random.permutation(len(candidates))]
        order = qr(chosen[: 4 * rank].T, pivoting=True, mode="economic")[2][:rank]
        shown.append(np.linalg.lstsq(chosen[order].T, mixed, rcond=1e-6)[0])
    return np.concatenate(shown)
