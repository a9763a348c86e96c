"""Secret sharing against a slow, independent GF(256), and what too few shares tell: nothing."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import ProtocolError
from atoll.crypto import shamir
from atoll.crypto.shamir import combine, split


def times(a: int, b: int) -> int:
    """FIPS 197 §4.2, bit by bit: no tables."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a = (a << 1) ^ (0x11B if a & 0x80 else 0)
        b >>= 1
    return product


def power(a: int, n: int) -> int:
    result = 1
    for _ in range(n):
        result = times(result, a)
    return result


def inverse(a: int) -> int:
    return power(a, 254)


def interpolate(points: dict[int, int], at: int = 0) -> int:
    """Lagrange, as in a textbook, at any place."""
    total = 0
    for x, y in points.items():
        term = y
        for other in points:
            if other != x:
                term = times(term, times(at ^ other, inverse(x ^ other)))
        total ^= term
    return total


def test_fips_197_examples() -> None:
    """§4.2: {57}·{83} = {c1}, {57}·{13} = {fe}; by the slow multiplication and by the tables."""
    for a, b, wanted in ((0x57, 0x83, 0xC1), (0x57, 0x13, 0xFE), (0x57, 0x02, 0xAE), (0x57, 0x10, 0x07)):
        assert times(a, b) == wanted == int(shamir._times(_byte(a), _byte(b))[0])


def _byte(value: int) -> shamir.Bytes:
    return shamir.np.array([value], shamir.np.uint8)


def test_the_whole_multiplication_table() -> None:
    every = shamir.np.arange(256, dtype=shamir.np.uint8)
    table = shamir._times(every[:, None], every[None, :])
    for a in range(256):
        for b in range(a, 256):
            assert int(table[a, b]) == int(table[b, a]) == times(a, b)


@st.composite
def sharings(draw: st.DrawFn) -> tuple[bytes, int, list[int], list[int]]:
    holders = draw(st.lists(st.integers(1, 255), min_size=1, max_size=30, unique=True))
    threshold = draw(st.integers(1, len(holders)))
    chosen = draw(st.permutations(holders))[: draw(st.integers(threshold, len(holders)))]
    return draw(st.binary(min_size=1, max_size=64)), threshold, holders, chosen


@given(sharings())
def test_any_threshold_of_shares_gives_the_secret(case: tuple[bytes, int, list[int], list[int]]) -> None:
    secret, threshold, holders, chosen = case
    shares = split(secret, threshold, holders)
    assert list(shares) == holders and {len(share) for share in shares.values()} == {len(secret)}
    assert combine({holder: shares[holder] for holder in chosen}) == secret


@settings(max_examples=30)
@given(st.binary(min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 3))
def test_the_slow_field_agrees(secret: bytes, threshold: int, more: int) -> None:
    shares = split(secret, threshold, range(1, threshold + more + 1))
    for chosen in itertools.combinations(shares, threshold):
        slow = bytes(interpolate({x: shares[x][i] for x in chosen}) for i in range(len(secret)))
        assert slow == secret == combine({x: shares[x] for x in chosen})
    first = dict(itertools.islice(shares.items(), threshold))
    for x, share in shares.items():  # all shares lie on the polynomial of the first
        assert share == bytes(interpolate({k: v[i] for k, v in first.items()}, x) for i in range(len(secret)))


@settings(max_examples=40)
@given(st.binary(min_size=1, max_size=3), st.binary(min_size=3, max_size=3), st.integers(2, 6))
def test_one_share_less_allows_every_secret(secret: bytes, other: bytes, threshold: int) -> None:
    """Whatever t − 1 shares are, for *any* other secret there is a last share that makes it: they determine nothing."""
    shares = split(secret, threshold, range(1, threshold + 1))
    known = dict(itertools.islice(shares.items(), threshold - 1))
    wished = other[: len(secret)]
    last = bytes(
        interpolate({0: wished[i], **{x: s[i] for x, s in known.items()}}, threshold) for i in range(len(wished))
    )
    assert combine({**known, threshold: last}) == wished


def test_single_shares_are_uniform() -> None:
    """Of one secret, 20,000 sharings: each value of a share's byte comes as often as the others (χ², 255 degrees)."""
    wide = split(bytes(20_000), 2, [1, 2])[1]  # every byte has a polynomial of its own
    counts = [wide.count(value) for value in range(256)]
    expected = len(wide) / 256
    assert sum((n - expected) ** 2 / expected for n in counts) < 400  # p < 1e-7


def test_too_few_shares_give_another_string() -> None:
    secret = os.urandom(32)
    shares = split(secret, 4, range(1, 8))
    for chosen in itertools.combinations(shares, 3):
        assert combine({x: shares[x] for x in chosen}) != secret


def test_one_altered_share_gives_another_string() -> None:
    secret = os.urandom(32)
    shares = split(secret, 3, range(1, 6))
    shares[2] = bytes([shares[2][0] ^ 1]) + shares[2][1:]
    assert combine({x: shares[x] for x in (1, 2, 3)}) != secret
    assert combine({x: shares[x] for x in (1, 3, 5)}) == secret


def test_all_255_holders() -> None:
    secret = os.urandom(64)
    shares = split(secret, 170, range(1, 256))
    assert combine({x: shares[x] for x in range(86, 256)}) == secret


@pytest.mark.parametrize(
    ("threshold", "holders", "code"),
    [
        (0, [1, 2], "shamir.threshold"), (-1, [1, 2], "shamir.threshold"), (3, [1, 2], "shamir.threshold"),
        (1, [], "shamir.threshold"), (2, [1, 1], "shamir.threshold"), (2, range(1, 257), "shamir.threshold"),
        (2, [0, 1], "shamir.holder"), (2, [1, 256], "shamir.holder"), (1, [-1], "shamir.holder"),
    ],
)  # fmt: skip
def test_what_is_refused(threshold: int, holders: list[int], code: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        split(b"secret", threshold, holders)
    assert caught.value.code == code and "secret" not in str(caught.value)


@pytest.mark.parametrize("shares", [{}, {1: b"ab", 2: b"a"}])
def test_shares_that_are_not_of_one_secret(shares: dict[int, bytes]) -> None:
    with pytest.raises(ProtocolError) as caught:
        combine(shares)
    assert caught.value.code == "shamir.shares"
