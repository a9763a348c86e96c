"""What an attacker knows of a network: its layers in the order they run, and the gradient of a batch.

Every attack takes a plain ``torch.nn.Module`` with one logit (binary cross-entropy) or one logit a class
(cross-entropy), and mean losses over a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

Gradient = Mapping[str, Tensor]
"""Parameter name → gradient of the mean loss, or a site's update divided by minus its learning rate."""


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of [num_rows, 1] or [num_rows, num_classes] logits for labels [num_rows]."""
    if logits.shape[-1] == 1:
        return functional.binary_cross_entropy_with_logits(logits[..., 0], labels.to(logits.dtype))
    return functional.cross_entropy(logits, labels.long())


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters, detached."""
    return {name: value.detach() for name, value in model.named_parameters()}


def batch_gradient(model: nn.Module, x: Tensor, y: Tensor, clip_norm_l2: float | None = None) -> dict[str, Tensor]:
    """The gradient that a site computes: of the mean loss of its batch, each record's clipped to *clip_norm_l2*.

    x: [num_rows, ...]; y: [num_rows]. One local step of SGD changes the weights by −learning rate times it.
    Clipping as in Abadi et al. 2016, Deep Learning with Differential Privacy, Algorithm 1.
    """
    values = parameters(model)

    def objective(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, values, (x,)), y)

    if clip_norm_l2 is None:
        return dict(grad(objective)(values, x, y))
    single = vmap(grad(objective), in_dims=(None, 0, 0), chunk_size=64)(values, x[:, None], y[:, None])
    norm = torch.stack([g.flatten(1).square().sum(1) for g in single.values()]).sum(0).sqrt()
    share = (clip_norm_l2 / norm.clamp(min=1e-12)).clamp(max=1)
    return {name: torch.einsum("n,n...->...", share, g) / len(x) for name, g in single.items()}


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers that matter to an attack. linear: the first fully connected one to run; head: the one after it, if
    any; convolutional: whether something runs before *linear* that changes the input."""

    linear: str
    head: str | None
    convolutional: bool

    @staticmethod
    def of(model: nn.Module, x: Tensor) -> Layers | None:
        """By running *model* on *x* [1, ...]; None where it has no fully connected layer with a bias."""
        ran: list[tuple[str, nn.Module]] = []
        hooks = [
            module.register_forward_pre_hook(lambda module, _, name=name: ran.append((name, module)))
            for name, module in model.named_modules()
            if not list(module.children())
        ]
        with torch.no_grad():
            model(x)
        for hook in hooks:
            hook.remove()
        linear = [(i, name) for i, (name, module) in enumerate(ran) if isinstance(module, nn.Linear)]
        if not linear or model.get_submodule(linear[0][1]).bias is None:
            return None
        before = any(not isinstance(module, nn.Flatten | nn.Identity) for _, module in ran[: linear[0][0]])
        return Layers(linear[0][1], linear[1][1] if len(linear) == 2 else None, before)


def features(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """What enters *layer* when *model* runs on *x*, [num_rows, num_features]."""
    caught: list[Tensor] = []
    module = model.get_submodule(layer)
    hook = module.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        model(x)
    finally:
        hook.remove()
    return caught[0].reshape(len(x), -1)
