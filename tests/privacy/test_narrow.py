"""Reals on a coarse grid travel in few bits: they come back as they were, and no other bytes are taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.contract.errors import ProtocolError
from atoll.contract.rounds import count, real
from atoll.privacy.narrow import HEAD, declared, decode, encode, narrow


@given(bits=st.integers(1, 16), weight=st.integers(1, 60_000), seed=st.integers(0, 99), size=st.integers(64, 200))
def test_values_on_the_grid_come_back_without_their_weights_bits(bits: int, weight: int, seed: int, size: int) -> None:
    step = 2 * 0.3 / (2**bits + 1)
    field = real(size, bound=0.3 * 60_000, step=step)
    most = 2 ** (bits - 1)
    values = np.random.default_rng(seed).integers(-most + 1, most, size) * step * weight
    data = encode(values, field)
    assert narrow(field) and len(data) <= HEAD.size + -(-size * bits // 8) <= declared(field).size_bytes
    assert np.allclose(decode(data, field), values, rtol=1e-12, atol=1e-12 * step)


def test_values_off_the_grid_travel_as_they_are() -> None:
    field, values = real(70, bound=1, step=0.1), np.linspace(-1, 1, 70)
    assert np.array_equal(decode(encode(values, field), field), values)


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
        values = decode(np.frombuffer(data, np.uint8), field)
    except ProtocolError:
        return
    assert values.shape == (64,)
