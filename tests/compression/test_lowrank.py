"""PowerSGD: as the paper's Algorithms 1 and 2 by hand; with warm start it comes to the truncated SVD."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.compression.lowrank import LowRank
from atoll.contract.errors import ProtocolError

LAYERS = {"a.weight": slice(0, 60), "a.bias": slice(60, 66), "b.weight": slice(66, 156), "b.bias": slice(156, 160)}
SHAPES = {"a.weight": (6, 10), "a.bias": (6,), "b.weight": (9, 2, 5), "b.bias": (4,)}


def of(rank: int, moving: np.ndarray | None = None) -> LowRank:
    return LowRank.of(SHAPES, LAYERS, np.arange(160) if moving is None else moving, rank)


def gram_schmidt(matrix: np.ndarray) -> np.ndarray:
    """The paper's orthogonalisation."""
    found = matrix.copy()
    for i in range(found.shape[1]):
        for j in range(i):
            found[:, i] -= (found[:, j] @ found[:, i]) * found[:, j]
        found[:, i] /= np.linalg.norm(found[:, i])
    return found


def round_of(factors: LowRank, changes: list[np.ndarray], right: np.ndarray) -> tuple[np.ndarray, np.ndarray, list]:
    """(the mean change that comes out, the next right factors, what each site keeps)."""
    mean = np.mean([factors.left(change, right) for change in changes], axis=0)
    ends = sum(factors.lefts)
    left = factors.orthonormal(mean[:ends], factors.lefts)
    rights, rests = zip(*(factors.right(change, left) for change in changes), strict=True)
    second = np.mean(rights, axis=0)
    return factors.joined(left, second, mean[ends:]), factors.orthonormal(second, factors.rights), list(rests)


def test_layers_with_two_dimensions_travel_as_factors_and_others_as_they_are() -> None:
    factors = of(2)
    assert [(m.first, m.rows, m.columns) for m in factors.matrices] == [(0, 6, 10), (66, 9, 10)]
    assert factors.lefts == (12, 18) and factors.rights == (20, 20)
    assert factors.dense.tolist() == [*range(60, 66), *range(156, 160)]


def test_a_layer_that_factors_would_not_make_smaller_travels_as_it_is() -> None:
    assert of(4).matrices[0].rows == 9 and len(of(5).matrices) == 0


def test_a_layer_of_which_only_a_part_travels_is_dense_and_copies_are_found() -> None:
    factors = of(1, np.arange(3, 160))
    assert [m.first for m in factors.matrices] == [63] and len(factors.dense) == 157 - 90
    assert [m.first for m in of(1, np.arange(320)).matrices] == [0, 66, 160, 226]


def test_a_round_is_algorithm_1_by_hand() -> None:
    random, factors = np.random.default_rng(0), of(2)
    changes = [random.normal(0, 1, 160) for _ in range(3)]
    right = factors.begin(3)
    found, following, _ = round_of(factors, changes, right)
    start = 0
    for matrix, shape in zip(factors.matrices, [(6, 10), (9, 10)], strict=True):
        each = [change[matrix.where].reshape(shape) for change in changes]
        q = right[start : start + 20].reshape(10, 2)
        p = gram_schmidt(np.mean([m @ q for m in each], axis=0))
        q = np.mean([m.T @ p for m in each], axis=0)
        assert np.allclose(found[matrix.where].reshape(shape), p @ q.T)
        spanned = following[start : start + 20].reshape(10, 2)
        assert np.allclose(spanned @ spanned.T, gram_schmidt(q) @ gram_schmidt(q).T)
        start += 20
    assert np.allclose(found[factors.dense], np.mean(changes, axis=0)[factors.dense])


def test_with_warm_start_it_comes_to_the_truncated_svd() -> None:
    random, factors = np.random.default_rng(1), of(2)
    changes = [random.normal(0, 1, 160) for _ in range(4)]
    right = factors.begin(0)
    for _ in range(400):
        found, right, _ = round_of(factors, changes, right)
    for matrix in factors.matrices:
        u, s, v = np.linalg.svd(matrix.of(np.mean(changes, axis=0)))
        assert np.allclose(matrix.of(found), (u[:, :2] * s[:2]) @ v[:2], atol=1e-4)


def test_a_change_of_that_rank_comes_through_whole() -> None:
    random, factors = np.random.default_rng(2), of(2)
    change = random.normal(0, 1, 160)
    for matrix in factors.matrices:
        part = random.normal(0, 1, (matrix.rows, 2)) @ random.normal(0, 1, (2, matrix.columns))
        change[matrix.where] = part.reshape(-1)
    found, _, (rest,) = round_of(factors, [change], factors.begin(0))
    assert np.allclose(found, change) and np.allclose(rest, 0)


@given(rank=st.integers(1, 4), seed=st.integers(0, 99))
def test_what_is_sent_and_what_is_kept_are_the_whole(rank: int, seed: int) -> None:
    random, factors = np.random.default_rng(seed), of(rank)
    changes = [random.normal(0, 1, 160) for _ in range(3)]
    found, _, rests = round_of(factors, changes, factors.begin(seed))
    kept = np.mean(rests, axis=0)
    assert np.allclose(found + kept, np.mean(changes, axis=0))


@given(seed=st.integers(0, 99))
def test_factors_of_a_clipped_change_keep_to_the_declared_bound(seed: int) -> None:
    random, factors = np.random.default_rng(seed), of(2)
    change = np.clip(random.normal(0, 1, 160), -0.3, 0.3)
    right = factors.begin(seed)
    assert np.abs(factors.left(change, right)).max() <= 0.3 * factors.longest[0] * (1 + 1e-9)
    left = factors.orthonormal(factors.left(change, right)[: sum(factors.lefts)], factors.lefts)
    assert np.abs(factors.right(change, left)[0]).max() <= 0.3 * factors.longest[1] * (1 + 1e-9)


def test_directions_that_are_too_long_are_refused() -> None:
    factors = of(2)
    with pytest.raises(ProtocolError):
        factors.left(np.zeros(160), 1.01 * factors.begin(0))
    with pytest.raises(ProtocolError):
        factors.right(np.zeros(160), np.ones(sum(factors.lefts)))


def test_no_change_at_all_has_directions_too() -> None:
    factors = of(2)
    found, following, _ = round_of(factors, [np.zeros(160)], factors.begin(0))
    assert not found.any() and np.isfinite(following).all()
