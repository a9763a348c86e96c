"""How private is it at least *not*? Lower bounds on ε by attack, to hold against what is claimed.

A bound above the claim means that the implementation (or its accounting) is wrong; one below proves nothing.

``two_worlds``: a mechanism is run many times with a canary and without (Jagielski et al. 2020, Auditing
Differentially Private Machine Learning, Section 3; Clopper & Pearson 1934 for the rates). ``one_run``: one run in which
each of many canaries was put in by a coin's toss (Steinke, Nasr, Jagielski 2023, Privacy Auditing with One (1) Training
Run, Theorem 5.2 and its Appendix D).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binom

from atoll.contract.errors import PlanError

Floats = NDArray[np.float64]
MOST = 100.0
"""No bound above it is reported."""


def two_worlds(without: Floats, with_canary: Floats, delta: float, confidence: float = 0.95) -> float:
    """ε is at least this, from scores that are higher for outputs which look as if the canary were in.

    without, with_canary: [num_trials] each. The threshold is chosen on the first half of the trials and the rates are
    bounded on the rest, so that the choice costs no confidence; two rates and two directions of the inequality share
    1 − confidence. Raises PlanError for fewer than 20 trials.
    """
    if min(len(without), len(with_canary)) < 20:
        raise PlanError("audit.few-trials", "too few trials to bound anything", field="trials",
                        remedy="use at least 20 with the canary and 20 without")  # fmt: skip
    alpha = (1 - confidence) / 4
    likely = _one_way(with_canary, without, delta, alpha)
    return min(max(likely, _one_way(-without, -with_canary, delta, alpha)), MOST)


def _one_way(likelier: Floats, other: Floats, delta: float, alpha: float) -> float:
    """log((P − δ) / Q) for "the score is above a cut", P in the world *likelier* and Q in the *other*."""
    above = np.sort(likelier[::2]), np.sort(other[::2])
    cuts = np.unique(np.concatenate(above))
    counts = [len(one) - np.searchsorted(one, cuts, side="right") for one in above]
    cut = cuts[np.argmax(_log_ratio(counts[0], len(above[0]), counts[1], len(above[1]), delta, alpha))]
    tested = likelier[1::2], other[1::2]
    hits, alarms = (np.array([(one > cut).sum()]) for one in tested)
    return float(_log_ratio(hits, len(tested[0]), alarms, len(tested[1]), delta, alpha)[0])


def _log_ratio(
    hits: NDArray[np.int64], num_1: int, alarms: NDArray[np.int64], num_0: int, delta: float, alpha: float
) -> Floats:
    """With the worse end of each rate's Clopper-Pearson interval; 0 at least."""
    low = np.where(hits > 0, beta.ppf(alpha, np.maximum(hits, 1), num_1 - hits + 1), 0.0)
    high = np.where(alarms < num_0, beta.ppf(1 - alpha, alarms + 1, np.maximum(num_0 - alarms, 1)), 1.0)
    ratio: Floats = np.log(np.maximum(low - delta, 1e-300) / high)
    return np.maximum(ratio, 0.0)


def one_run(correct: int, guesses: int, canaries: int, delta: float, confidence: float = 0.95) -> float:
    """ε is at least this, when of *canaries*, each in or out by a fair coin, *guesses* were made and *correct* right.

    Raises PlanError unless 0 ≤ correct ≤ guesses ≤ canaries.
    """
    if not 0 <= correct <= guesses <= canaries or canaries == 0:
        raise PlanError("audit.bad-count", "guesses are between the correct ones and the canaries", field="guesses",
                        remedy="count each canary once")  # fmt: skip
    low, high = 0.0, MOST
    if _chance(correct, guesses, canaries, high, delta) <= 1 - confidence:
        return MOST
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if _chance(correct, guesses, canaries, middle, delta) < 1 - confidence else (low, middle)
        )
    return low


def _chance(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Most that the probability of so many correct guesses can be under (ε, δ): Theorem 5.2."""
    rate = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, rate))
    if delta == 0 or correct == 0:
        return tail
    mass = np.cumsum(binom.pmf(correct - 1 - np.arange(correct), guesses, rate))  # P[correct − i ≤ B < correct]
    alpha = float((mass / np.arange(1, correct + 1)).max())
    return min(tail + alpha * 2 * canaries * delta, 1.0)


def guess(scores: Floats, included: NDArray[np.bool_], share: float = 0.5) -> tuple[int, int]:
    """(correct, guesses): the highest scores are said to be in and the lowest to be out, half of *share* each.

    scores: [canaries], higher where the run looks as if that canary were in it.
    """
    number = max(int(len(scores) * share) // 2, 1)
    order = np.argsort(scores)
    correct = int(included[order[-number:]].sum() + (~included[order[:number]]).sum())
    return correct, 2 * number


def canaries(number: int, size: int, norm_l2: float, random: np.random.Generator) -> Floats:
    """Gradient canaries [number, size]: one random ±1 direction each, of the norm that clipping lets through.

    Source: Nasr et al. 2023, Tight Auditing of Differentially Private Machine Learning, Section 4 (Dirac canaries, here
    spread out, so that more than *size* of them are possible).
    """
    signs = random.integers(0, 2, (number, size)) * 2.0 - 1
    made: Floats = np.asarray(signs * (norm_l2 / math.sqrt(size)), np.float64)
    return made


def audit_gaussian_sum(
    noise_multiplier: float, delta: float, *, num_canaries: int = 1000, size: int = 10_000, seed: int = 0
) -> float:
    """The one-run bound for one noised sum of clipped gradients: what a training round releases.

    Every canary is scored by its inner product with the sum. Noise is drawn here; to audit what a protection
    draws, hand its output to :func:`audit_sum`.
    """
    random = np.random.default_rng(seed)
    planted = canaries(num_canaries, size, 1.0, random)
    included = random.random(num_canaries) < 0.5
    return audit_sum(planted[included].sum(0) + random.normal(0, noise_multiplier, size), planted, included, delta)


def audit_sum(released: Floats, planted: Floats, included: NDArray[np.bool_], delta: float) -> float:
    """The one-run bound from a released vector [size] into which the *included* of *planted* [canaries, size] were
    added. The best of four numbers of guesses, each at a quarter of 5 %."""
    scores, best = planted @ released, 0.0
    for share in (0.05, 0.2, 0.5, 1.0):
        correct, guesses = guess(scores, included, share)
        best = max(best, one_run(correct, guesses, len(planted), delta, 1 - 0.05 / 4))
    return best
