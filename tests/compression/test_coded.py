"""Messages that stand alone: what is read is what was written, to its form, and whatever else comes is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.compression import coded, grid
from atoll.compression.coded import Form
from atoll.compression.half import halved, whole
from atoll.compression.places import largest, longest, read, written
from atoll.contract.bits import pack, packed_bytes, unpack
from atoll.contract.errors import ProtocolError

FORMS = [
    Form(), Form(precision="float16"), Form(precision="bfloat16"), Form(bits=2), Form(bits=4), Form(bits=8),
    Form(bits=13), Form(words=4), Form(words=8), Form(words=1),
]  # fmt: skip
FORMS += [dataclasses.replace(form, lossless=True) for form in FORMS]


@given(width=st.integers(1, 64), count=st.integers(0, 300), seed=st.integers(0, 2**32))
def test_numbers_come_out_of_their_bits(width: int, count: int, seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(0, 2**64, count, np.uint64) >> np.uint64(64 - width)
    data = pack(numbers, width)
    assert data.nbytes == packed_bytes(count, width)
    assert np.array_equal(unpack(data, count, width), numbers)


@pytest.mark.parametrize("width", [3, 5, 12])
def test_long_runs_of_numbers_are_packed_in_pieces(width: int) -> None:
    numbers = np.random.default_rng(1).integers(0, 2**width, 100_003).astype(np.uint64)
    assert np.array_equal(unpack(pack(numbers, width), len(numbers), width), numbers)


@pytest.mark.parametrize(("count", "width", "data"), [(3, 3, [0]), (3, 3, [0, 0, 0]), (3, 3, [0, 1]), (1, 70, [0] * 9)])
def test_bits_of_another_size_are_refused(count: int, width: int, data: list[int]) -> None:
    with pytest.raises(ProtocolError):
        unpack(np.array(data, np.uint8), count, width)


@given(st.lists(st.floats(-1e4, 1e4, width=32), max_size=50))
def test_halves_are_the_nearest_there_are(values: list[float]) -> None:
    told = np.array(values, np.float32)
    assert np.array_equal(whole(halved(told, "float16"), "float16"), told.astype(np.float16).astype(np.float32))
    brain = whole(halved(told, "bfloat16"), "bfloat16")
    assert (np.abs(brain - told) <= np.abs(told) * 2.0**-8 + 1e-38).all()
    assert np.array_equal(halved(brain, "bfloat16"), halved(told, "bfloat16"))
    assert np.array_equal(brain.view(np.uint32) & 0xFFFF, np.zeros(len(told), np.uint32))


def test_bfloat16_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch")
    told = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    other = torch.from_numpy(told).to(torch.bfloat16).float().numpy()
    assert np.array_equal(whole(halved(told, "bfloat16"), "bfloat16"), other)


def test_halves_do_not_overflow() -> None:
    assert whole(halved(np.array([1e6, -1e6]), "float16"), "float16").tolist() == [65504.0, -65504.0]


@given(size=st.integers(1, 3000), share=st.floats(0, 1), seed=st.integers(0, 999))
def test_places_come_back(size: int, share: float, seed: int) -> None:
    chosen = np.flatnonzero(np.random.default_rng(seed).random(size) < share)
    manner, data = written(chosen, size)
    assert len(data) <= longest(len(chosen), size)
    assert np.array_equal(read(manner, data, len(chosen), size), chosen)


def test_far_places_come_back() -> None:
    chosen = np.array([0, 254, 255, 256, 511, 1022, 100_000])
    manner, data = written(chosen, 200_000)
    assert manner == "gaps" and np.array_equal(read(manner, data, len(chosen), 200_000), chosen)


@pytest.mark.parametrize(
    ("manner", "data", "count"),
    [("all", [], 3), ("all", [1], 20), ("mask", [255, 0], 8), ("mask", [255, 0, 255], 13), ("gaps", [3, 4], 3),
     ("gaps", [3, 255], 1), ("gaps", [19, 0], 2), ("gaps", [255, 3], 1)],
)  # fmt: skip
def test_other_places_are_refused(manner: Any, data: list[int], count: int) -> None:
    with pytest.raises(ProtocolError):
        read(manner, np.array(data, np.uint8), count, 20)


def test_the_largest_are_chosen_and_of_equal_ones_the_first() -> None:
    assert largest(np.array([1.0, -5, 5, 0, 5]), 2).tolist() == [1, 2]


@given(bits=st.integers(2, 16), values=st.lists(st.floats(-5, 5), max_size=1200), seed=st.integers(0, 99))
def test_a_grid_errs_by_less_than_a_step(bits: int, values: list[float], seed: int) -> None:
    told = np.array(values)
    for random, share in ((np.random.default_rng(seed), 1.0), (None, 0.5)):
        places, scales = grid.quantised(told, bits, random)
        step = np.repeat(scales, grid.BUCKET)[: len(told)].astype(float) / grid.levels(bits)
        back = grid.restored(places, scales, bits)
        assert (np.abs(back - told) <= share * step * 1.001 + 1e-37).all()


def test_a_grid_is_right_on_average() -> None:
    """QSGD, Lemma 3.1 (i)."""
    told = np.linspace(-1, 1, 400)
    total = np.zeros(400)
    random, repeats = np.random.default_rng(4), 1500
    for _ in range(repeats):
        total += grid.restored(*grid.quantised(told, 3, random), 3)
    spread = 1 / grid.levels(3) / 2 / np.sqrt(repeats)  # a coin between two neighbours
    assert np.abs(total / repeats - told).max() < 5 * spread


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.03, 0.4, 1.0])
def test_a_message_holds_what_its_form_can(form: Form, share: float) -> None:
    random, size = np.random.default_rng(0), 2000
    chosen = np.flatnonzero(random.random(size) < share)
    values: Any = random.normal(0, 0.1, len(chosen))
    if form.words:
        values = random.integers(0, 200, len(chosen)).astype(f"u{form.words}")
    message = coded.encode(values, chosen, size, form)
    assert message.dtype == np.uint8 and len(message) <= form.limit_bytes(len(chosen), size)
    places, read_back = coded.decode(message, size, form)
    assert np.array_equal(places, chosen)
    error = {None: 1e-7 if form.precision == "float32" else 2e-3}.get(form.bits, 1.0)
    assert np.array_equal(read_back, values) if form.words else np.allclose(read_back, values, atol=error)


def test_a_message_is_as_small_as_its_bits() -> None:
    values, every = np.random.default_rng(0).normal(0, 1, 5120), np.arange(5120)
    sizes = {form.bits: len(coded.encode(values, every, 5120, form)) for form in (Form(bits=4), Form(bits=8))}
    assert sizes == {4: 16 + 40 + 2560, 8: 16 + 40 + 5120}
    assert len(coded.encode(np.zeros(5120), every, 5120, Form(lossless=True))) < 60


@given(data=st.binary(max_size=200), form=st.sampled_from(FORMS))
def test_noise_is_refused_or_read_within_its_size(data: bytes, form: Form) -> None:
    try:
        places, values = coded.decode(np.frombuffer(data, np.uint8), 50, form)
    except ProtocolError:
        return
    assert len(places) == len(values) <= 50


@given(place=st.integers(0, 500), to=st.integers(0, 255), form=st.sampled_from(FORMS))
def test_a_changed_byte_is_refused_or_read_within_its_size(place: int, to: int, form: Form) -> None:
    values: Any = np.arange(30, dtype=f"u{form.words}") if form.words else np.linspace(-1, 1, 30)
    message = coded.encode(values, np.arange(0, 90, 3), 90, form).copy()
    message[place % len(message)] = to
    try:
        places, found = coded.decode(message, 90, form, 30)
    except ProtocolError:
        return
    assert len(places) == len(found) <= 30 and (np.diff(places) > 0).all() and np.isfinite(found).all()


@pytest.mark.parametrize("tail", [b"", b"\0" * 100_000])
def test_what_unpacks_to_another_size_is_refused(tail: bytes) -> None:
    import pyarrow as pa

    good = coded.encode(np.zeros(1000), np.arange(1000), 1000, Form(lossless=True))
    body = pa.Codec("zstd").compress(b"\0" * 3999 + tail, asbytes=True)
    with pytest.raises(ProtocolError):
        coded.decode(np.frombuffer(good[:16].tobytes() + body, np.uint8), 1000, Form(lossless=True))


def test_more_values_than_the_plan_lets_are_refused() -> None:
    message = coded.encode(np.ones(20), np.arange(20), 50, Form())
    with pytest.raises(ProtocolError):
        coded.decode(message, 50, Form(), most=19)
