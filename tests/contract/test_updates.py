"""Updates are weighted monoids: adding them is associative and commutative, with a zero."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from atoll.contract.errors import ProtocolError
from atoll.contract.fields import as_arrays
from atoll.contract.updates import WEIGHT, Update

# small integers as reals: every sum and product is exact, so that the laws hold to the bit
EXACT = st.integers(-(2**15), 2**15).map(float)
WEIGHTS = st.integers(0, 2**10)


@st.composite
def updates(draw: st.DrawFn, number: int = 3, exact: bool = True) -> list[Update]:
    """Updates of one shape."""
    shape = draw(npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    elements = EXACT if exact else st.floats(-1e6, 1e6)
    weights = WEIGHTS if exact else st.floats(0, 1e6)
    one = st.builds(
        lambda w, b, weight: Update.of({"w": w, "b": b}, weight),
        npst.arrays("<f8", shape, elements=elements), npst.arrays("<f8", (2,), elements=elements), weights,
    )  # fmt: skip
    return draw(st.lists(one, min_size=number, max_size=number))


def same(left: Update, right: Update) -> bool:
    return left.weight == right.weight and all(np.array_equal(left.values[n], right.values[n]) for n in ("w", "b"))


@given(updates())
def test_adding_is_associative(three: list[Update]) -> None:
    a, b, c = three
    assert same((a + b) + c, a + (b + c))


@given(updates(2))
def test_adding_is_commutative(two: list[Update]) -> None:
    assert same(two[0] + two[1], two[1] + two[0])


@given(updates(1))
def test_zero_is_neutral(one: list[Update]) -> None:
    zero = Update.zero_like(one[0].values)
    assert same(one[0] + zero, one[0]) and same(zero + one[0], one[0])
    assert zero.weight == 0 and zero.values["w"].shape == one[0].values["w"].shape


@given(updates(4, exact=False))
def test_any_order_gives_the_same_mean_up_to_rounding(four: list[Update]) -> None:
    scale = 1 + sum(float(np.abs(update.values["b"]).sum()) for update in four)
    sums = [((p[0] + p[1]) + p[2]) + p[3] for p in itertools.permutations(four)]
    for total in sums[1:]:
        assert np.abs(total.values["b"] - sums[0].values["b"]).max() <= 1e-14 * scale
        assert np.isclose(total.weight, sums[0].weight, rtol=1e-14)


@given(updates(3))
def test_a_hierarchy_gives_the_mean_of_all(three: list[Update]) -> None:
    a, b, c = three
    city = a + b
    total = city + c
    if total.weight == 0:
        return
    together = sum(u.values["b"] for u in three) / sum(u.weight for u in three)
    assert np.array_equal(total.mean()["b"], together)


def test_the_mean_is_weighted() -> None:
    total = Update.of({"x": np.array([1.0, 10.0])}, 1) + Update.of({"x": np.array([4.0, 40.0])}, 3)
    assert total.weight == 4.0 and total.mean()["x"].tolist() == [3.25, 32.5]


def test_nothing_summed_has_no_mean() -> None:
    for weight in (0, -1, float("nan")):
        with pytest.raises(ProtocolError) as error:
            Update({"x": np.zeros(2)}, weight).mean()
        assert error.value.code == "update.no-weight" and error.value.remedy


def test_other_parts_cannot_be_added() -> None:
    one = Update({"x": np.zeros(2)}, 1)
    for other in ({"y": np.zeros(2)}, {}, {"x": np.zeros(2), "y": np.zeros(2)}):
        with pytest.raises(ProtocolError):
            one + Update(other, 1)


def test_making_an_update_leaves_the_values_alone() -> None:
    values = {"x": np.ones(2)}
    Update.of(values, 5) + Update.of(values, 6)
    assert values["x"].tolist() == [1, 1]


@given(updates(2))
def test_it_travels_as_the_fields_of_a_sum(two: list[Update]) -> None:
    shapes = two[0].values
    fields = Update.fields(shapes, value_bound=2.0**15, weight_bound=2.0**10, step=1e-6)
    replies = [as_arrays(update.reply(), fields) for update in two]
    for reply in replies:
        assert all(np.all(np.abs(reply[n]) <= f.bound) for n, f in fields.items() if f.bound is not None)
    assert set(fields) == {"w", "b", WEIGHT}
    total = {name: replies[0][name] + replies[1][name] for name in fields}
    assert same(Update.from_sum(total, ("w", "b")), two[0] + two[1])
