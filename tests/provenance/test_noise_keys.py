"""No two subjects share noise, and why the keys are made as they are.

Beside the keys in use stand the two ways that are common elsewhere: seed + index, and a hash into torch's generator.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from meddiff_steps.core.random_streams import noise, seed_key

MILLION = 1_000_000


def first_word_collisions(seeds: np.ndarray) -> int:
    """Subjects whose torch CPU stream equals an earlier one: its Mersenne Twister is seeded with 32 bits."""
    return len(seeds) - len(np.unique(seeds.astype(np.uint64) & np.uint64(0xFFFFFFFF)))


def test_a_million_keys_are_distinct_also_across_groups_attempts_and_cohorts():
    quarter = MILLION // 4
    keys = {seed_key("meddiff/syn", i, 0, "noise") for i in range(quarter)}
    keys |= {seed_key("meddiff/syn", i, 1, "noise") for i in range(quarter)}
    keys |= {seed_key("meddiff/old", i, 0, "noise") for i in range(quarter)}
    keys |= {seed_key("meddiff2/syn", i, 0, "noise") for i in range(quarter)}
    assert len(keys) == MILLION


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_streams_begin_differently():
    """Two float32 numbers would collide by chance (2^48 pairs among 10^12); four do not."""
    # One generator whose state is set draws the same numbers as a new one per subject, five times as fast.
    philox = np.random.Philox(key=0)
    generator, state = np.random.Generator(philox), philox.state
    first = np.empty((MILLION, 4), np.float32)
    for i in range(MILLION):
        key = seed_key("meddiff/syn", i, 0, "noise")
        state["state"]["key"][:] = int(key[16:], 16), int(key[:16], 16)
        philox.state = state
        generator.standard_normal(4, np.float32, out=first[i])
        if i < 100:
            assert np.array_equal(first[i], noise(key, (4,)))
    assert len(np.unique(first.view("V16"))) == MILLION


def test_ten_thousand_streams_begin_differently():
    first = np.stack([noise(seed_key("meddiff/syn", i, 0, "noise"), (4,)) for i in range(10_000)])
    assert len(np.unique(first.view("V16"))) == len(first)


def test_torch_keeps_32_bits_of_a_seed():
    def stream(seed: int) -> list[float]:
        return torch.randn(8, generator=torch.Generator().manual_seed(seed)).tolist()

    assert stream(5) == stream(5 + 2**32) != stream(6)


def test_the_old_way_collides_a_hash_into_torch():
    """The birthday bound for 32 bits: 1.2 % at 10,000, 69 % at 100,000, about 116 pairs at a million."""
    seeds = np.array(
        [int.from_bytes(hashlib.sha256(f"cohort|{i}".encode()).digest()[:8], "little") >> 1 for i in range(MILLION)],
        dtype=np.uint64,
    )
    assert len(np.unique(seeds)) == MILLION, "63 bits would be enough"
    expected = MILLION**2 / 2 / 2**32
    assert abs(first_word_collisions(seeds) - expected) < 5 * expected**0.5


def test_the_old_way_collides_a_pair_of_twins():
    seeds = [int.from_bytes(hashlib.sha256(f"cohort|{i}".encode()).digest()[:8], "little") >> 1 for i in range(200_000)]
    seen: dict[int, int] = {}
    twins = next((seen[s & 0xFFFFFFFF], i) for i, s in enumerate(seeds) if seen.setdefault(s & 0xFFFFFFFF, i) != i)
    first, second = (torch.randn(16, generator=torch.Generator().manual_seed(seeds[i])) for i in twins)
    assert twins[0] != twins[1] and torch.equal(first, second)


def test_the_old_way_collides_seed_plus_index():
    """Two cohorts with neighbouring seeds share all but one of their subjects, and attempts overlap with subjects."""
    first, second = ({seed + i for i in range(10_000)} for seed in (1234, 1235))
    assert len(first & second) == 9_999
    keys = [{seed_key(f"{seed}/syn", i, 0, "noise") for i in range(10_000)} for seed in (1234, 1235)]
    assert not keys[0] & keys[1]
    subjects, attempts = {1234 + i + 1000 * 0 for i in range(5000)}, {1234 + i + 1000 * 1 for i in range(5000)}
    assert len(subjects & attempts) == 4000
    again = {seed_key("1234/syn", i, 1, "noise") for i in range(5000)}
    assert not keys[0] & again
