"""Merkle trees against the published vectors of Certificate Transparency."""

from __future__ import annotations

import hashlib

import pytest

from meddiff_steps.provenance.merkle import includes, inclusion_path, leaf_hash, node_hash, root

# google/certificate-transparency and transparency-dev/merkle, "testonly" reference data.
INPUTS = [
    bytes.fromhex(x)
    for x in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
LEAVES = [leaf_hash(x) for x in INPUTS]
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
PATHS = [
    (0, 1, []),
    (
        0,
        8,
        [
            "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
        ],
    ),
    (
        5,
        8,
        [
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ],
    ),
    (2, 3, ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"]),
    (
        1,
        5,
        [
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        ],
    ),
]


def by_definition(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, as it is written."""
    if len(leaves) <= 1:
        return leaves[0] if leaves else hashlib.sha256().digest()
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return node_hash(by_definition(leaves[:split]), by_definition(leaves[split:]))


def test_published_roots():
    assert root([]).hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert [root(LEAVES[: n + 1]).hex() for n in range(8)] == ROOTS


@pytest.mark.parametrize(("index", "size", "path"), PATHS)
def test_published_paths(index, size, path):
    assert [step.hex() for step in inclusion_path(LEAVES[:size], index)] == path
    assert includes(LEAVES[index], index, size, [bytes.fromhex(step) for step in path], bytes.fromhex(ROOTS[size - 1]))


def test_any_size_follows_the_definition_and_every_leaf_can_be_proven():
    leaves = [leaf_hash(str(i).encode()) for i in range(40)]
    for size in range(1, 41):
        top = root(leaves[:size])
        assert top == by_definition(leaves[:size])
        assert all(includes(leaves[i], i, size, inclusion_path(leaves[:size], i), top) for i in range(size))


def test_a_wrong_proof_is_refused():
    top, path = root(LEAVES), inclusion_path(LEAVES, 5)
    assert not includes(LEAVES[4], 5, 8, path, top)
    assert not includes(LEAVES[5], 4, 8, path, top)
    assert not includes(LEAVES[5], 5, 6, path, top)
    assert not includes(LEAVES[5], 8, 8, path, top)
    assert not includes(LEAVES[5], 5, 8, path[:-1], top)
    assert not includes(LEAVES[5], 5, 8, [*path, path[0]], top)
    assert not includes(LEAVES[5], 5, 8, path[::-1], top)
    with pytest.raises(IndexError):
        inclusion_path(LEAVES, 8)


def test_order_and_doubling_change_the_root_and_a_node_is_no_leaf():
    assert root(LEAVES[::-1]) != root(LEAVES)
    assert root([*LEAVES[:3], LEAVES[2]]) != root(LEAVES[:3])
    assert leaf_hash(LEAVES[0] + LEAVES[1]) != root(LEAVES[:2])
