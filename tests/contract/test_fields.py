"""Fields of replies: as declared, sent and checked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import ProtocolError
from atoll.contract.fields import Field, as_arrays, clip, count, opaque, real
from atoll.contract.wire import DTYPES, ArraySpec, parse_json, to_json

SHAPES = st.lists(st.integers(0, 2**40), max_size=8).map(tuple)
NUMBERS = st.none() | st.integers(0, 2**60) | st.floats(0, 1e300)
FIELDS = st.builds(
    Field,
    dtype=st.sampled_from(sorted(DTYPES)),
    shape=SHAPES | SHAPES.map(lambda shape: (None, *shape[:7])),
    bound=NUMBERS,
    step=NUMBERS,
    limit_bytes=st.integers(0, 2**40),
)


@given(FIELDS)
def test_a_field_survives_the_journey_to_a_site(field: Field) -> None:
    assert Field.from_json(parse_json(to_json(field.to_json()))) == field


def test_the_declaring_functions() -> None:
    assert real() == Field("<f8", ())
    assert real(3, bound=2.0, step=0.5) == Field("<f8", (3,), 2.0, 0.5)
    assert real((2, 3), dtype="<f4").shape == (2, 3)
    assert count((2,), bound=7) == Field("<i8", (2,), 7, 1)
    assert opaque(100) == Field("|u1", (None,), 255, 1, limit_bytes=100)


WRONG: list[Any] = [
    None, 1, "text", [], {}, ["<f8"], ["<f8", [], None, None], ["<f8", [], None, None, 0, 0],
    [1, [], None, None, 0], ["O", [], None, None, 0], ["float", [], None, None, 0],
    ["<f8", "abc", None, None, 0], ["<f8", ["a"], None, None, 0], ["<f8", [1.0], None, None, 0],
    ["<f8", [-1], None, None, 0], ["<f8", [1, None], None, None, 0],
    ["<f8", [True], None, None, 0],
    ["<f8", [], "300", None, 0], ["<f8", [], [1], None, 0], ["<f8", [], -1, None, 0],
    ["<f8", [], None, "x", 0], ["<f8", [], None, None, None],
    ["<f8", [], None, None, "0"], ["<f8", [], None, None, 1.5],
    ["<f8", [], float("nan"), None, 0],
    {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, "abcde",
]  # fmt: skip


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_a_malformed_field_is_refused(value: Any) -> None:
    with pytest.raises(ProtocolError) as error:
        Field.from_json(value)
    assert error.value.code == "task.field"


@settings(max_examples=300)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), st.lists))
def test_any_json_makes_a_field_or_is_refused(value: Any) -> None:
    try:
        field = Field.from_json(value)
    except ProtocolError:
        return
    np.dtype(field.dtype)


ROWS = Field("<f8", (None, 3), limit_bytes=48)


@pytest.mark.parametrize(
    ("field", "shape", "code"),
    [
        (real((2, 3)), (2, 3), ""), (real(()), (), ""), (real(0), (0,), ""), (real((2, 3)), (3, 2), "reply.shape"),
        (real((2, 3)), (6,), "reply.shape"), (real(()), (1,), "reply.shape"), (real(1), (), "reply.shape"),
        (opaque(16), (16,), ""), (opaque(16), (0,), ""), (opaque(16), (17,), "reply.shape"),
        (opaque(16), (4, 4), "reply.shape"), (opaque(16), (), "reply.shape"),
        (ROWS, (2, 3), ""), (ROWS, (3, 3), "reply.shape"), (ROWS, (2, 2), "reply.shape"),
        (ROWS, (2**50, 0), "reply.shape"),
    ],
)  # fmt: skip
def test_shapes_are_checked_before_any_data(field: Field, shape: tuple[int, ...], code: str) -> None:
    spec = ArraySpec("a", field.dtype, shape)
    if not code:
        field.check("a", spec)
        return
    with pytest.raises(ProtocolError) as error:
        field.check("a", spec)
    assert (error.value.code, error.value.field) == (code, "a")


def test_dtypes_are_checked_exactly() -> None:
    for dtype in DTYPES - {"<f8"}:
        with pytest.raises(ProtocolError) as error:
            real().check("a", ArraySpec("a", dtype, ()))
        assert error.value.code == "reply.dtype"


# ---------------------------------------------------------------- a handler's reply


def test_scalars_and_lists_become_the_declared_arrays() -> None:
    made = as_arrays(
        {"x": 1, "n": np.int32(5), "v": [1, 2.5], "b": True, "f": np.arange(6.0).reshape(2, 3).T},
        {"x": real(), "n": count(), "v": real(2), "b": real(), "f": real((3, 2))},
    )
    assert {name: array.dtype.str for name, array in made.items()} == dict.fromkeys("xvbf", "<f8") | {"n": "<i8"}
    assert made["n"] == 5 and made["v"].tolist() == [1.0, 2.5] and made["x"].shape == ()
    assert made["f"].flags.c_contiguous and made["f"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert list(made) == ["x", "n", "v", "b", "f"]


def test_arrays_of_the_declared_dtype_are_not_copied() -> None:
    given_array = np.arange(10.0)
    assert np.shares_memory(as_arrays({"x": given_array}, {"x": real(10)})["x"], given_array)


@pytest.mark.parametrize(
    ("reply", "code", "field"),
    [
        ({}, "reply.fields", "x"), ({"x": 1.0, "y": 2}, "reply.fields", "y"), ({"y": 2}, "reply.fields", "x, y"),
        ({"x": [1.0]}, "reply.shape", "x"), ({"x": [[1], [1, 2]]}, "reply.shape", "x"),
        ({"x": "3"}, "reply.dtype", "x"), ({"x": None}, "reply.dtype", "x"), ({"x": 1 + 2j}, "reply.dtype", "x"),
        ({"x": object()}, "reply.dtype", "x"),
        ({"x": np.datetime64("2020-01-01")}, "reply.dtype", "x"), ({"x": {"a": 1}}, "reply.dtype", "x"),
        ({"x": b"1"}, "reply.dtype", "x"),
    ],
)  # fmt: skip
def test_replies_other_than_declared_are_refused(reply: dict[str, Any], code: str, field: str) -> None:
    with pytest.raises(ProtocolError) as error:
        as_arrays(reply, {"x": real()})
    assert (error.value.code, error.value.field) == (code, field)


@pytest.mark.parametrize("value", [1.0, 0.5, [1.0, 2.0], np.float32(3)])
def test_reals_are_no_counts(value: Any) -> None:
    with pytest.raises(ProtocolError) as error:
        as_arrays({"n": value}, {"n": count(np.shape(value))})
    assert error.value.code == "reply.dtype"


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(300, "|u1"), (-1, "|u1"), (200, "|i1"), (2**40, "<i4"), (-1, "<u8"), (2**64 - 1, "<i8"), (2, "|b1")],
)  # fmt: skip
def test_integers_do_not_wrap_around(value: Any, dtype: str) -> None:
    with pytest.raises(ProtocolError) as error:
        as_arrays({"n": value}, {"n": Field(dtype)})
    assert error.value.code == "reply.dtype"
    limits = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype != "|b1" else (0, 1)
    assert [int(as_arrays({"n": n}, {"n": Field(dtype)})["n"]) for n in limits] == list(limits)


@given(
    values=st.lists(st.floats(-9, 9) | st.sampled_from([math.nan, 3.0, -3.0]), min_size=1, max_size=6),
    dtype=st.sampled_from(["<f8", "<f4", "<i8", "|u1"]),
)
def test_clipping_is_to_the_bound_and_counts(values: list[float], dtype: str) -> None:
    whole = dtype[1] != "f"
    given_array = np.array([0 if whole and v != v else abs(v) if dtype == "|u1" else v for v in values]).astype(dtype)
    bound = 3 if whole else 3.0
    bounded, clipped = clip({"x": given_array}, {"x": Field(dtype, given_array.shape, bound, 1)})
    assert clipped == sum(abs(float(v)) > 3 for v in given_array)  # what is undefined is not beyond
    assert np.array_equal(bounded["x"], np.clip(given_array, -3 if dtype != "|u1" else 0, 3), equal_nan=not whole)
    assert bounded["x"].dtype == given_array.dtype


def test_counts_are_clipped_at_their_ends() -> None:
    ends = np.array([-(2**63), 2**63 - 1])
    bounded, clipped = clip({"x": ends}, {"x": count(2, bound=5)})
    assert (bounded["x"].tolist(), clipped) == ([-5, 5], 2)
    assert clip({"x": ends}, {"x": count(2, bound=2**70)})[1] == 0
