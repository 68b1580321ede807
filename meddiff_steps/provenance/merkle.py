"""Merkle trees as in Certificate Transparency (RFC 6962, section 2.1).

Leaves and nodes are hashed with different prefixes, so that a node can never pass for a leaf, and an odd leaf is
carried up as it is rather than doubled, so that two different lists never share a root.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

#: Name of the scheme; it says every parameter that changes a root.
SCHEME = "rfc6962-sha256"


def leaf_hash(content: bytes) -> bytes:
    """SHA-256(0x00 | content)."""
    return hashlib.sha256(b"\x00" + content).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 | left | right)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def root(leaves: Iterable[bytes]) -> bytes:
    """Root of a tree over leaf hashes, in order; SHA-256 of nothing for no leaf.

    Works level by level: pairing from the left and carrying the odd one up gives the tree that RFC 6962 defines by
    splitting at the largest power of two.
    """
    level = list(leaves)
    if not level:
        return hashlib.sha256().digest()
    while len(level) > 1:
        level = _above(level)
    return level[0]


def _above(level: Sequence[bytes]) -> list[bytes]:
    paired = [node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
    return [*paired, level[-1]] if len(level) % 2 else paired


def inclusion_path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The hashes that lead from leaf `index` to the root, lowest first (RFC 6962, section 2.1.1).

    Raises
    ------
    IndexError
        There is no such leaf.
    """
    if not 0 <= index < len(leaves):
        raise IndexError(f"leaf {index} of {len(leaves)}")
    path, level = [], list(leaves)
    while len(level) > 1:
        if index ^ 1 < len(level):
            path.append(level[index ^ 1])
        level, index = _above(level), index // 2
    return path


def includes(leaf: bytes, index: int, size: int, path: Sequence[bytes], expected: bytes) -> bool:
    """Whether `path` leads from the leaf hash at `index` of `size` leaves to the root `expected` (RFC 9162, section
    2.1.3.2).
    """
    if not 0 <= index < size:
        return False
    node, last = leaf, size - 1
    for sibling in path:
        if last == 0:
            return False
        if index % 2 or index == last:
            node = node_hash(sibling, node)
            while not index % 2 and index:
                index, last = index // 2, last // 2
        else:
            node = node_hash(node, sibling)
        index, last = index // 2, last // 2
    return last == 0 and node == expected
