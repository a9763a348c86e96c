"""Exact samplers on a stream of secure random bytes.

Noise is drawn from :class:`Secure`, never from a statistical generator: who can guess its state can
subtract the noise. Samplers are vectorised and *lazily exact*: a uniform real is known by its first 64
bits; where these do not decide a comparison (about once in 2^39 draws), more bits are drawn and the
comparison is made with as many digits as it takes. So no probability is rounded, which is where
floating-point samplers lose privacy.

Source: Canonne, Kamath & Steinke 2020, The Discrete Gaussian for Differential Privacy, §5 (Bernoulli(exp(-γ))
and geometric variables without floating point); Mironov 2012, On Significance of the Least Significant Bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
T = TypeVar("T", bound=np.generic)

UNDECIDED = 2.0**24
"""Of 2^64: how near a 64-bit word may be to a probability computed in float64 (whose error is below 2^-44)."""


class Secure(Protocol):
    """A cryptographically secure stream, such as AES-CTR under a key that only this site knows."""

    def bytes(self, n: int) -> bytes:
        """The next *n* bytes."""


def words(size: int, random: Secure) -> Words:
    """*size* uniform 64-bit words (read-only)."""
    return np.frombuffer(random.bytes(8 * size), "<u8").astype(np.uint64, copy=False)


def below(bound: int, size: int, random: Secure) -> Words:
    """*size* uniform integers in [0, bound), 1 ≤ bound ≤ 2^63, without bias."""
    drawn = words(size, random)
    last = np.uint64(2**64 // bound * bound - 1)
    if len(beyond := np.flatnonzero(drawn > last)):
        drawn = drawn.copy()
        while len(beyond):
            drawn[beyond] = words(len(beyond), random)
            beyond = beyond[drawn[beyond] > last]
    return drawn - drawn // np.uint64(bound) * np.uint64(bound)


def bernoulli_exp(rates: NDArray[np.float64], exact: Callable[[int], Fraction], random: Secure) -> NDArray[np.bool_]:
    """True with probability exp(-rate), for each rate ≥ 0 in *rates* [n].

    exact: the i-th rate without rounding, for the rare i that float64 cannot decide.
    """
    drawn = words(len(rates), random)
    gap = drawn - np.exp(-rates) * 2.0**64
    true: NDArray[np.bool_] = gap < 0
    for i in np.flatnonzero(np.abs(gap) <= UNDECIDED):
        true[i] = _at_least_one(int(drawn[i]), exact(int(i)), random)
    return true


def geometric(rate: Fraction, size: int, random: Secure) -> NDArray[np.int64]:
    """*size* integers v ≥ 0 with P(v ≥ k) = exp(-k·rate); rate > 0."""
    edges = _edges(rate)
    drawn = words(size, random)
    place = np.searchsorted(edges, drawn, side="right")
    counts = (len(edges) - place).astype(np.int64)
    for i in np.flatnonzero(edges[np.maximum(place, 1) - 1] == drawn):
        counts[i] = _count(int(drawn[i]), rate, random)
    return counts


@lru_cache(maxsize=16)
def _edges(rate: Fraction) -> Words:
    """floor(2^64·exp(-k·rate)) for k = 1, 2, … down to the first 0, ascending."""
    edges = []
    with localcontext(prec=80):
        fall = (-_decimal(rate)).exp()
        power = Decimal(2) ** 64 * fall
        while (edge := int(power)) > 0:
            edges.append(edge)
            power *= fall
    return np.array([0, *reversed(edges)], np.uint64)


def _at_least_one(word: int, rate: Fraction, random: Secure) -> bool:
    return rate <= 0 or _count(word, rate, random) >= 1


def _count(word: int, rate: Fraction, random: Secure) -> int:
    """floor(-ln(u) / rate) for a uniform real u whose first 64 bits are *word*; draws as many more as it needs."""
    bits = 64
    while True:
        with localcontext(prec=bits // 3 + 60):
            size, divisor, slack = Decimal(2) ** bits, _decimal(rate), Decimal(10) ** -30
            least = max(-(Decimal(word + 1) / size).ln() / divisor - slack, Decimal(0))
            if word and math.floor(least) == math.floor(-(Decimal(word) / size).ln() / divisor + slack):
                return math.floor(least)
        word = word << 64 | int.from_bytes(random.bytes(8), "little")
        bits += 64


def _decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def fill(
    shape: int | tuple[int, ...], propose: Callable[[int], NDArray[T]], dtype: type[T], *, accepted: float = 0.5
) -> NDArray[T]:
    """An array of *shape* from the values that ``propose(how many to try)`` returns, a piece at a time.

    accepted: about which part of its tries it returns; 1 for all of them, and then no more are tried than needed.
    """
    piece = 1 << 15  # intermediates stay in cache
    result = np.empty(shape, dtype)
    flat, done = result.reshape(-1), 0
    while (missing := flat.size - done) > 0:
        tries = missing if accepted == 1 else int(missing / accepted) + 16
        found = propose(min(piece, tries))[:missing]
        flat[done : done + len(found)] = found
        done += len(found)
    return result
