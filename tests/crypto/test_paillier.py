"""Paillier beside a textbook one written here, its algebra, and what other parties may send."""

from __future__ import annotations

import math
import pickle
import secrets
from functools import cache

import gmpy2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import IntegrityError, PlanError, ProtocolError
from atoll.crypto.fixed_base import FixedBase, digits
from atoll.crypto.paillier import Ciphertexts, PrivateKey, PublicKey
from atoll.crypto.prg import Stream
from atoll.crypto.primes import sound_primes, strong_prime


@cache
def primes(bits: int = 512) -> tuple[int, int]:
    while True:
        p, q = strong_prime(bits // 2), strong_prime(bits // 2)
        if sound_primes(p, q):
            return int(p), int(q)


@cache
def small() -> PrivateKey:
    return PrivateKey.from_primes(*primes())


@cache
def real() -> PrivateKey:
    return PrivateKey.generate(2048)


class Textbook:
    """Paillier 1999, §4, with g = 1 + n, random r, Carmichael's λ, and Python's integers."""

    def __init__(self, p: int, q: int) -> None:
        self.n, self.square = p * q, (p * q) ** 2
        self.order = math.lcm(p - 1, q - 1)
        self.inverse = pow(self._l(pow(1 + self.n, self.order, self.square)), -1, self.n)

    def _l(self, x: int) -> int:
        assert x % self.n == 1
        return (x - 1) // self.n

    def encrypt(self, cell: int) -> int:
        r = secrets.randbelow(self.n - 1) + 1
        return pow(1 + self.n, cell, self.square) * pow(r, self.n, self.square) % self.square

    def decrypt(self, c: int) -> int:
        return self._l(pow(c, self.order, self.square)) * self.inverse % self.n


cells = st.lists(st.integers(0, 2**600).map(lambda m: m % int(small().public.n)), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(cells)
def test_textbook_decrypts_ours_and_we_the_textbooks(values: list[int]) -> None:
    book, key = Textbook(*primes()), small()
    for made in (key.public.encrypt(values), key.encrypt(values)):
        assert [book.decrypt(int(c)) for c in made.values] == values
    theirs = Ciphertexts([gmpy2.mpz(book.encrypt(m)) for m in values], key.public.ciphertext_bytes)
    assert key.decrypt(theirs) == values


@settings(max_examples=50, deadline=None)
@given(cells, st.integers(1, 5))
def test_sums_of_ciphertexts_are_sums_of_cells(values: list[int], sites: int) -> None:
    key, n = small(), int(small().public.n)
    vectors = [[(m * (site + 1) + site) % n for m in values] for site in range(sites)]
    total = key.public.add(*(key.public.encrypt(vector) for vector in vectors))
    wanted = [sum(column) % n for column in zip(*vectors, strict=True)]
    assert key.decrypt(total) == wanted


def test_extreme_cells_of_a_key_of_real_size() -> None:
    key, n = real(), int(real().public.n)
    values = [0, 1, n // 2, n - 1]
    sent = key.public.encrypt(values).to_array()
    public = PublicKey.from_bytes(key.public.to_bytes())
    assert public == key.public and hash(public) == hash(key.public)
    read = Ciphertexts.from_array(public, sent)
    assert PrivateKey.from_bytes(key.to_bytes()).decrypt(read) == values
    assert key.decrypt(key.encrypt(values)) == values


def test_many_cells_use_a_table_and_none_are_none() -> None:
    key = PrivateKey.from_primes(*primes())
    values = list(range(300))
    assert key.decrypt(key.public.encrypt(values)) == values  # wide table
    assert key.decrypt(key.encrypt(values)) == values
    key.public.prepare(10**6)
    assert key.decrypt(key.public.encrypt(values[:7])) == values[:7]
    empty = key.public.encrypt([])
    assert key.decrypt(Ciphertexts.from_array(key.public, empty.to_array())) == []


def test_noise_has_full_length_and_is_the_powers_of_hs() -> None:
    key, asked = small(), list[int]()

    def given_bytes(size: int) -> bytes:
        asked.append(size)
        return b"\xfe" * size

    made = key.public.encrypt([5], given_bytes)
    assert asked == [(512 + 128) // 8]
    n, exponent = int(key.public.n), int.from_bytes(b"\xfe" * asked[0], "little")
    assert int(made.values[0]) == (1 + 5 * n) * pow(int(key.public.hs), exponent, n * n) % (n * n)
    assert key.encrypt([5], given_bytes).values == made.values


def test_same_cell_is_never_encrypted_alike() -> None:
    made = small().public.encrypt([7] * 200).values
    assert len(set(made)) == 200


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.binary(min_size=9, max_size=9), st.binary(min_size=9, max_size=9))
def test_digits_of_a_window_give_the_number_back(window: int, one: bytes, other: bytes) -> None:
    rows = digits(np.frombuffer(one + other, np.uint8).reshape(2, 9), window)
    for row, number in zip(rows, (one, other), strict=True):
        assert sum(int(d) << (window * i) for i, d in enumerate(row)) == int.from_bytes(number, "little")


@pytest.mark.parametrize("count", [1, 3, 40, 400])
def test_powers_by_table_are_powers(count: int) -> None:
    modulus = int(small().public.n)
    exponents = np.frombuffer(Stream(bytes(32)).bytes(20 * count), np.uint8).reshape(count, 20)
    found = FixedBase(gmpy2.mpz(3), gmpy2.mpz(modulus), 20).powers(exponents)
    assert [int(x) for x in found] == [pow(3, int.from_bytes(row.tobytes(), "little"), modulus) for row in exponents]


def test_tables_keep_within_their_memory() -> None:
    base = FixedBase(gmpy2.mpz(3), gmpy2.mpz(2**6144 - 1), 400)
    assert base.table_bytes(8) == 400 * 256 * 768
    tight = FixedBase(gmpy2.mpz(3), small().public.n, 20, max_table_bytes=50_000)
    tight.prepare(10**6)
    assert 0 < tight.table_bytes(tight.window) <= 50_000


def refused(public: PublicKey, array: np.ndarray) -> str:
    with pytest.raises(ProtocolError) as caught:
        Ciphertexts.from_array(public, array)
    assert caught.value.code == "paillier.ciphertexts" and caught.value.remedy
    return caught.value.message


def test_malformed_ciphertexts_are_refused() -> None:
    public, good = small().public, small().public.encrypt([1, 2]).to_array()
    for array in (good[:, :-1], good.reshape(-1), good.astype(np.uint16), np.hstack([good, good])):
        refused(public, array)

    def row(number: int) -> np.ndarray:
        raw = np.frombuffer(int(number).to_bytes(public.ciphertext_bytes, "little"), np.uint8)
        return np.vstack([good[0], raw])

    p, n = primes()[0], int(public.n)
    for number in (n * n, n * n + 1, 256**public.ciphertext_bytes - 1):
        assert "below" in refused(public, row(number))
    for number in (0, n, 5 * p, n * (n - 1)):
        assert "coprime" in refused(public, row(number))
    assert len(Ciphertexts.from_array(public, row(1))) == 2


def test_adding_different_numbers_or_keys_is_refused() -> None:
    public, other = small().public, real().public
    one, two = public.encrypt([1]), public.encrypt([1, 2])
    for ciphertexts in ((one, two), (one, other.encrypt([1]))):
        with pytest.raises(ProtocolError, match="different"):
            public.add(*ciphertexts)


@pytest.mark.parametrize("cell", [-1, "n", "more"])
def test_cells_that_are_not_below_n_are_refused_and_not_told(cell: int | str) -> None:
    n = int(small().public.n)
    number = {"n": n, "more": n + 5}.get(str(cell), -1)
    for key in (small(), small().public):
        with pytest.raises(ProtocolError) as caught:
            key.encrypt([3, number])
        assert caught.value.code == "paillier.cell" and str(number) not in str(caught.value)


@pytest.mark.parametrize("bits", [512, 1024, 2032, 2047, 2056, 8208])
def test_the_generator_refuses_short_odd_and_huge_keys(bits: int) -> None:
    with pytest.raises(PlanError) as caught:
        PrivateKey.generate(bits)
    assert caught.value.code == "paillier.key-size" and "3072" in caught.value.remedy


def test_generated_keys_are_of_their_size_and_form() -> None:
    key = real()
    assert key.public.bits == 2048
    p, q = key._p, key._q
    assert sound_primes(p, q) and p * q == key.public.n
    assert gmpy2.powmod(key.public.hs, (p - 1) * (q - 1) // 2, key.public.n_squared) == 1
    assert key.public != PrivateKey.from_primes(*primes()).public


def test_short_public_keys_are_refused_on_load() -> None:
    for data in (b"", small().public.to_bytes(), real().public.to_bytes()[:-1], real().public.to_bytes() + b"\0\0\0"):
        with pytest.raises(ProtocolError) as caught:
            PublicKey.from_bytes(data)
        assert caught.value.code == "paillier.public-key"
    with pytest.raises(ProtocolError):
        PublicKey.from_bytes(bytes(1 << 20))


def test_unsound_public_keys_are_refused() -> None:
    p, q = primes()
    n, hs = p * q, int(small().public.hs)
    prime_of_1_mod_4 = next(int(x) for x in iter(lambda: gmpy2.next_prime(secrets.randbits(512)), 0) if x % 4 == 1)
    unsound = [
        (n + 1, hs), (n * 3, hs), (prime_of_1_mod_4, hs), (p * p, hs), (p * p * q, hs), (-n, hs), (0, hs), (1, hs),
        (n, 0), (n, 1), (n, n * n - 1), (n, n * n + hs), (n, p), (n, n), (n, -hs),
    ]  # fmt: skip
    not_square = next(x for x in range(2, 100) if gmpy2.jacobi(x, n) == -1)
    for numbers in [*unsound, (n, not_square)]:
        with pytest.raises(ProtocolError) as caught:
            PublicKey(*numbers)
        assert caught.value.code == "paillier.public-key"


def test_altered_private_keys_are_refused() -> None:
    data = real().to_bytes()
    size = len(data) // 6
    altered = [data[:-1], data[6:], b"", data[:size] * 2 + data[2 * size :], bytes(len(data)), data + b"\0" * 6]
    altered.append(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])  # of hs
    altered.append(bytes([data[0] ^ 2]) + data[1:])  # of p
    for wrong in altered:
        with pytest.raises((IntegrityError, ProtocolError)) as caught:
            PrivateKey.from_bytes(wrong)
        assert caught.value.code in ("paillier.private-key", "paillier.public-key")
    p, q = primes()
    n = p * q
    hs = int(small().public.hs) * (1 + n) % n**2  # in form a public key's, but it encrypts 1
    assert PublicKey(n, hs)
    with pytest.raises(IntegrityError, match="n-th power"):
        PrivateKey(p, q, hs)


def test_private_keys_are_neither_printed_nor_pickled() -> None:
    key = small()
    assert repr(key) == "PrivateKey(512 bits)" and str(key) == repr(key)
    assert repr(key.public) == "PublicKey(512 bits)"
    with pytest.raises(TypeError):
        pickle.dumps(key)
