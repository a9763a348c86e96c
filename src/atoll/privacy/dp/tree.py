"""DP-FTRL: noise for running sums by tree aggregation, with no sampling and no shuffling to be trusted.

The release at step t is Σ_{s≤t} x_s plus the noise of the nodes of a binary tree whose leaves are steps and that
together cover 1 … t: at most ⌈log₂(t+1)⌉ of them, rather than t. A record in one step moves as many nodes, so T steps
cost one Gaussian of that sensitivity. *Honaker* estimates a node from its own noise and its children's, which is free.

What a site adds in round t is the *increment* N_t - N_{t-1}, so a sum over sites carries the tree too. Each round draws
its nodes from its own stream; the state in between is the complete subtrees' noise, at most ⌈log₂(t+1)⌉ arrays.
Which step a record is in must not depend on other records (a period, a keyed hash); each epoch is a tree of its own.

Source: Kairouz, McMahan, Song, Thakkar, Thakurta & Xu 2021, Practical and Private (Deep) Learning without Sampling or
Shuffling, Algorithm 1 and Appendix B (Honaker 2015, bottom-up).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from dp_accounting import DpEvent, GaussianDpEvent
from numpy.typing import NDArray

Reals = NDArray[np.float64]


def depth(steps: int) -> int:
    """Nodes that one step is in, and the most that a prefix needs: ⌈log₂(steps + 1)⌉."""
    return steps.bit_length()


def event(noise_multiplier: float, steps: int) -> DpEvent:
    """What a tree over *steps* costs where a record is in at most one; noise_multiplier: a node's σ/Δ₂.

    dp-accounting's tree event says the same, for the zero-out neighbours of the paper only; this is the
    Gaussian mechanism on all nodes at once, in which a record moves depth(steps) of them, each by Δ₂ at most.
    """
    return GaussianDpEvent(noise_multiplier / math.sqrt(depth(steps)))


def cover(steps: int) -> set[tuple[int, int]]:
    """The nodes, (height, number from the left), that together cover the first *steps* leaves."""
    nodes, start = set(), 0
    for height in reversed(range(steps.bit_length())):
        if steps >> height & 1:
            nodes.add((height, start >> height))
            start += 1 << height
    return nodes


@dataclass(slots=True)
class TreeNoise:
    """The noise of a running sum. heights, nodes: of the complete subtrees that cover the steps so far, left to
    right; to be saved between rounds."""

    honaker: bool = False
    heights: list[int] = field(default_factory=list)
    nodes: list[Reals] = field(default_factory=list)

    def total(self) -> Reals:
        """N_t, the noise of the prefix sum; 0 before the first step."""
        return np.sum(self.nodes, axis=0) if self.nodes else np.zeros(())

    def step(self, draw: Callable[[], Reals]) -> Reals:
        """One step more: N_t - N_{t-1}. draw: fresh Gaussian noise of one node, called 1 + (subtrees closed) times."""
        before = self.total()
        self.heights.append(0)
        self.nodes.append(draw())
        while len(self.heights) > 1 and self.heights[-1] == self.heights[-2]:
            height = self.heights.pop() + 1
            right, left, own = self.nodes.pop(), self.nodes.pop(), draw()
            weight = variance(height) if self.honaker else 1.0
            self.heights[-1] = height
            self.nodes.append(weight * own + (1 - weight) * (left + right))
        return self.total() - before


def variance(height: int) -> float:
    """Of a Honaker estimate at *height* above the leaves, in σ²: 1/(1 + 1/(2·variance below)) = 2^h/(2^(h+1) - 1).

    It is also the weight of the node's own noise, by inverse variance.
    """
    return 2.0**height / (2.0 ** (height + 1) - 1)
