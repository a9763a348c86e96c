"""CKKS: sums within the stated error, and nothing malformed taken."""

from __future__ import annotations

import importlib
import pickle
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import PlanError, ProtocolError
from atoll.crypto.ckks import (
    CIPHERTEXT_BYTES,
    DEGREE,
    FLOOD,
    MAX_SITES,
    MODULI_BITS,
    SLOTS,
    Ckks,
    CkksPublic,
    error_bound,
)

HAS_TENSEAL = importlib.util.find_spec("tenseal") is not None
needs_tenseal = pytest.mark.skipif(not HAS_TENSEAL, reason="extra he is not installed")


@cache
def keys() -> tuple[Ckks, CkksPublic]:
    holder = Ckks()
    return holder, CkksPublic(holder.public)


def random() -> np.random.Generator:
    return np.random.default_rng(0)


@needs_tenseal
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, SLOTS + 2), st.floats(1e-6, 1e9), st.integers(0, 99))
def test_sums_are_within_the_stated_error(sites: int, size: int, bound: float, seed: int) -> None:
    holder, public = keys()
    drawn = np.random.default_rng(seed).uniform(-bound, bound, (sites, size))
    drawn[:, 0] = bound
    total = public.add(*(public.encrypt(vector, bound) for vector in drawn))
    assert total.shape == (-(-size // SLOTS), CIPHERTEXT_BYTES)
    found = holder.decrypt(total, size, bound, sites)
    assert np.abs(found - drawn.sum(axis=0)).max() <= error_bound(bound, sites)


@needs_tenseal
def test_the_most_sites_at_their_bounds_do_not_overflow() -> None:
    holder, public = keys()
    for value in (1.0, -1.0):
        one = public.encrypt(np.full(SLOTS, value), 1)
        found = holder.decrypt(public.add(*[one] * MAX_SITES), SLOTS, 1, MAX_SITES)
        assert np.abs(found - value * MAX_SITES).max() <= error_bound(1, MAX_SITES)


@needs_tenseal
def test_error_is_the_noise_that_hides_the_key_and_nothing_else() -> None:
    holder, public = keys()
    values = random().uniform(-1, 1, 3 * SLOTS)
    encrypted = public.encrypt(values, 1)
    first, second = (holder.decrypt(encrypted, len(values), 1, 1) for _ in range(2))
    assert 0.95 * FLOOD < np.std(first - values) < 1.05 * FLOOD
    assert abs(np.mean(first - values)) < 5 * FLOOD / np.sqrt(len(values))
    assert abs(np.corrcoef(first - values, second - values)[0, 1]) < 0.05
    assert np.abs((first + second) / 2 - values).std() < FLOOD


@needs_tenseal
def test_the_public_part_has_no_secret_key_and_encrypts_never_alike() -> None:
    import tenseal

    holder, public = keys()
    context = tenseal.context_from(holder.public)
    assert context.is_public() and not context.has_secret_key()
    values = np.zeros(3)
    assert not np.array_equal(public.encrypt(values, 1), public.encrypt(values, 1))
    assert repr(holder) == "Ckks()"
    with pytest.raises(TypeError):
        pickle.dumps(holder)


def test_parameters_are_within_the_standard() -> None:
    assert DEGREE == 8192 and sum(MODULI_BITS) <= 218  # HomomorphicEncryption.org 2018: 128 bits, ternary secret


@needs_tenseal
def test_values_beyond_the_bound_are_refused_and_not_told() -> None:
    _, public = keys()
    for values in ([1.5], [np.nan], [-np.inf], [0.0, -1.0000001]):
        with pytest.raises(ProtocolError) as caught:
            public.encrypt(np.array(values), 1.0)
        assert caught.value.code == "ckks.value" and "1.5" not in str(caught.value)
    for bound in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ProtocolError):
            public.encrypt(np.zeros(1), bound)


def altered() -> dict[str, Any]:
    _, public = keys()
    good = public.encrypt(np.ones(5), 1)
    wrong = {name: good.copy() for name in ("too long", "empty", "cut", "noise", "header", "another scheme")}
    wrong["too long"][0, :4] = 255
    wrong["empty"][0, :4] = 0
    wrong["cut"][0, :4] = np.frombuffer((100_000).to_bytes(4, "little"), np.uint8)
    wrong["noise"][0, 4:] = random().integers(0, 256, CIPHERTEXT_BYTES - 4)
    wrong["header"][0, 4:60] = 0
    import tenseal

    other = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 60])
    other.global_scale = 2.0**40
    same = tenseal.context_from(keys()[0].public)
    same.global_scale = 2.0**60
    for name, vector in (
        ("another scheme", tenseal.ckks_vector(other, [1.0] * SLOTS)),
        ("another scale", tenseal.ckks_vector(same, [1.0] * SLOTS)),
        ("fewer slots", tenseal.ckks_vector(tenseal.context_from(keys()[0].public), [1.0] * 5)),
    ):
        data = vector.serialize()[: CIPHERTEXT_BYTES - 4]
        wrong[name] = np.zeros((1, CIPHERTEXT_BYTES), np.uint8)
        wrong[name][0, : 4 + len(data)] = np.frombuffer(len(data).to_bytes(4, "little") + data, np.uint8)
    wrong["narrow"] = good[:, :-1]
    wrong["flat"] = good.reshape(-1)
    wrong["wide type"] = good.astype(np.uint16)
    return wrong


@needs_tenseal
def test_malformed_ciphertexts_are_refused() -> None:
    holder, public = keys()
    good = public.encrypt(np.ones(5), 1)
    for name, array in altered().items():
        with pytest.raises(ProtocolError) as caught:
            public.add(array[: len(array)], array)
        assert caught.value.code == "ckks.ciphertexts", name
        with pytest.raises(ProtocolError):
            holder.decrypt(array, 5, 1, 1)
    with pytest.raises(ProtocolError, match="different numbers"):
        public.add(good, public.encrypt(np.ones(SLOTS + 1), 1))
    with pytest.raises(ProtocolError, match="as many"):
        holder.decrypt(good, SLOTS + 1, 1, 1)


@needs_tenseal
def test_flipped_bytes_are_refused_or_decrypt_to_something_else() -> None:
    holder, public = keys()
    good, generator = public.encrypt(np.ones(5), 1), random()
    for _ in range(60):
        array = good.copy()
        places = generator.integers(0, [200, 224_000][generator.integers(2)], 2)
        array[0, places] ^= generator.integers(1, 256, 2).astype(np.uint8)
        try:
            holder.decrypt(array, 5, 1, 1)
        except ProtocolError as error:
            assert error.code == "ckks.ciphertexts"


@needs_tenseal
def test_malformed_public_keys_are_refused() -> None:
    import tenseal

    holder, _ = keys()
    other = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 60])
    other.global_scale = 2.0**84
    whole = holder._context.serialize(save_secret_key=True)
    cases = [b"", b"x" * 99, holder.public[:1000], bytes(1 << 20), other.serialize(save_secret_key=False)]
    for data in [*cases, whole]:
        with pytest.raises(ProtocolError) as caught:
            CkksPublic(data)
        assert caught.value.code == "ckks.public-key"


@needs_tenseal
def test_more_sites_than_the_modulus_has_room_for_are_refused() -> None:
    holder, public = keys()
    with pytest.raises(PlanError) as caught:
        holder.decrypt(public.encrypt(np.ones(1), 1), 1, 1, MAX_SITES + 1)
    assert caught.value.code == "ckks.sites"


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal", None)
    for make in (Ckks, lambda: CkksPublic(b"")):
        with pytest.raises(PlanError) as caught:
            make()
        assert caught.value.code == "ckks.missing" and "pip install 'atoll[he]'" in caught.value.remedy
