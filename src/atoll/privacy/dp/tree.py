"""DP-FTRL: noise for running sums by tree aggregation, with no sampling and no shuffling to be trusted.

The release at step t is Σ_{s≤t} x_s plus the noise of the nodes of a binary tree whose leaves are steps and that
together cover 1 … t: at most ⌈log₂(t+1)⌉ of them, rather than t. A record in one step moves as many nodes, so T steps
cost one Gaussian of that sensitivity.

What a site adds in round t is the *increment* N_t - N_{t-1}, so a sum over sites carries the tree too. A node's noise
comes from a stream of its own, so that nothing is kept between rounds (see ``release``). Which step a record is in must
not depend on other records (a period, a coin of its own); each epoch is a tree of its own.

Source: Kairouz, McMahan, Song, Thakkar, Thakurta & Xu 2021, Practical and Private (Deep) Learning without Sampling or
Shuffling, Algorithm 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dp_accounting import DpEvent


def depth(steps: int) -> int:
    """Nodes that one step is in, and the most that a prefix needs: ⌈log₂(steps + 1)⌉."""
    return steps.bit_length()


def event(noise_multiplier: float, steps: int) -> DpEvent:
    """What a tree over *steps* costs where a record is in at most one; noise_multiplier: a node's σ/Δ₂.

    dp-accounting's tree event says the same, for the zero-out neighbours of the paper only; this is the
    Gaussian mechanism on all nodes at once, in which a record moves depth(steps) of them, each by Δ₂ at most.
    """
    from dp_accounting import GaussianDpEvent

    return GaussianDpEvent(noise_multiplier / math.sqrt(depth(steps)))


def cover(steps: int) -> set[tuple[int, int]]:
    """The nodes, (height, number from the left), that together cover the first *steps* leaves."""
    nodes, start = set(), 0
    for height in reversed(range(steps.bit_length())):
        if steps >> height & 1:
            nodes.add((height, start >> height))
            start += 1 << height
    return nodes
