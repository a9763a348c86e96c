"""Tree aggregation: which nodes cover a prefix, their variance, and what it costs."""

import math

import numpy as np
import pytest
from dp_accounting import NeighboringRelation, SingleEpochTreeAggregationDpEvent
from dp_accounting.rdp import RdpAccountant

from atoll.privacy.dp import gaussian, tree
from atoll.privacy.dp.tree import TreeNoise


def units(tree_noise: TreeNoise, steps: int) -> np.ndarray:
    """Prefix noises as combinations of the nodes' own noises: the i-th draw is the i-th unit vector. [steps, draws]"""
    draws = iter(np.eye(2 * steps))
    totals = []
    for _ in range(steps):
        tree_noise.step(lambda: next(draws))
        totals.append(tree_noise.total())
    return np.array(totals)


def test_a_prefix_is_covered_by_the_ones_in_its_binary_number():
    totals = units(TreeNoise(), 64)
    assert set(np.unique(totals)) == {0.0, 1.0}
    assert [int(row.sum()) for row in totals] == [t.bit_count() for t in range(1, 65)]


@pytest.mark.parametrize("honaker", [False, True])
def test_increments_add_up_to_the_prefix_noise(shake, honaker):
    noise, stream, total = TreeNoise(honaker), shake(1), np.zeros(5)
    for _ in range(37):
        total = total + noise.step(lambda: gaussian.sample(5, 1.0, stream))
        assert np.allclose(total, noise.total())
    assert len(noise.nodes) == (37).bit_count()


def test_honaker_is_the_best_linear_estimate_and_never_worse():
    plain, better = ((units(TreeNoise(kind), 64) ** 2).sum(1) for kind in (False, True))
    assert (better <= plain + 1e-12).all()
    for height in range(7):
        assert better[2**height - 1] == pytest.approx(tree.variance(height))
    assert tree.variance(1) == pytest.approx(1 / (1 + 1 / 2))


def test_honaker_weighs_unbiased():
    """A node's estimate keeps what it estimates: own noise and children's with weights that sum to one by level."""
    totals = units(TreeNoise(honaker=True), 2)
    assert sorted(totals[1][totals[1] > 0]) == pytest.approx([1 / 3, 1 / 3, 2 / 3])


def test_state_can_be_saved_between_rounds(shake):
    whole, stream = TreeNoise(True), shake(3)
    parts, again = TreeNoise(True), shake(3)
    for _ in range(11):
        expected = whole.step(lambda: gaussian.sample(4, 1.0, stream))
        parts = TreeNoise(True, list(parts.heights), [node.copy() for node in parts.nodes])
        assert (parts.step(lambda: gaussian.sample(4, 1.0, again)) == expected).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 100])
def test_a_record_is_in_at_most_depth_nodes(steps):
    inside: dict[int, int] = dict.fromkeys(range(steps), 0)
    stack: list[tuple[int, list[int]]] = []
    for step in range(steps):
        stack.append((0, [step]))
        inside[step] += 1
        while len(stack) > 1 and stack[-1][0] == stack[-2][0]:
            (height, right), (_, left) = stack.pop(), stack.pop()
            stack.append((height + 1, left + right))
            for leaf in left + right:
                inside[leaf] += 1
    assert max(inside.values()) == tree.depth(steps) == math.ceil(math.log2(steps + 1))


@pytest.mark.parametrize("steps", [1, 5, 64])
def test_the_cost_is_that_of_dp_accountings_tree(steps):
    theirs = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    theirs.compose(SingleEpochTreeAggregationDpEvent(3.0, steps), 4)
    ours = RdpAccountant().compose(tree.event(3.0, steps), 4)
    assert ours.get_epsilon(1e-6) == pytest.approx(theirs.get_epsilon(1e-6))


def test_before_the_first_step_there_is_no_noise():
    assert TreeNoise().total() == 0
