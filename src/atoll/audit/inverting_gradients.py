"""Inverting Gradients: search the input whose gradient points the way that was observed.

Minimises 1 − cos(∇loss(x), observed) + α·TV(x) by Adam on the *sign* of its derivative. Many gradients at once: the
model's weights are shared, inputs and labels are batched by ``torch.func.vmap``.

Source: Geiping et al. 2020, Inverting Gradients – How easy is it to break privacy in federated learning?, equation 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from atoll.audit.network import Gradient, loss, parameters


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels of each image [num_images, ...], [num_images]."""
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().flatten(1).mean(1)
    return down + (images[..., 1:] - images[..., :-1]).abs().flatten(1).mean(1)


def match_gradient(
    model: nn.Module, gradients: list[Gradient], labels: Tensor, start: Tensor, decode: Callable[[Tensor], Tensor], *,
    steps: int, learning_rate: float, penalty: Callable[[Tensor], Tensor], signed: bool = False,
    within: tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """The variables, like *start* [num_gradients, batch_size, ...], whose inputs have the observed gradients.

    decode: variables → the network's inputs. penalty: variables → [num_gradients]. signed: take the sign of the
    derivative. within: keep the variables there. Layers whose gradient is 0 in all of them, as of those that a site
    keeps, do not count. Cost: *steps* times a gradient of a gradient.
    """
    values = parameters(model)
    seen = torch.cat([torch.stack([g[n] for g in gradients]).any().expand(v.numel()) for n, v in values.items()])
    observed = torch.stack([torch.cat([g[name].flatten() for name in values]) for g in gradients])
    observed = observed / observed.norm(dim=1, keepdim=True).clamp(min=1e-30)

    def objective(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, values, (x,)), y)

    each = vmap(grad(objective), in_dims=(None, 0, 0), randomness="error")
    variables = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([variables], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, learning_rate / 20)
    for _ in range(steps):
        made = torch.cat([g.flatten(1) for g in each(values, decode(variables), labels).values()], 1) * seen
        cosine = (made * observed).sum(1) / made.norm(dim=1).clamp(min=1e-30)
        (slope,) = torch.autograd.grad((1 - cosine + penalty(variables)).sum(), [variables])
        variables.grad = slope.sign() if signed else slope
        optimiser.step()
        schedule.step()
        if within is not None:
            with torch.no_grad():
                variables.clamp_(*within)
    return variables.detach()


def inverting_gradients(
    model: nn.Module, gradients: list[Gradient], labels: Tensor, start: Tensor, scale: Callable[[Tensor], Tensor],
    steps: int = 500, total_variation_weight: float = 0.01,
) -> Tensor:  # fmt: skip
    """Images in [0, 1], [num_gradients, batch_size, ...], from *start* (grey, or noise) without any prior."""
    return match_gradient(
        model, gradients, labels, start, scale, steps=steps, learning_rate=0.02, signed=True, within=(0.0, 1.0),
        penalty=lambda x: total_variation_weight * total_variation(x.flatten(0, 1)).reshape(len(x), -1).mean(1),
    )  # fmt: skip
