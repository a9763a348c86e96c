"""The audit of one model and one protection: every attack that applies, against known batches.

The auditor holds the true batches; the attacks get the model, what the coordinator sees (``view``), and public data.
Leaks are counted over all true samples, whichever observation they were found in. ``no gradient`` is the same count
for pictures made by the prior alone: what the criterion means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atoll.audit.generative import Prior, decode_features, generative_attack
from atoll.audit.imprint import imprint
from atoll.audit.inverting_gradients import inverting_gradients
from atoll.audit.leak import Criterion, Match, match_images, match_rows, pictures, similarities, wilson
from atoll.audit.linear_layer import factorise, guesses, infer_labels
from atoll.audit.network import Layers
from atoll.audit.view import Batch, Observation, Protection, observe
from atoll.contract.errors import PlanError

Attack = Literal["linear-layer", "imprint", "generative", "inverting-gradients", "no-gradient"]
PASSIVE: tuple[Attack, ...] = ("linear-layer", "generative", "inverting-gradients", "no-gradient")


@dataclass(frozen=True, slots=True)
class Subject:
    """What is attacked. model: one logit or one a class. public: the attacker's own inputs, images in [0, 1]
    [num_public, channels, height, width] or features [num_public, num_features]. scale: from these to the model's
    input. tolerance: of a match of rows, in the features' units (mapped to [−1, 1]: 0.02 is 1 % of range)."""

    model: nn.Module
    public: Tensor
    scale: Callable[[Tensor], Tensor] = lambda x: x
    criterion: Criterion = field(default_factory=Criterion)
    tolerance: float = 0.02

    @property
    def images(self) -> bool:
        """Whether the inputs are images."""
        return self.public.ndim == 4

    def nearest(self, true: Tensor) -> NDArray[np.float64]:
        """SSIM of each true image with the public one nearest to it, [num_true]; zeros for tables."""
        best: NDArray[np.float64] = similarities(true, self.public).max(axis=1) if self.images else np.zeros(len(true))
        return best


@dataclass(frozen=True, slots=True)
class Leak:
    """One attack's yield. leaked: [num_samples], batch after batch; score: SSIM, or minus the largest difference."""

    attack: str
    leaked: NDArray[np.bool_]
    score: NDArray[np.float64]
    images: Tensor | None = None
    lenient: NDArray[np.bool_] | None = None

    def to_json(self) -> dict[str, Any]:
        """Counts, rate and its 95 % interval; *closer than public*: images closer than any public one."""
        hits, tried = int(self.leaked.sum()), len(self.leaked)
        low, high = wilson(hits, tried)
        found = self.score[np.isfinite(self.score) & (self.score > -1 if self.images is not None else True)]
        told: dict[str, Any] = {
            "attack": self.attack, "reconstructed": hits, "attacked": tried,
            "leak_rate": hits / tried if tried else 0.0, "interval": [low, high],
            "mean_score": float(found.mean()) if len(found) else None,
        }  # fmt: skip
        if self.lenient is not None:
            told["closer_than_public"] = float(self.lenient.mean())
        return told


def attack_rounds(
    subject: Subject, rounds: Sequence[Mapping[str, Batch]], protection: Protection,
    attacks: Sequence[Attack] = PASSIVE, *, seed: int = 0, steps: int = 300,
    captured: Sequence[Sequence[Observation]] | None = None,
) -> list[Leak]:  # fmt: skip
    """Attack every round: site → batch of one local step, its inputs as *subject.public* has them. All rounds start
    from the model's weights. captured: what the coordinator saw of each round, where it is not to be simulated (by
    *protection*, and for the weights that ``imprint`` sends). Raises PlanError where there is nothing to attack."""
    if not rounds:
        raise PlanError(
            "audit.no-rounds", "there is nothing to attack", field="rounds", remedy="give at least one round"
        )
    layers = Layers.of(subject.model, subject.scale(subject.public[:1]))
    prior = Prior.fit(subject.public) if subject.images else None
    leaks: list[Leak] = []
    for attack in attacks:
        model = subject.model
        if attack == "imprint":
            if layers is None or layers.head is None:
                continue
            model = imprint(model, layers, subject.scale(subject.public))
        if attack in ("generative", "inverting-gradients") and prior is None:
            continue
        if attack == "linear-layer" and layers is None:
            continue
        random = np.random.default_rng(seed)
        seen = (
            captured
            if captured is not None and attack != "imprint"
            else [
                observe(model, {s: (subject.scale(x), y) for s, (x, y) in sites.items()}, protection, random)
                for sites in rounds
            ]
        )
        found = _reconstruct(attack, subject, model, layers, prior, seen, seed, steps)
        leaks.append(_judge(attack, subject, rounds, found))
    return leaks


def _reconstruct(
    attack: Attack, subject: Subject, model: nn.Module, layers: Layers | None, prior: Prior | None,
    seen: Sequence[Sequence[Observation]], seed: int, steps: int,
) -> list[Tensor]:  # fmt: skip
    """For each round, reconstructions from everything seen in it."""
    if attack == "no-gradient":
        sizes = [sum(o.num_rows for o in one if o.what != "masked") for one in seen]
        if prior is None:
            made = torch.Generator().manual_seed(seed)
            drawn = [torch.randint(len(subject.public), (size,), generator=made) for size in sizes]
            return [subject.public[rows] for rows in drawn]
        return [prior.sample(size, seed + i) for i, size in enumerate(sizes)]
    if attack in ("linear-layer", "imprint"):
        if layers is None:
            return [subject.public[:0] for _ in seen]
        return _exact(subject, model, layers, prior, seen)
    flat = [(i, o) for i, one in enumerate(seen) for o in one]
    found: list[list[Tensor]] = [[] for _ in seen]
    for size in {o.num_rows for _, o in flat}:
        chosen = [(i, o) for i, o in flat if o.num_rows == size]
        group = max(1, 64 // size)
        for start in range(0, len(chosen), group):
            part = chosen[start : start + group]
            images = _search(attack, subject, model, prior, [o for _, o in part], seed + start, steps)
            for (i, _), image in zip(part, images, strict=True):
                found[i].append(image)
    return [torch.cat(one) for one in found]


def _exact(
    subject: Subject, model: nn.Module, layers: Layers, prior: Prior | None,
    seen: Sequence[Sequence[Observation]],
) -> list[Tensor]:  # fmt: skip
    inputs = [torch.cat([_layer_inputs(model, layers, o) for o in one]) for one in seen]
    if prior is None:
        return [rows.reshape(len(rows), *subject.public.shape[1:]) for rows in inputs]
    every = torch.nan_to_num(torch.cat(inputs))
    images = decode_features(model, layers.linear, every, prior, subject.scale)
    return list(torch.split(images, [len(one) for one in inputs]))


def _layer_inputs(model: nn.Module, layers: Layers, seen: Observation) -> Tensor:
    """A hidden layer gives what can be told apart, and guesses; without one, one ratio is the input, or a mean."""
    if layers.head is not None:
        found = factorise(model, seen.gradient, layers, seen.num_rows).inputs
        return torch.cat([found, guesses(seen.gradient, layers, seen.num_rows - len(found))])
    return guesses(seen.gradient, layers, 1)


def _search(
    attack: Attack, subject: Subject, model: nn.Module, prior: Prior | None,
    seen: Sequence[Observation], seed: int, steps: int,
) -> Tensor:  # fmt: skip
    gradients = [o.gradient for o in seen]
    size = seen[0].num_rows
    ones = [infer_labels(model, o.gradient, size, subject.scale(subject.public)) or 0 for o in seen]
    labels = torch.tensor([[float(i < n) for i in range(size)] for n in ones])
    if attack == "generative" and prior is not None:
        return generative_attack(model, gradients, labels, prior, subject.scale, seed, steps)
    made = torch.Generator().manual_seed(seed)
    start = 0.5 + 0.05 * torch.randn(len(seen), size, *subject.public.shape[1:], generator=made)
    return inverting_gradients(model, gradients, labels, start, subject.scale, steps)


def _judge(attack: str, subject: Subject, rounds: Sequence[Mapping[str, Batch]], found: Sequence[Tensor]) -> Leak:
    leaked, score, lenient, images = [], [], [], []
    batches = [torch.cat([x for x, _ in sites.values()]) for sites in rounds]
    near = np.split(subject.nearest(torch.cat(batches)), np.cumsum([len(b) for b in batches])[:-1])
    for true, made, nearest in zip(batches, found, near, strict=True):
        made = torch.nan_to_num(made)
        if not subject.images:
            match: Match = match_rows(true, made, subject.tolerance)
        else:
            match = match_images(true, made, nearest, subject.criterion)
            lenient.append(Criterion(subject.criterion.ssim, 0.0).met(match.score, nearest) & (match.assigned >= 0))
            shown = torch.zeros_like(true)
            hit = torch.from_numpy(match.assigned >= 0)
            shown[hit] = made[match.assigned[match.assigned >= 0]]
            images.append(shown)
        leaked.append(match.leaked)
        score.append(match.score)
    return Leak(
        attack, np.concatenate(leaked), np.concatenate(score), torch.cat(images) if images else None,
        np.concatenate(lenient) if lenient else None,
    )  # fmt: skip


def audit(
    subject: Subject, rounds: Sequence[Mapping[str, Batch]], protection: Protection,
    attacks: Sequence[Attack] | None = None, *, seed: int = 0, steps: int = 300, num_pictures: int = 8,
) -> tuple[dict[str, Any], bytes | None]:  # fmt: skip
    """(results as JSON, a PNG of the first *num_pictures* samples beside their reconstructions, or None for tables).

    ``leak_rate`` is of the passive attack that got most; an active coordinator (``imprint``) stands beside it.
    """
    chosen: Sequence[Attack] = attacks if attacks is not None else (*PASSIVE, "imprint")
    leaks = attack_rounds(subject, rounds, protection, chosen, seed=seed, steps=steps)
    counted = [leak for leak in leaks if leak.attack not in ("no-gradient", "imprint")]
    worst = max(counted, key=lambda leak: int(leak.leaked.sum()), default=None)
    result: dict[str, Any] = {
        "protection": protection.kind,
        "epsilon": protection.epsilon,
        "noise_multiplier": protection.noise_multiplier if "dp" in protection.kind else None,
        "sites": len(rounds[0]),
        "batch_size": len(next(iter(rounds[0].values()))[1]),
        "criterion": (
            f"SSIM ≥ {subject.criterion.ssim:g} and the dissimilarity of the nearest public image lessened by"
            f" {subject.criterion.margin:.0%}"
            if subject.images
            else f"every feature within {subject.tolerance / 2:.1%} of its range"
        ),
        "attacks": [leak.to_json() for leak in leaks],
        "leak_rate": float(worst.leaked.mean()) if worst else 0.0,
        "by": worst.attack if worst else None,
    }
    if not subject.images:
        return result, None
    true = torch.cat([x for sites in rounds for x, _ in sites.values()])[:num_pictures]
    rows = [
        (leak.attack, leak.images[:num_pictures], leak.score[:num_pictures].clip(0).tolist())
        for leak in leaks
        if leak.images is not None
    ]
    return result, pictures(true, rows)
