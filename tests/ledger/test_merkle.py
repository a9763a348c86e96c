"""Merkle trees against RFC 6962's own definition and the vectors of its reference implementation."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import IntegrityError
from atoll.ledger import merkle

# google/certificate-transparency: the inputs and the roots of their first 1 … 8
LEAVES = [bytes.fromhex(text) for text in [
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
]]  # fmt: skip
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def mth(leaves: list[bytes]) -> bytes:
    """RFC 6962 §2.1, word for word: the Merkle Tree Hash."""
    n = len(leaves)
    if n == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1 << (n - 1).bit_length() - 1  # the largest power of two smaller than n
    return hashlib.sha256(b"\x01" + mth(leaves[:k]) + mth(leaves[k:])).digest()


def audit_path(m: int, leaves: list[bytes]) -> list[bytes]:
    """RFC 6962 §2.1.1, word for word: the Merkle audit path of leaf m."""
    n = len(leaves)
    if n == 1:
        return []
    k = 1 << (n - 1).bit_length() - 1
    if m < k:
        return [*audit_path(m, leaves[:k]), mth(leaves[k:])]
    return [*audit_path(m - k, leaves[k:]), mth(leaves[:k])]


def numbered(size: int) -> list[bytes]:
    return [f"leaf {n}".encode() for n in range(size)]


@pytest.mark.parametrize("size", range(1, 9))
def test_published_roots(size: int) -> None:
    assert merkle.root(LEAVES[:size]).hex() == ROOTS[size - 1] == mth(LEAVES[:size]).hex()


@pytest.mark.parametrize("size", range(1, 41))
def test_every_root_and_path_is_the_rfcs(size: int) -> None:
    leaves = numbered(size)
    tree = merkle.levels(leaves)
    assert merkle.root(leaves) == tree[-1][0] == mth(leaves)
    for index, leaf in enumerate(leaves):
        steps = merkle.path(tree, index)
        assert [bytes.fromhex(sibling) for _, sibling in steps] == audit_path(index, leaves)
        merkle.verify_path(leaf, steps, tree[-1][0])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=200), st.data())
def test_any_leaves(leaves: list[bytes], data: st.DataObject) -> None:
    tree = merkle.levels(leaves)
    index = data.draw(st.integers(0, len(leaves) - 1))
    assert tree[-1][0] == mth(leaves)
    merkle.verify_path(leaves[index], merkle.path(tree, index), tree[-1][0])


def refused(leaf: bytes, steps: object, root: bytes) -> None:
    with pytest.raises(IntegrityError) as error:
        merkle.verify_path(leaf, steps, root)  # type: ignore[arg-type]
    assert error.value.code == "receipt.path"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 40])
def test_what_is_altered_is_refused(size: int) -> None:
    leaves = numbered(size)
    tree = merkle.levels(leaves)
    root = tree[-1][0]
    for index, leaf in enumerate(leaves):
        steps = merkle.path(tree, index)
        refused(leaf + b"x", steps, root)
        refused(leaf, steps, bytes(32))
        refused(leaf, steps, b"")
        refused(leaf, [*steps, ("left", "00" * 32)], root)
        if index + 1 < size:
            refused(leaves[index + 1], steps, root)
        for place, (side, sibling) in enumerate(steps):
            other = "right" if side == "left" else "left"
            flipped = f"{int(sibling, 16) ^ 1:064x}"
            for step in [(other, sibling), (side, flipped), (side, ""), (side, "zz"), (side, 5), (side, None)]:
                refused(leaf, [*steps[:place], step, *steps[place + 1 :]], root)
            refused(leaf, steps[:place] + steps[place + 1 :], root)
            refused(leaf, [(side,)], root)


def test_a_node_is_no_leaf() -> None:
    """Leaves and nodes are hashed apart, so that an inner node cannot be passed off as a leaf."""
    tree = merkle.levels(numbered(4))
    inner = b"".join(tree[0][:2])
    refused(inner, [("right", tree[1][1].hex())], tree[-1][0])
    assert merkle.root(numbered(3)) != merkle.root([*numbered(3), numbered(3)[-1]])


def test_no_leaves_have_no_tree() -> None:
    with pytest.raises(ValueError, match="at least one leaf"):
        merkle.levels([])
