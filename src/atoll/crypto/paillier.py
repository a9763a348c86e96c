"""Paillier's additively homomorphic encryption, in the variant of Damgård, Jurik & Nielsen.

Anyone with the public key (n, h_s) encrypts a cell 0 ≤ m < n as c = (1 + n)^m · h_s^r mod n², and the product of
ciphertexts decrypts to the sum of their cells modulo n. Here h = -x² mod n for a random x, h_s = h^n mod n²,
and r is of *full* length (128 bits more than n), so that h_s^r is uniform among the powers of h_s: a ciphertext says
nothing of its cell, by the decisional composite residuosity assumption; short exponents would need one more.

Primes are of the form that :mod:`atoll.crypto.primes` tells: then h generates the group that the source asks for,
except with probability 2^-60.

What protects whom: a ciphertext hides its cell from everyone but the holder of the private key, who must therefore
see sums only. Ciphertexts are malleable and say nothing of who made them: sign what carries them. Decryption's
time depends on the key: who can time the key holder's processor to the microsecond is not in the threat model.

Sources: Paillier 1999, Public-Key Cryptosystems Based on Composite Degree Residuosity Classes (EUROCRYPT), §§4, 7
(decryption by the Chinese remainder theorem); Damgård, Jurik & Nielsen 2010, A Generalization of Paillier's Public-Key
System with Applications to Electronic Voting (Int. J. Inf. Secur. 9:6). Sizes: 3,072 bits are NIST SP 800-57
part 1's for 128-bit security. All secrets come from the operating system.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import gmpy2
import numpy as np
from gmpy2 import mpz
from numpy.typing import NDArray

from atoll.contract.errors import IntegrityError, PlanError, ProtocolError
from atoll.crypto.fixed_base import FixedBase, exponent_bits_of
from atoll.crypto.primes import sound_primes, strong_prime
from atoll.crypto.threads import spread

Bytes = NDArray[np.uint8]
Random = Callable[[int], bytes]
"""A given number of secret random bytes."""

DEFAULT_BITS = 3072
MIN_BITS = 2048
MAX_BITS = 8192
"""A larger modulus from another party would only cost time."""
_SMALL_PRIMES = gmpy2.primorial(10_000)


@dataclass(frozen=True, slots=True)
class Ciphertexts:
    """Encrypted cells under one key; *size_bytes* each when they travel."""

    values: list[mpz]
    size_bytes: int

    def __len__(self) -> int:
        return len(self.values)

    def to_array(self) -> Bytes:
        """As uint8 [cells, size_bytes], each row one number, little-endian."""
        joined = b"".join(value.to_bytes(self.size_bytes, "little") for value in self.values)
        return np.frombuffer(joined, np.uint8).reshape(len(self.values), self.size_bytes)

    @staticmethod
    def from_array(public: PublicKey, array: Bytes) -> Ciphertexts:
        """What another party sent, checked: uint8 [cells, ciphertext_bytes], each number below n² and coprime to n.

        Raises ProtocolError otherwise.
        """
        if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != public.ciphertext_bytes:
            raise _malformed("are not an array of bytes, one ciphertext a row")
        values = [mpz.from_bytes(row.tobytes(), "little") for row in array]
        if any(value >= public.n_squared for value in values):
            raise _malformed("are not below n²")
        if not _all_coprime(values, public.n):
            raise _malformed("are not coprime to n")
        return Ciphertexts(values, public.ciphertext_bytes)


class PublicKey:
    """What sites encrypt under: the modulus *n* and *hs* = h^n mod n². Made once, it keeps its tables.

    Raises ProtocolError for numbers that cannot be a key of :meth:`PrivateKey.generate`. That n has just two prime
    factors, and *hs* is an n-th power, cannot be seen from outside; a key holder who breaks these gains nothing, for
    it decrypts anyway.
    """

    def __init__(self, n: int, hs: int) -> None:
        self.n, self.hs = mpz(n), mpz(hs)
        self.n_squared = self.n**2
        self.bits = self.n.bit_length()
        sound = (
            self.n > 1
            and self.n % 4 == 1
            and gmpy2.gcd(self.n, _SMALL_PRIMES) == 1
            and not gmpy2.is_prime(self.n)
            and not gmpy2.is_power(self.n)
            and 1 < self.hs < self.n_squared - 1
            and gmpy2.jacobi(self.hs, self.n) == 1  # as -x² has, and then hs is coprime to n as well
        )
        if not sound:
            raise _no_key("a public key's numbers are not of the form that a key has")
        self.ciphertext_bytes = 2 * -(-self.bits // 8)
        self._exponent_bytes = -(-exponent_bits_of(self.bits) // 8)
        self._powers = FixedBase(self.hs, self.n_squared, self._exponent_bytes)

    def encrypt(self, cells: Sequence[int], random: Random = os.urandom) -> Ciphertexts:
        """Encrypt *cells*, each in [0, n); the more at a time, the faster. Raises ProtocolError for others."""
        return _encrypted(self, cells, self._powers.powers(exponents(len(cells), self._exponent_bytes, random)))

    def prepare(self, num_cells: int) -> None:
        """Make now the table that pays for *num_cells*, so that the first batch does not wait for it."""
        self._powers.prepare(num_cells)

    def add(self, first: Ciphertexts, *more: Ciphertexts) -> Ciphertexts:
        """Ciphertexts of the cells' sums modulo n. Raises ProtocolError when numbers of cells differ."""
        batches = [first, *more]
        if any(len(batch) != len(first) or batch.size_bytes != self.ciphertext_bytes for batch in batches):
            raise _malformed("to add are of different keys or numbers")

        def products(start: int, stop: int) -> list[mpz]:
            return [_product(column, self.n_squared) for column in _columns(batches, start, stop)]

        return Ciphertexts(spread(products, len(first)), self.ciphertext_bytes)

    def to_bytes(self) -> bytes:
        """n, then hs in twice its width, little-endian."""
        size = -(-self.bits // 8)
        return b"".join((self.n.to_bytes(size, "little"), self.hs.to_bytes(2 * size, "little")))

    @staticmethod
    def from_bytes(data: bytes) -> PublicKey:
        """A key that another party sent; raises ProtocolError unless it is a sound one of 2,048 … 8,192 bits,
        a multiple of 16."""
        size = len(data) // 3
        if len(data) % 6 or not MIN_BITS <= 8 * size <= MAX_BITS:
            raise _no_key(f"a public key is not of {MIN_BITS} to {MAX_BITS} bits")
        n = mpz.from_bytes(data[:size], "little")
        if n.bit_length() != 8 * size:
            raise _no_key("a public key's modulus is shorter than its field")
        return PublicKey(n, mpz.from_bytes(data[size:], "little"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and (self.n, self.hs) == (other.n, other.hs)

    def __hash__(self) -> int:
        return hash((self.n, self.hs))

    def __repr__(self) -> str:
        return f"PublicKey({self.bits} bits)"


class PrivateKey:
    """The key holder's: primes *p* and *q*, and the *hs* of its public key. Never printed.

    Raises IntegrityError for numbers that are not a key.
    """

    def __init__(self, p: int, q: int, hs: int) -> None:
        self._p, self._q = mpz(p), mpz(q)
        if not sound_primes(self._p, self._q):
            raise IntegrityError("paillier.private-key", "a private key's primes are not a key's", field="private_key")
        self.public = PublicKey(self._p * self._q, hs)
        self._sides = [_Side(self._p, self._q, self.public.hs), _Side(self._q, self._p, self.public.hs)]
        self._p_inverse = gmpy2.invert(self._p, self._q)
        self._p2_inverse = gmpy2.invert(self._p**2, self._q**2)
        if self.decrypt(Ciphertexts([self.public.hs], self.public.ciphertext_bytes)) != [0]:
            raise IntegrityError("paillier.private-key", "a private key's hs is not an n-th power", field="private_key")

    @staticmethod
    def generate(bits: int = DEFAULT_BITS) -> PrivateKey:
        """A fresh key, about a second for 3,072 bits. Raises PlanError for fewer than 2,048 bits, more than 8,192,
        or not a multiple of 16."""
        if not MIN_BITS <= bits <= MAX_BITS or bits % 16:
            raise PlanError(
                "paillier.key-size", f"a Paillier key of {bits} bits", field="bits",
                remedy=f"choose a multiple of 16 from {MIN_BITS} to {MAX_BITS}; {DEFAULT_BITS} is the default",
            )  # fmt: skip
        while True:
            p, q = strong_prime(bits // 2), strong_prime(bits // 2)
            if sound_primes(p, q) and abs(p - q).bit_length() > bits // 2 - 100:  # FIPS 186-5, A.1.1
                return PrivateKey.from_primes(int(p), int(q))

    @staticmethod
    def from_primes(p: int, q: int) -> PrivateKey:
        """A key with a fresh h, whatever its size: for tests; everyone else wants :meth:`generate`."""
        n = mpz(p) * q
        while True:
            x = mpz(secrets.randbelow(int(n)))
            if gmpy2.gcd(x, n) == 1:
                return PrivateKey(p, q, int(gmpy2.powmod(-(x**2) % n, n, n**2)))

    def decrypt(self, ciphertexts: Ciphertexts) -> list[int]:
        """The cells, each in [0, n)."""
        p_side, q_side = self._sides

        def cells(start: int, stop: int) -> list[int]:
            values = ciphertexts.values[start:stop]
            pairs = zip(p_side.decrypt(values), q_side.decrypt(values), strict=True)
            return [int(a + (b - a) * self._p_inverse % self._q * self._p) for a, b in pairs]

        return spread(cells, len(ciphertexts))

    def encrypt(self, cells: Sequence[int], random: Random = os.urandom) -> Ciphertexts:
        """As the public key's, in about a third of the time: powers are taken modulo p² and q²."""
        drawn = exponents(len(cells), self.public._exponent_bytes, random)
        numbers = [mpz.from_bytes(row.tobytes(), "little") for row in drawn]
        (of_p, p2), (of_q, q2) = ((side.powers(numbers), side.modulus) for side in self._sides)
        noise = [a + (b - a) * self._p2_inverse % q2 * p2 for a, b in zip(of_p, of_q, strict=True)]
        return _encrypted(self.public, cells, noise)

    def to_bytes(self) -> bytes:
        """p and q in half the key's width each, then hs in twice it, little-endian. Secret: for a file of its
        owner's, mode 0600."""
        size = -(-self.public.bits // 16)
        sized = ((self._p, size), (self._q, size), (self.public.hs, 4 * size))
        return b"".join(number.to_bytes(width, "little") for number, width in sized)

    @staticmethod
    def from_bytes(data: bytes) -> PrivateKey:
        """What :meth:`to_bytes` wrote; raises IntegrityError when it is not a key of 2,048 … 8,192 bits."""
        size = len(data) // 6
        numbers = [mpz.from_bytes(data[i:j], "little") for i, j in ((0, size), (size, 2 * size), (2 * size, 6 * size))]
        if (
            len(data) % 6
            or not MIN_BITS <= 16 * size <= MAX_BITS
            or (numbers[0] * numbers[1]).bit_length() != 16 * size
        ):
            raise IntegrityError(
                "paillier.private-key", "a private key is not of its size", field="private_key",
                remedy="make a new key: it serves one run only",
            )  # fmt: skip
        return PrivateKey(*map(int, numbers))

    def __reduce__(self) -> str:
        raise TypeError("a private key is not pickled")

    def __repr__(self) -> str:
        return f"PrivateKey({self.public.bits} bits)"


class _Side:
    """The key holder's work modulo the square of one prime."""

    def __init__(self, prime: mpz, other: mpz, hs: mpz) -> None:
        self.modulus = prime**2
        self._prime = prime
        self._size = -(-prime.bit_length() // 8)
        self._powers = FixedBase(hs % self.modulus, self.modulus, self._size)
        self._inverse = gmpy2.invert(-other, prime)  # of L((1 + n)^(prime - 1) mod prime²)

    def decrypt(self, values: list[mpz]) -> list[mpz]:
        """Cells modulo the prime (Paillier 1999, §7)."""
        listed = [value % self.modulus for value in values]
        powers = gmpy2.powmod_base_list(listed, self._prime - 1, self.modulus)
        return [(power - 1) // self._prime * self._inverse % self._prime for power in powers]

    def powers(self, numbers: list[mpz]) -> list[mpz]:
        """hs to *numbers*, modulo the square: hs is an n-th power, so that its order divides prime - 1."""
        reduced = [(number % (self._prime - 1)).to_bytes(self._size, "little") for number in numbers]
        return self._powers.powers(np.frombuffer(b"".join(reduced), np.uint8).reshape(len(numbers), self._size))


def exponents(count: int, size_bytes: int, random: Random) -> Bytes:
    """Secret exponents [count, size_bytes]."""
    return np.frombuffer(random(count * size_bytes), np.uint8).reshape(count, size_bytes)


def _encrypted(public: PublicKey, cells: Sequence[int], noise: list[mpz]) -> Ciphertexts:
    if not all(0 <= cell < public.n for cell in cells):
        raise ProtocolError("paillier.cell", "a cell to encrypt is not within 0 … n - 1", field="cells")
    pairs = zip(cells, noise, strict=True)
    values = [(1 + cell * public.n) * factor % public.n_squared for cell, factor in pairs]
    return Ciphertexts(values, public.ciphertext_bytes)


def _columns(batches: list[Ciphertexts], start: int, stop: int) -> Iterable[tuple[mpz, ...]]:
    return zip(*(batch.values[start:stop] for batch in batches), strict=True)


def _product(values: Iterable[mpz], modulus: mpz) -> mpz:
    product = mpz(1)
    for value in values:
        product = product * value % modulus
    return product


def _all_coprime(values: list[mpz], n: mpz) -> bool:
    """One greatest common divisor for all: of their product."""
    return bool(gmpy2.gcd(_product((value % n for value in values), n), n) == 1)


def _malformed(what: str) -> ProtocolError:
    return ProtocolError(
        "paillier.ciphertexts", f"ciphertexts {what}", field="ciphertexts",
        remedy="use the same Atoll version and key at every site; do not go on with a party that alters them",
    )  # fmt: skip


def _no_key(why: str) -> ProtocolError:
    return ProtocolError(
        "paillier.public-key", why, field="public_key", remedy="the key holder's site must make a new key"
    )
