"""Packed slots and masks: what goes in comes out, sums included, and nothing runs over."""

from __future__ import annotations

import secrets
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import PlanError, ProtocolError
from atoll.crypto.packing import Packing, add_mod, masks
from atoll.crypto.paillier import Ciphertexts, PrivateKey
from atoll.crypto.prg import Stream, derive
from atoll.crypto.primes import sound_primes, strong_prime


@cache
def key() -> PrivateKey:
    while True:
        p, q = strong_prime(256), strong_prime(256)
        if sound_primes(p, q):
            return PrivateKey.from_primes(int(p), int(q))


def words(numbers: list[int], slot_bits: int) -> np.ndarray:
    """[k] uint64, or [k, 2] for slots of more than 64 bits."""
    if slot_bits <= 64:
        return np.array(numbers, np.uint64)
    return np.array([[x % 2**64, x >> 64] for x in numbers], np.uint64).reshape(-1, 2)


@st.composite
def packings(draw: st.DrawFn, addends: int = 1) -> tuple[Packing, list[int]]:
    slot_bits = draw(st.integers(max(1, addends.bit_length()), 128))
    packing = Packing(draw(st.integers(slot_bits + 1, 600)), slot_bits, addends)
    top = packing.top // addends
    numbers = st.one_of(st.integers(0, top), st.sampled_from([0, top]))
    return packing, draw(st.lists(numbers, max_size=40))


@settings(max_examples=300, deadline=None)
@given(packings())
def test_a_round_trip_and_the_layout_it_claims(drawn: tuple[Packing, list[int]]) -> None:
    packing, numbers = drawn
    values = words(numbers, packing.slot_bits)
    cells = packing.pack(values)
    slots = packing.slots_per_cell
    listed = [numbers[i : i + slots] for i in range(0, len(numbers), slots)]
    assert cells == [sum(x << (packing.slot_bits * i) for i, x in enumerate(part)) for part in listed]
    assert all(cell < 2 ** (packing.modulus_bits - 1) for cell in cells)
    back = packing.unpack(cells, len(numbers))
    assert back.dtype == np.uint64 and np.array_equal(back, values)


@settings(max_examples=150, deadline=None)
@given(packings(addends=5), st.integers(1, 5))
def test_sums_of_as_many_as_declared_never_carry(drawn: tuple[Packing, list[int]], sites: int) -> None:
    packing, numbers = drawn
    packed = packing.pack(words(numbers, packing.slot_bits))
    sums = packing.unpack([cell * sites for cell in packed], len(numbers))
    assert np.array_equal(sums, words([x * sites for x in numbers], packing.slot_bits))


def test_every_slot_full_for_the_most_addends() -> None:
    for slot_bits in (2, 31, 34, 63, 64, 65, 100, 127, 128):
        packing = Packing(3072, slot_bits, 3)
        numbers = [packing.top // 3] * (packing.slots_per_cell + 1)
        (full, last) = packing.pack(words(numbers, slot_bits))
        assert np.array_equal(
            packing.unpack([3 * full, 3 * last], len(numbers)), words([3 * x for x in numbers], slot_bits)
        )


@pytest.mark.parametrize("slot_bits", [8, 34, 64, 65, 128])
def test_numbers_that_could_carry_are_refused_and_not_told(slot_bits: int) -> None:
    packing = Packing(512, slot_bits, 3)
    number = packing.top // 3 + 1
    packing.pack(words([number - 1], slot_bits))
    with pytest.raises(ProtocolError) as caught:
        packing.pack(words([0, number], slot_bits))
    assert caught.value.code == "packing.value" and str(number) not in str(caught.value)


def test_two_words_in_a_narrow_slot_and_one_in_a_wide_one() -> None:
    two = np.array([[5, 0], [7, 0]], np.uint64)
    assert Packing(512, 40).pack(two) == Packing(512, 40).pack(two[:, 0].copy())
    with pytest.raises(ProtocolError):
        Packing(512, 40).pack(np.array([[5, 1]], np.uint64))
    assert Packing(512, 100).pack(two[:, 0].copy()) == Packing(512, 100).pack(two)


@pytest.mark.parametrize(
    ("modulus_bits", "slot_bits", "addends"), [(64, 64, 1), (512, 0, 1), (512, 129, 1), (512, 2, 4), (512, 8, 0)]
)
def test_slots_that_do_not_fit_are_refused(modulus_bits: int, slot_bits: int, addends: int) -> None:
    with pytest.raises(PlanError) as caught:
        Packing(modulus_bits, slot_bits, addends)
    assert caught.value.code == "packing.slot"


def test_cells_that_are_not_packed_ones_are_refused() -> None:
    packing = Packing(512, 34)
    cells = packing.pack(np.arange(20, dtype=np.uint64))
    for wrong in (cells[:-1], [*cells, 0], [cells[0], 1 << 511], [cells[0], -1], [1 << (15 * 34), 0]):
        with pytest.raises(ProtocolError) as caught:
            packing.unpack(wrong, 20)
        assert caught.value.code == "packing.cells"


def zero_sum(sites: int, num_cells: int, n: int) -> list[list[int]]:
    """Pairwise masks of each site, which sum to zero modulo n."""
    secret = secrets.token_bytes(32)
    own = [[0] * num_cells for _ in range(sites)]
    for a in range(sites):
        for b in range(a + 1, sites):
            pair = derive(secret, a, b)
            own[a] = add_mod(own[a], masks(Stream(pair).bytes, num_cells, n), n)
            own[b] = add_mod(own[b], masks(Stream(pair).bytes, num_cells, n), n, -1)
    return own


@settings(max_examples=25, deadline=None)
@given(packings(addends=4).filter(lambda d: d[0].modulus_bits <= 512), st.integers(2, 4))
def test_masked_encrypted_sums_come_back(drawn: tuple[Packing, list[int]], sites: int) -> None:
    packing, numbers = drawn
    public, n = key().public, int(key().public.n)
    vectors = [words([x // (s + 1) for x in numbers], packing.slot_bits) for s in range(sites)]
    plain = [packing.pack(vector) for vector in vectors]
    masked = [add_mod(cells, mask, n) for cells, mask in zip(plain, zero_sum(sites, len(plain[0]), n), strict=True)]
    sent = [public.encrypt(cells).to_array() for cells in masked]
    total = key().decrypt(public.add(*(Ciphertexts.from_array(public, array) for array in sent)))
    wanted = [sum(x // (s + 1) for s in range(sites)) for x in numbers]
    assert np.array_equal(packing.unpack(total, len(numbers)), words(wanted, packing.slot_bits))


def test_one_site_short_says_nothing() -> None:
    public, n = key().public, int(key().public.n)
    packing = Packing(public.bits, 34, 3)
    plain = packing.pack(np.arange(1500, dtype=np.uint64))
    masked = [add_mod(plain, mask, n) for mask in zero_sum(3, len(plain), n)]
    total = key().decrypt(public.add(public.encrypt(masked[0]), public.encrypt(masked[1])))
    with pytest.raises(ProtocolError, match="masks did not cancel"):
        packing.unpack(total, 1500)


def test_masks_are_uniform_modulo_n_and_repeatable() -> None:
    n = 3 * 2**200  # far from a power of two
    drawn = masks(Stream(bytes(32)).bytes, 4000, n)
    assert drawn == masks(Stream(bytes(32)).bytes, 4000, n)
    assert all(0 <= x < n for x in drawn)
    counts = np.bincount([3 * x // n for x in drawn], minlength=3)
    assert np.all(np.abs(counts - 4000 / 3) < 5 * np.sqrt(4000 * 2 / 9))


@given(st.lists(st.integers(0, 96), max_size=5), st.sampled_from([1, -1]))
def test_adding_a_mask_and_taking_it_away(cells: list[int], sign: int) -> None:
    mask = masks(Stream(b"k" * 32).bytes, len(cells), 97)
    assert add_mod(add_mod(cells, mask, 97, sign), mask, 97, -sign) == cells
    with pytest.raises(ProtocolError):
        add_mod([*cells, 0], mask, 97)
