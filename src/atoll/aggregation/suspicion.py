"""Poisoning and free riding: who is suspected, with what evidence, of what the coordinator sees of sites or groups.

In each round every update is measured: its length, its way beside the rule's result, how far it is from it, what its
site claims to weigh, how far it is from the site's own last one, from the last result and from the others. A reason
holds against it in a round by :class:`Limits`; it is told of a site when it held in most of the rounds in which it
could be judged, and in three at least. All but a breach of the protocol is measured against the other sites, so that
more than half of them must be honest. Sites whose data differ are not accused of that: a length or a claim stands out
only beyond the sites' own spread, and a direction only where it is against the rule's result and against the others.

Of groups drawn anew each round, a bad one is put down to each of its sites; a site is told of when that is far more
often (binomial test) than a site of the cohort would meet it. The more attackers, the more rounds that takes.

What was sent before is kept as a sketch: sums of its elements with random signs, which keep lengths and distances to
about 1 / √256 (Charikar, Chen & Farach-Colton 2002, Finding Frequent Items in Data Streams; here one row of counters),
and the distance of nothing exactly. Sources of the reasons: Fung, Yoon & Beschastnikh 2020, The Limitations of
Federated Learning in Sybil Settings, §5 (copies); Fraboni, Vidal & Lorenzi 2021, Free-rider Attacks on Model
Aggregation in Federated Learning, §3 (free riders).

An attacker that knows these limits stays below them; what it can then do is the rule's matter. Where attackers have
taken a rule over, its result is theirs, and honest sites are against it: look at all that are named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from atoll.aggregation.krum import squared_distances
from atoll.aggregation.rule import Floats
from atoll.contract.wire import Array

REASONS = ("broke", "nothing", "large", "against", "free_rider", "replay", "copy", "claim")
"""broke: a reply that was not what was declared, or values beyond their bound. nothing: hardly any change. large: far
longer than the others'. against: away from the rule's result, and from the others on the whole. free_rider: the last
result, scaled or not. replay: its own last change. copy: another site's. claim: far more weight than others claim."""
WIDTH = 256
TINY = float(np.finfo(float).tiny)
MOST_POINTS = 12
"""Trust is told for at most so many parts of a run."""
PREFIX = "evidence_"


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a reason begins to hold in a round. nothing: length, as a share of the median; spread, factor, claim: log
    length, or log weight, beyond so many median deviations and this factor; same: distance, as a share of the median
    one. share, rounds: in how many rounds it must have held. chance: of meeting so many bad groups."""

    nothing: float = 0.01
    spread: float = 5.0
    factor: float = 3.0
    claim: float = 100.0
    same: float = 0.05
    share: float = 0.6
    rounds: int = 3
    chance: float = 1e-3


@dataclass
class Seen:
    """One round, of updates [n] that are each of one site or of several."""

    sites: Sequence[tuple[str, ...]]
    changes: Floats
    claims: Floats
    result: Floats
    trust: Floats
    beyond: Sequence[bool]
    broken: Sequence[str] = ()


@dataclass
class Evidence:
    """Against the sites of a cohort, in its order. held, judged: rounds by site and reason, [sites, reasons]; figures:
    what was measured where a reason held, summed; rounds: in which a site was seen, [sites]; trust: by round, [rounds,
    sites], 1 for an even share, NaN for who was not there; last: sketches of the sites' last changes, [sites, WIDTH],
    NaN before the first; result: of the last result, [WIDTH].
    lasting: are the changes of all rounds about the same weights?"""

    sites: tuple[str, ...]
    seed: int
    single: bool
    lasting: bool = True
    limits: Limits = Limits()
    held: Floats = field(init=False)
    judged: Floats = field(init=False)
    figures: Floats = field(init=False)
    rounds: Floats = field(init=False)
    trust: Floats = field(init=False)
    last: Floats = field(init=False)
    result: Floats = field(init=False)

    def __post_init__(self) -> None:
        n = len(self.sites)
        self.held, self.judged, self.figures = (np.zeros((n, len(REASONS))) for _ in range(3))
        self.rounds, self.trust = np.zeros(n), np.empty((0, n))
        self.last, self.result = np.full((n, WIDTH), np.nan), np.zeros(WIDTH)

    NAMES = ("held", "judged", "figures", "rounds", "trust", "last", "result")

    def arrays(self) -> dict[str, Array]:
        """For a checkpoint."""
        return {PREFIX + name: getattr(self, name).copy() for name in self.NAMES} if self.rounds.any() else {}

    def resumed(self, state: dict[str, Array]) -> Self:
        """With what a checkpoint holds of it, which is taken out of *state*."""
        for name in self.NAMES:
            if (found := state.pop(PREFIX + name, None)) is not None:
                setattr(self, name, np.array(found))
        return self

    # ---------------------------------------------------------------- a round

    def note(self, seen: Seen) -> None:
        """Take note of a round; of sketches kept from earlier rounds only where single updates are seen."""
        places = {site: place for place, site in enumerate(self.sites)}
        members = [[places[site] for site in group] for group in seen.sites]
        sketches = sketched(seen.changes, self.seed)
        before, result = np.full(sketches.shape, np.nan), np.zeros(WIDTH)
        if self.single and self.lasting:
            before, result = self.last[[m[0] for m in members]], self.result
        found = measured(seen, sketches, before, result, self.limits)
        if not self.single:  # groups are sums of others each time
            del found["copy"]
        row = np.full(len(self.sites), np.nan)
        for unit, group in enumerate(members):
            row[group] = seen.trust[unit] * len(members)
            self.rounds[group] += 1
            for reason, (figures, holds) in found.items():
                at = (group, REASONS.index(reason))
                if np.isfinite(figures[unit]):
                    self.judged[at] += 1
                    self.held[at] += holds[unit]
                    self.figures[at] += figures[unit] * holds[unit]
        for site in seen.broken:
            for table in (self.judged, self.held, self.figures):
                table[places[site], 0] += 1
        self.trust = np.vstack([self.trust, row])
        self.result = sketched(seen.result[None], self.seed)[0]
        if self.single:
            self.last[[m[0] for m in members]] = sketches

    # ---------------------------------------------------------------- what is told

    def told(self) -> dict[str, Any]:
        """The result's "suspects": site, in how many of its rounds, and the reasons with the rounds in which each held,
        those in which it could be judged, and the mean of what was measured; and "trust": by site, over at most twelve
        parts of the run. Empty where no updates were seen."""
        if not self.rounds.any() and not self.held.any():
            return {}
        suspects = []
        for place, site in enumerate(self.sites):
            reasons = {REASONS[r]: self._said(place, r) for r in range(len(REASONS)) if self._holds(place, r)}
            if reasons:
                rounds = max(told["rounds"] for told in reasons.values())
                suspects.append({"site": site, "rounds": rounds, "reasons": reasons})
        parts = np.array_split(self.trust, min(len(self.trust), MOST_POINTS) or 1)
        means = [[_mean(part[:, place]) for part in parts] for place in range(len(self.sites))]
        return {"suspects": suspects, "trust": dict(zip(self.sites, means, strict=True))}

    def _holds(self, place: int, reason: int) -> bool:
        held, judged = int(self.held[place, reason]), int(self.judged[place, reason])
        if self.single:
            least = 1 if reason == 0 else max(min(self.limits.rounds, len(self.trust)), self.limits.share * judged)
            return held > 0 and held >= least
        met = float(self.held[:, reason].sum() / max(self.judged[:, reason].sum(), 1))
        return held >= self.limits.rounds and _tail(held, judged, met) < self.limits.chance

    def _said(self, place: int, reason: int) -> dict[str, Any]:
        held, judged = int(self.held[place, reason]), int(self.judged[place, reason])
        return {"rounds": held, "of": judged, "figure": float(self.figures[place, reason] / held)}


def measured(
    seen: Seen, sketches: Floats, before: Floats, result: Floats, limits: Limits
) -> dict[str, tuple[Floats, Any]]:
    """By reason: what was measured of each update, NaN where it cannot be judged, and whether the reason holds. before:
    sketches of the updates of the same sites last time; result: of the last result."""
    lengths = np.array([np.linalg.norm(change) for change in seen.changes])
    middle = float(np.median(lengths))
    ratio, claims = lengths / (middle or 1.0), seen.claims / float(np.median(seen.claims))
    found: dict[str, tuple[Floats, Any]] = {}
    found["broke"] = np.array(seen.beyond, float), np.array(seen.beyond, bool)
    found["nothing"] = ratio, ratio < limits.nothing * np.minimum(claims, 1) if middle else np.zeros(len(ratio), bool)
    found["large"] = ratio, _stands_out(ratio, limits.factor, limits.spread)
    found["claim"] = claims, _stands_out(claims, limits.claim, limits.spread)
    cosine, ways = _cosines(seen.changes, lengths, seen.result), seen.changes / np.maximum(lengths, TINY)[:, None]
    found["against"] = cosine, (cosine < 0) & (ways @ ways.sum(0) < 1)  # its own part of that is 1
    cosines = _cosines(sketches, np.linalg.norm(sketches, axis=1), result)
    found["free_rider"] = _same(np.sqrt(np.maximum(2 - 2 * cosines, 0)), limits.same)  # between their ends, at length 1
    sizes = np.maximum(np.linalg.norm(sketches, axis=1), np.linalg.norm(before, axis=1))
    found["replay"] = _same(_share(np.linalg.norm(sketches - before, axis=1), sizes), limits.same)
    apart = np.sqrt(squared_distances(sketches))
    np.fill_diagonal(apart, np.inf)
    found["copy"] = _same(_share(apart.min(1), np.linalg.norm(sketches, axis=1)), limits.same)
    return found


def sketched(changes: Floats, seed: int) -> Floats:
    """[num_updates, WIDTH]: each sum over elements with random signs. changes: [num_updates, size]."""
    size = changes.shape[1]
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, size, 6))))
    signs = random.integers(0, 2, size).astype(np.float64) * 2 - 1
    padded = np.zeros(-(-size // WIDTH) * WIDTH)
    found = np.empty((len(changes), WIDTH))
    for place, change in enumerate(changes):
        padded[:size] = change * signs
        found[place] = padded.reshape(-1, WIDTH).sum(0)
    return found


def _cosines(changes: Floats, lengths: Floats, towards: Floats) -> Floats:
    """NaN where one of the two is nothing."""
    return _share(np.asarray(changes @ towards), lengths * float(np.linalg.norm(towards)))


def _share(values: Floats, of: Floats) -> Floats:
    return np.asarray(np.divide(values, of, out=np.full(len(values), np.nan), where=of > 0))


def _stands_out(ratio: Floats, factor: float, spread: float) -> Any:
    """Far above the median, which is 1, and beyond the spread of those below it: who is large does not widen that."""
    logs = np.log(np.maximum(ratio, TINY))
    return logs > max(math.log(factor), spread * float(np.median(-logs[logs <= 0])))


def _same(distances: Floats, share: float) -> tuple[Floats, Any]:
    """Distances, and which are next to nothing beside the median one; three must be known."""
    known = distances[np.isfinite(distances)]
    if len(known) < 3:
        return np.full(len(distances), np.nan), np.zeros(len(distances), bool)
    return distances, distances < share * float(np.median(known))


def _mean(values: Floats) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def _tail(held: int, judged: int, chance: float) -> float:
    """P(X ≥ held) of Binomial(judged, chance)."""
    return math.fsum(math.comb(judged, k) * chance**k * (1 - chance) ** (judged - k) for k in range(held, judged + 1))
