"""Merkle trees as in RFC 6962 §2.1 (certificate transparency): one signature for many leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from atoll.contract.errors import IntegrityError


def _leaf(data: bytes) -> bytes:
    return hashlib.sha256(b"\0" + data).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def levels(leaves: Sequence[bytes]) -> list[list[bytes]]:
    """All levels of the tree, leaf hashes first; an odd last node moves up unchanged.

    Equal to RFC 6962's recursive definition. Raises ValueError for no leaves.
    """
    if not leaves:
        raise ValueError("a Merkle tree needs at least one leaf")
    tree = [[_leaf(leaf) for leaf in leaves]]
    while len(tree[-1]) > 1:
        row = tree[-1]
        above = [_node(row[i], row[i + 1]) for i in range(0, len(row) - 1, 2)]
        tree.append(above + ([row[-1]] if len(row) % 2 else []))
    return tree


def root(leaves: Sequence[bytes]) -> bytes:
    """The tree's root, 32 bytes."""
    return levels(leaves)[-1][0]


def path(tree: list[list[bytes]], index: int) -> list[tuple[str, str]]:
    """The audit path of leaf *index*: ("left"|"right", hex of the sibling), leaf upwards."""
    steps = []
    for row in tree[:-1]:
        sibling = index ^ 1
        if sibling < len(row):
            steps.append(("left" if sibling < index else "right", row[sibling].hex()))
        index //= 2
    return steps


def verify_path(leaf: bytes, steps: Sequence[tuple[str, str]], expected_root: bytes) -> None:
    """Raise IntegrityError unless *leaf* with its path leads to *expected_root*."""
    node = _leaf(leaf)
    try:
        for side, sibling in steps:
            other = bytes.fromhex(sibling)
            node = _node(other, node) if side == "left" else _node(node, other)
    except (ValueError, TypeError):
        node = b""
    if node != expected_root:
        raise IntegrityError("receipt.path", "a receipt does not lead to its signed root", field="path")
