"""Fixed point: exact to the stated error, never out of its ring, refused where it cannot be."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.contract.errors import PlanError
from atoll.contract.rounds import Field, count, opaque, real, withheld
from atoll.crypto.prg import CHUNK_BYTES, Stream, fresh_key
from atoll.privacy.fixed_point import FEWEST, WIDTHS, Layout, add_masks, add_to, width_of

EPS = 2.0**-53


def summed(layout: Layout, replies: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Replies encoded, added in their rings and decoded."""
    total: dict[str, np.ndarray] = {}
    for reply in replies:
        for name, vector in layout.encode(reply).items():
            if name in total:
                add_to(total[name], vector)
            else:
                total[name] = vector
    return layout.decode(total)


# ---------------------------------------------------------------- the ring


@pytest.mark.parametrize(
    ("bound", "step", "sites", "width"),
    [
        (1, 1e-3, 10, 32), (1e9, 1, 1, 32), (1e9, 1, 2, 32), (1e9, 1, 3, 64), (1, 1e-9, 2, 32), (1, 1e-9, 3, 64),
        (1e9, 1e-9, 9, 64), (1e9, 1e-9, 10, 128), (1e20, 1e-10, 1000, 128), (0, 1, 10**6, 32), (1e-300, 1e-9, 5, 32),
    ],
)  # fmt: skip
def test_the_narrowest_ring_that_holds_the_sum(bound: float, step: float, sites: int, width: int) -> None:
    assert width_of("x", real(bound=bound, step=step), sites) == width


@given(
    st.floats(1e-6, 1e25), st.floats(1e-12, 1e6), st.integers(1, 10_000), st.sampled_from(["<f8", "<f4"])
)  # fmt: skip
def test_the_ring_holds_the_extremes(bound: float, step: float, sites: int, dtype: str) -> None:
    """n sites at their bounds, each rounded away from zero, stay inside; in exact arithmetic."""
    field = real(bound=bound, step=step, dtype=dtype)
    at_most = Fraction(float(np.dtype(dtype).type(bound)))  # where the gate clips to
    try:
        width = width_of("x", field, sites)
    except PlanError as error:
        assert error.code == "ring.too-wide"
        assert sites * at_most / Fraction(step) > 2**126
        return
    assert sites * (at_most / Fraction(step) + 1) < 2 ** (width - 1)


@pytest.mark.parametrize("sites", [1, 2, 3, 7, 10, 64, 1000])
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("sign", [1, -1])
def test_exactly_at_the_limit(sites: int, width: int, sign: int) -> None:
    """The largest bound that is given a ring: all sites at it, and the sum does not wrap."""
    low, high = 0.0, 2.0 ** (width - 1)
    for _ in range(200):
        middle = (low + high) / 2
        try:
            fits = width_of("x", real(bound=middle, step=1), sites) <= width
        except PlanError:
            fits = False
        low, high = (middle, high) if fits else (low, middle)
    bound = low
    assert width_of("x", real(bound=bound, step=1), sites) == width
    assert bound * sites > 0.99 * 2 ** (width - 1) - 2 * sites
    layout = Layout.of({"x": real(3, bound=bound, step=1)}, sites)
    reply = {"x": np.full(3, sign * bound)}
    found = summed(layout, [reply] * sites)["x"]
    assert np.allclose(found, sign * bound * sites, rtol=3 * EPS * sites, atol=sites / 2)


def test_counts_at_the_limit_of_int64() -> None:
    bound = 2**61
    layout = Layout.of({"n": count(2, bound=bound)}, 3)
    assert summed(layout, [{"n": np.array([bound, -bound])}] * 3)["n"].tolist() == [3 * bound, -3 * bound]
    for more in (count(bound=2**62), count(bound=2**63), Field("<u8", (), 2.0**64, 1)):
        with pytest.raises(PlanError) as caught:  # not put into 128 bits, of which int64 would show the half
            width_of("n", more, 3)
        assert caught.value.code == "ring.too-wide"


@pytest.mark.parametrize(
    "field",
    [
        real(), real(bound=1), real(step=1e-6), real(bound=1, step=0), opaque(100), count(),
        Field("<i8", (), 10, 0.5), Field("<f8", (None,), 1, 1e-3, 80),
    ],
)  # fmt: skip
def test_what_is_not_declared_is_refused(field: Field) -> None:
    with pytest.raises(PlanError) as caught:
        Layout.of({"other": count(bound=3), "x": field}, 3)
    assert (caught.value.code, caught.value.field) == ("ring.unbounded", "x")


@pytest.mark.parametrize("bound", [1e39, 1e300, math.inf])
def test_what_no_ring_holds_is_refused(bound: float) -> None:
    with pytest.raises(PlanError) as caught:
        Layout.of({"x": real(bound=bound, step=1)}, 3)
    assert (caught.value.code, caught.value.field) == ("ring.too-wide", "x")


# ---------------------------------------------------------------- there and back


@st.composite
def sums(draw: st.DrawFn) -> tuple[Field, list[np.ndarray]]:
    """A field, and what 1 … 12 sites answer: extremes, halves of steps, and anything between."""
    dtype = draw(st.sampled_from(["<f8", "<f4"]))
    bound = draw(st.sampled_from([1e-3, 1.0, 77.7, 1e6, 2.0**40, 1e15, 1e25]))
    step = draw(st.sampled_from([1.0, 0.5, 1e-3, 2.0**-20, 1e-9, 3e-12]))
    sites, size = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    special = [0.0, -0.0, bound, -bound, step, -step, step / 2, -step / 2, 1.5 * step, bound - step, 5e-324]
    value = st.one_of(st.sampled_from([v for v in special if abs(v) <= bound]), st.floats(-bound, bound))
    rows = draw(st.lists(st.lists(value, min_size=size, max_size=size), min_size=sites, max_size=sites))
    limit = float(np.dtype(dtype).type(bound))
    return real(size, bound=bound, step=step, dtype=dtype), [
        np.clip(np.array(r, dtype), -limit, limit).astype(dtype) for r in rows
    ]


@given(sums())
def test_the_sum_is_exact_to_half_a_step_a_site(case: tuple[Field, list[np.ndarray]]) -> None:
    field, rows = case
    layout = Layout.of({"x": field}, len(rows))
    found = summed(layout, [{"x": row} for row in rows])["x"]
    assert found.dtype == np.float64
    for i, value in enumerate(found):
        exact = sum((Fraction(float(row[i])) for row in rows), Fraction(0))
        size = sum(abs(float(row[i])) for row in rows)
        assert abs(Fraction(float(value)) - exact) <= Fraction(len(rows) * field.step / 2 * (1 + 1e-9) + 4 * EPS * size)


@given(st.lists(st.lists(st.integers(-(2**40), 2**40), min_size=3, max_size=3), min_size=1, max_size=9))
def test_counts_are_exact(rows: list[list[int]]) -> None:
    for bound in (2**40, 2**58):
        layout = Layout.of({"n": count(3, bound=bound)}, len(rows))
        found = summed(layout, [{"n": np.array(row)} for row in rows])["n"]
        assert found.dtype == np.int64 and found.tolist() == np.sum(rows, axis=0).tolist()


@pytest.mark.parametrize("width", [32, 64, 128])
def test_sums_below_zero_and_across_it(width: int) -> None:
    bound = {32: 1e6, 64: 1e15, 128: 1e25}[width]
    assert width_of("x", real(bound=bound, step=1), 3) == width
    layout = Layout.of({"x": real(4, bound=bound, step=1)}, 3)
    rows = np.array([[-bound, -1, 5, 0], [-bound, 2, -7, -0.0], [bound / 2, -2, 1, 0]])
    assert np.allclose(summed(layout, [{"x": row} for row in rows])["x"], rows.sum(axis=0), rtol=4 * EPS, atol=1.5)
    carried = [{"x": np.array([2.0**63, -(2.0**63), 2.0**64, -(2.0**64)])}] * 2
    if width == 128:
        assert summed(Layout.of({"x": real(4, bound=bound, step=1)}, 2), carried)["x"].tolist() == [
            2.0**64, -(2.0**64), 2.0**65, -(2.0**65)
        ]  # fmt: skip


@given(st.integers(-(2**127), 2**127 - 1), st.integers(-(2**127), 2**127 - 1))
def test_128_bits_carry_and_borrow(a: int, b: int) -> None:
    def vector(value: int) -> np.ndarray:
        return np.frombuffer((value % 2**128).to_bytes(16, "little"), "<u8").reshape(1, 2).copy()

    def number(vector: np.ndarray) -> int:
        return int.from_bytes(vector.tobytes(), "little")

    for minus, wanted in ((False, a + b), (True, a - b)):
        total = vector(a)
        add_to(total, vector(b), minus=minus)
        assert number(total) == wanted % 2**128


# ---------------------------------------------------------------- many fields, and masks

FIELDS = {
    "a": real((2, 3), bound=50, step=1e-4),
    "b": count(4, bound=10**6),
    "c": real(bound=1e9, step=1e-6),
    "d": real(5, bound=1e22, step=1e-6),
    "e": withheld(7),
    "f": real(0, bound=1, step=1),
    "g": real(CHUNK_BYTES // 4 + 11, bound=3, step=1e-3, dtype="<f4"),
    "h": real(CHUNK_BYTES // 8 + 5, bound=1e12, step=1e-3),
    "i": real(CHUNK_BYTES + 3, bound=14, step=1),
    "j": real(FEWEST, bound=1, step=1 / 7),
    "k": real(FEWEST - 1, bound=1, step=1 / 7),
}


def replies(sites: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(3)
    made = []
    for _ in range(sites):
        reply = {}
        for name, field in FIELDS.items():
            values = random.uniform(-field.bound, field.bound, field.shape)
            reply[name] = np.abs(values).round().astype(field.dtype) if name in "be" else values.astype(field.dtype)
        made.append(reply)
    return made


def test_several_fields_share_their_rings() -> None:
    layout = Layout.of(FIELDS, 4)
    assert set(layout.widths.values()) == {8, 16, 32, 64, 128}
    sizes = {w: sum(math.prod(f.shape) for n, f in FIELDS.items() if layout.widths[n] == w) for w in WIDTHS}
    assert layout.sizes() == sizes
    told = replies(4)
    vectors = layout.encode(told[0])
    assert {n: (f.dtype, f.shape) for n, f in layout.declared().items()} == {
        n: (v.dtype.str, v.shape) for n, v in vectors.items()
    }
    for name, value in summed(layout, told).items():
        wanted = sum(reply[name].astype(np.float64) for reply in told)
        step = 0 if name in "be" else FIELDS[name].step
        assert value.shape == FIELDS[name].shape
        assert np.allclose(value, wanted, rtol=1e-14, atol=2 * step), name


@pytest.mark.parametrize(("num_plus", "num_minus"), [(0, 0), (1, 0), (2, 3)])
def test_masks_go_on_with_the_encoding_and_come_off_alone(num_plus: int, num_minus: int) -> None:
    """Encoding under masks is encoding, then masking; and the same streams the other way round take them off."""
    layout, reply = Layout.of(FIELDS, 4), replies(1)[0]
    plus, minus = [fresh_key() for _ in range(num_plus)], [fresh_key() for _ in range(num_minus)]

    def streams(keys: list[bytes]) -> list[Stream]:
        return [Stream(key) for key in keys]

    bare = layout.encode(reply)
    masked = layout.encode(reply, streams(plus), streams(minus))
    after = {name: vector.copy() for name, vector in bare.items()}
    add_masks(after, streams(plus), streams(minus))
    assert all(np.array_equal(masked[name], after[name]) for name in bare)
    if plus:
        same = sum(int((masked[name] == bare[name]).sum()) for name in bare)
        chance = sum(vector.size / 2 ** (8 * vector.itemsize) for vector in bare.values())
        assert same < 5 + 1.2 * chance
    add_masks(masked, streams(minus), streams(plus))
    assert all(np.array_equal(masked[name], bare[name]) for name in bare)


def test_masks_of_pairs_cancel() -> None:
    layout, told = Layout.of(FIELDS, 3), replies(3)
    keys = {pair: fresh_key() for pair in ((0, 1), (0, 2), (1, 2))}
    total: dict[str, np.ndarray] = {}
    for site, reply in enumerate(told):
        plus = [Stream(key) for (a, _), key in keys.items() if a == site]
        minus = [Stream(key) for (_, b), key in keys.items() if b == site]
        for name, vector in layout.encode(reply, plus, minus).items():
            add_to(total.setdefault(name, np.zeros_like(vector)), vector)
    found, wanted = layout.decode(total), summed(layout, told)
    assert all(np.array_equal(found[name], wanted[name]) for name in FIELDS)


def test_a_masked_element_is_uniform() -> None:
    """One value under fresh masks: its top byte takes every value as often (χ², 255 degrees of freedom)."""
    layout = Layout.of({"x": real(50_000, bound=1, step=1e-3)}, 3)
    [vector] = layout.encode({"x": np.full(50_000, 0.7)}, [Stream(fresh_key())]).values()
    top = (vector >> (8 * (vector.itemsize - 1))).astype(np.int64)
    counts = np.bincount(top, minlength=256)
    expected = vector.size / 256
    assert ((counts - expected) ** 2 / expected).sum() < 400  # p < 1e-7
