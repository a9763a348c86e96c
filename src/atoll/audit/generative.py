"""Attacks with a prior learnt from public images: what a gradient leaves open, the prior fills in.

Two ways. Where the first fully connected layer's inputs are known (``linear_layer``), a decoder learnt on public
images (ridge regression from features to pixels) draws the image. Else the whole gradient is matched, over the latent
variables of a linear generator (principal components of public images, Gaussian latents), then over pixels.

Sources: Jeon et al. 2021, Gradient Inversion with Generative Image Prior, Section 3 (latents first, then pixels);
Balunović et al. 2022, Bayesian Framework for Gradient Leakage, Section 3 (the prior as a penalty).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from atoll.audit.inverting_gradients import match_gradient, total_variation
from atoll.audit.network import Gradient, features

Scale = Callable[[Tensor], Tensor]
"""From images in [0, 1] to the network's input."""


@dataclass(frozen=True, slots=True)
class Prior:
    """A Gaussian on public images: mean [num_pixels], components [num_latents, num_pixels] scaled to unit latents.

    public: the images in [0, 1], [num_images, channels, height, width].
    """

    public: Tensor
    mean: Tensor
    components: Tensor

    @staticmethod
    def fit(public: Tensor, num_latents: int = 200) -> Prior:
        """By principal components of *public*."""
        flat = public.flatten(1)
        mean = flat.mean(0)
        _, size, directions = torch.linalg.svd(flat - mean, full_matrices=False)
        scaled = directions * (size / math.sqrt(len(public)))[:, None]
        return Prior(public, mean, scaled[: min(num_latents, len(public))])

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents [..., num_latents]."""
        flat = self.mean + latents @ self.components
        return flat.reshape(*latents.shape[:-1], *self.public.shape[1:])

    def sample(self, number: int, seed: int) -> Tensor:
        """Images of the prior alone: what an attacker without any gradient would show. Half of
        the prior's spread: nearer to the mean is nearer to everybody."""
        made = torch.Generator().manual_seed(seed)
        return self.decode(0.5 * torch.randn(number, len(self.components), generator=made)).clamp(0, 1)


def decode_features(
    model: nn.Module, layer: str, found: Tensor, prior: Prior, scale: Scale, ridge: float = 0.01
) -> Tensor:
    """Images in [0, 1] for inputs of *layer*, *found* [num_found, num_features], by the decoder.

    The decoder learns from public images, moved, mirrored and with other contrasts. ridge: its penalty, in mean
    variances of the features. (Searching on, for pixels whose features fit better, made images worse.)
    """
    with torch.no_grad():
        images = varied(prior.public)
        parts = [scale(images[start : start + 512]) for start in range(0, len(images), 512)]
        known = torch.cat([features(model, layer, part) for part in parts]).double()
        middle, mean = known.mean(0), images.flatten(1).mean(0).double()
        known, pixels = known - middle, images.flatten(1).double() - mean
        wide = known.shape[1] > len(known)
        square = known @ known.T if wide else known.T @ known
        square += ridge * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
        right = pixels if wide else known.T @ pixels
        solved = torch.linalg.solve(square, right)
        weights = known.T @ solved if wide else solved
        drawn: Tensor = (mean + (found.double() - middle) @ weights).float()
        return drawn.reshape(len(found), *images.shape[1:]).clamp(0, 1)


def varied(images: Tensor) -> Tensor:
    """The images, mirrored, moved by a pixel in four directions, and with three other contrasts: nine times as many."""
    around = functional.pad(images, (1, 1, 1, 1), mode="replicate")
    height, width = images.shape[-2:]
    moved = [around[..., 1 + y : 1 + y + height, 1 + x : 1 + x + width] for y, x in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    lit = [(0.5 + c * (images - 0.5) + light).clamp(0, 1) for c, light in ((0.8, 0.1), (1.2, -0.1), (0.9, -0.1))]
    return torch.cat([images, images.flip(-1), *moved, *lit])


def generative_attack(
    model: nn.Module, gradients: list[Gradient], labels: Tensor, prior: Prior, scale: Scale, seed: int, steps: int = 300
) -> Tensor:
    """Images [num_gradients, batch_size, ...] by gradient matching over latents, then over pixels.

    labels: [num_gradients, batch_size], as inferred.
    """
    made = torch.Generator().manual_seed(seed)
    latents = 0.3 * torch.randn(*labels.shape, len(prior.components), generator=made)
    latents = match_gradient(
        model, gradients, labels, latents, lambda z: scale(prior.decode(z)), steps=steps, learning_rate=0.05,
        penalty=lambda z: 1e-3 * z.square().mean((1, 2)),
    )  # fmt: skip
    return match_gradient(
        model, gradients, labels, prior.decode(latents).clamp(0, 1), scale, steps=steps // 3, learning_rate=0.005,
        penalty=lambda x: 0.02 * total_variation(x.flatten(0, 1)).reshape(len(x), -1).mean(1), within=(0.0, 1.0),
    )  # fmt: skip
