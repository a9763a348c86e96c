"""Primes of Paillier keys, from the operating system's randomness.

p = 2·f·p' + 1 with f a random prime of 64 bits and p' one of the remaining bits. The group of squares modulo p then
has order f·p', and a random square generates it except with probability 2^-62; no p - 1 is smooth (Pollard's method).
Safe primes (f = 1) would do the same and take minutes to find.
"""

from __future__ import annotations

import secrets

import gmpy2
from gmpy2 import mpz

COFACTOR_BITS = 64


def strong_prime(bits: int) -> mpz:
    """A prime of exactly *bits*, its two top bits set, so that a product of two has twice as many."""
    inner = _random_prime(bits - 1 - COFACTOR_BITS)
    while True:
        prime = 2 * _random_prime(COFACTOR_BITS) * inner + 1
        if prime.is_prime():
            return prime


def sound_primes(p: mpz, q: mpz) -> bool:
    """Are these primes of one size, both 3 modulo 4, with no common factor of p - 1 and q - 1 but 2?"""
    return bool(
        p > 3
        and q > 3
        and p.bit_length() == q.bit_length()
        and p % 4 == q % 4 == 3
        and p.is_prime()
        and q.is_prime()
        and gmpy2.gcd(p - 1, q - 1) == 2
    )


def _random_prime(bits: int) -> mpz:
    while True:  # the three top bits are set: 2 · (7/8)² > 3/2
        candidate = mpz(secrets.randbits(bits) | 7 << (bits - 3) | 1)
        if candidate.is_prime():
            return candidate
