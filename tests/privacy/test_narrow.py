"""Reals on a coarse grid travel in few bits: they come back as they were, and no other bytes are taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.contract.errors import ProtocolError
from atoll.contract.rounds import Field, count, real
from atoll.privacy import narrow as module
from atoll.privacy.narrow import HEAD, declared, decode, encode, narrow


def whole(data: Any, field: Field) -> Any:
    pieces = list(decode(data, field))
    places = np.cumsum([0, *(len(piece) for _, piece in pieces)])
    assert [start for start, _ in pieces] == places[:-1].tolist()
    return np.concatenate([piece for _, piece in pieces])


@pytest.mark.parametrize("exact", [True, False])
def test_long_fields_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    monkeypatch.setattr(module, "PIECE", 16)
    field, random = real((7, 11), bound=1, step=0.01), np.random.default_rng(0)
    values = random.integers(-100, 101, (7, 11)) * 0.01 if exact else random.uniform(-1, 1, (7, 11))
    assert np.allclose(whole(encode(values, field), field), values.ravel(), rtol=1e-12, atol=1e-14)


@given(bits=st.integers(1, 16), weight=st.integers(1, 60_000), seed=st.integers(0, 99), size=st.integers(64, 200))
def test_values_on_the_grid_come_back_without_their_weights_bits(bits: int, weight: int, seed: int, size: int) -> None:
    step = 2 * 0.3 / (2**bits + 1)
    field = real(size, bound=0.3 * 60_000, step=step)
    most = 2 ** (bits - 1)
    values = np.random.default_rng(seed).integers(-most + 1, most, size) * step * weight
    data = encode(values, field)
    assert narrow(field) and len(data) <= HEAD.size + -(-size * bits // 8) <= declared(field).size_bytes
    assert np.allclose(whole(data, field), values, rtol=1e-12, atol=1e-12 * step)


def test_values_off_the_grid_travel_as_they_are() -> None:
    field, values = real(70, bound=1, step=0.1), np.linspace(-1, 1, 70)
    assert np.array_equal(whole(encode(values, field), field), values)


@pytest.mark.parametrize(
    "field",
    [real(63, bound=1, step=0.1), real(100, bound=1), real(100, step=1), real(100, bound=1, step=1e-10),
     count(100, bound=1), real(100, bound=1, step=2.0**-32, dtype="<f4")],
)  # fmt: skip
def test_other_fields_are_not_narrow(field: Any) -> None:
    assert not narrow(field)


@given(data=st.binary(max_size=90))
def test_other_bytes_are_refused_or_read_to_their_size(data: bytes) -> None:
    field = real(64, bound=1, step=0.25)
    try:
        values = whole(np.frombuffer(data, np.uint8), field)
    except ProtocolError:
        return
    assert values.shape == (64,)
