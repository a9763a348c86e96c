"""Tree aggregation: which nodes cover a prefix, their variance, and what it costs."""

import math

import pytest
from dp_accounting import NeighboringRelation, SingleEpochTreeAggregationDpEvent
from dp_accounting.rdp import RdpAccountant

from atoll.privacy.dp import tree


def leaves(node: tuple[int, int]) -> range:
    height, place = node
    return range(place << height, (place + 1) << height)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 37, 64, 100])
def test_a_prefix_is_covered_by_the_ones_in_its_binary_number(steps):
    nodes = tree.cover(steps)
    assert len(nodes) == steps.bit_count()
    assert sorted(leaf for node in nodes for leaf in leaves(node)) == list(range(steps))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 100])
def test_a_record_is_in_at_most_depth_nodes(steps):
    used = set().union(*(tree.cover(step) for step in range(1, steps + 1)))
    inside = [sum(leaf in leaves(node) for node in used) for leaf in range(steps)]
    assert max(inside) == tree.depth(steps) == math.ceil(math.log2(steps + 1))


@pytest.mark.parametrize("steps", [1, 5, 64])
def test_the_cost_is_that_of_dp_accountings_tree(steps):
    theirs = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    theirs.compose(SingleEpochTreeAggregationDpEvent(3.0, steps), 4)
    ours = RdpAccountant().compose(tree.event(3.0, steps), 4)
    assert ours.get_epsilon(1e-6) == pytest.approx(theirs.get_epsilon(1e-6))


def test_before_the_first_step_there_is_no_noise():
    assert tree.cover(0) == set()
