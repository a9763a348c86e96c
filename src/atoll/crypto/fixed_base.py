"""Powers of one base, by a table of its powers: Σ digits mean one product each, and no squaring.

An exponent is written in digits of *window* bits; row i of the table holds base^(d·2^(window·i)) for every digit d.
A wider window means fewer products and a larger table: at 6,144 bits and exponents of 3,200 bits, 400 products
and 78 MB for 8 bits, 800 and 10 MB for 4. Source: Brickell, Gordon, McCurley & Wilson 1992, Fast Exponentiation
with Precomputation (EUROCRYPT). Tables are looked up by secret digits: who measures caches on the same machine
is not in the threat model.
"""

from __future__ import annotations

import threading

import gmpy2
import numpy as np
from gmpy2 import mpz
from numpy.typing import NDArray

from atoll.crypto.threads import spread

Bytes = NDArray[np.uint8]
MAX_WINDOW = 8
MAX_TABLE_BYTES = 128 << 20
PLAIN_PRODUCTS = 0.66
"""What a bit of exponent costs without a table, in products (GMP's sliding window, measured at 6,144 bits)."""


def exponent_bits_of(modulus_bits: int) -> int:
    """Bits of an exponent of full length: 128 more than the modulus has, so that its power is uniform in the
    group that the base generates, to within 2^-128."""
    return modulus_bits + 128


class FixedBase:
    """Powers of *base* modulo *modulus* for exponents of *exponent_bytes*; tables are made when they pay."""

    def __init__(self, base: mpz, modulus: mpz, exponent_bytes: int, max_table_bytes: int = MAX_TABLE_BYTES) -> None:
        self._base, self._modulus, self._exponent_bytes = base, modulus, exponent_bytes
        self._max_table_bytes = max_table_bytes
        self._prepared: tuple[int, list[list[mpz]]] = (0, [])
        self._lock = threading.Lock()

    def powers(self, exponents: Bytes) -> list[mpz]:
        """base^e for each row of *exponents* [count, exponent_bytes], little-endian."""
        self.prepare(len(exponents))
        window, table = self._prepared

        def plain(start: int, stop: int) -> list[mpz]:
            numbers = [mpz.from_bytes(row.tobytes(), "little") for row in exponents[start:stop]]
            return list(gmpy2.powmod_exp_list(self._base, numbers, self._modulus))

        def by_table(start: int, stop: int) -> list[mpz]:
            return [self._power(table, row.tobytes()) for row in digits(exponents[start:stop], window)]

        return spread(by_table if window else plain, len(exponents))

    def prepare(self, count: int) -> None:
        """Make the table with which *count* powers, and the table itself, cost least."""
        with self._lock:
            best = min(self._windows(), key=lambda window: self._products(window, count))
            if best > self.window:
                self._prepared = best, self._made(best)

    @property
    def window(self) -> int:
        """Bits of a digit of the present table; 0 where there is none."""
        return self._prepared[0]

    def table_bytes(self, window: int) -> int:
        """Size of a table's numbers."""
        size: int = (self._rows(window) << window) * (self._modulus.bit_length() // 8)
        return size

    def _windows(self) -> list[int]:
        wider = [w for w in range(2, MAX_WINDOW + 1) if self.table_bytes(w) <= self._max_table_bytes]
        return [self.window, *(w for w in wider if w > self.window)]

    def _rows(self, window: int) -> int:
        return -(-8 * self._exponent_bytes // window)

    def _products(self, window: int, count: int) -> float:
        if window == 0:
            return PLAIN_PRODUCTS * 8 * self._exponent_bytes * count
        return self._rows(window) * (count + (1 << window if window != self.window else 0))

    def _made(self, window: int) -> list[list[mpz]]:
        heads = [self._base]
        for _ in range(self._rows(window) - 1):
            heads.append(gmpy2.powmod(heads[-1], 1 << window, self._modulus))

        def rows(start: int, stop: int) -> list[list[mpz]]:
            made = []
            for head in heads[start:stop]:
                row = [mpz(1)]
                for _ in range((1 << window) - 1):
                    row.append(row[-1] * head % self._modulus)
                made.append(row)
            return made

        return spread(rows, len(heads))

    def _power(self, table: list[list[mpz]], number: bytes) -> mpz:
        power, modulus = mpz(1), self._modulus
        for row, digit in zip(table, number, strict=True):
            power = power * row[digit] % modulus
        return power


def digits(numbers: Bytes, window: int) -> Bytes:
    """Digits of *window* (1 … 8) bits of little-endian *numbers* [count, size], least significant first."""
    count, size = numbers.shape
    if window == 8:
        return numbers
    bits = np.unpackbits(numbers, axis=1, bitorder="little")
    bits = np.pad(bits, ((0, 0), (0, -8 * size % window)))
    return np.packbits(bits.reshape(count, -1, window), axis=2, bitorder="little")[:, :, 0]
