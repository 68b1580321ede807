"""Label maps as signed distances, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.signed_distances import (
    LIMIT,
    channels,
    from_distances,
    renumbered,
    structures_of,
    to_distances,
)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_a_label_map_comes_back_exactly_also_through_half_precision(structures, seed):
    """Whatever it shows: noise, where every surface is one voxel from another, and nothing at all."""
    draw = np.random.default_rng(seed)
    for labels in (
        draw.integers(0, structures + 1, (6, 7, 5)).astype(np.uint8),
        np.zeros((4, 4), np.uint8),
        np.full((4, 4), structures, np.uint8),
    ):
        distances = to_distances(labels, structures)
        assert distances.shape == (channels(structures), *labels.shape) and distances.dtype == np.float32
        assert distances.min() >= 0 and distances.max() <= 1
        assert np.array_equal(from_distances(distances.astype(np.float16)), labels)


def test_distances_are_those_to_the_surface_in_voxels():
    labels = np.zeros((1, 20), np.uint8)
    labels[0, 10:] = 1
    distances = (to_distances(labels, 1)[0, 0] - 0.5) * 2 * LIMIT
    assert np.allclose(distances[8:12], [-1.5, -0.5, 0.5, 1.5])
    assert distances[0] == -LIMIT and distances[-1] == LIMIT


def test_structures_that_touch_do_not_come_apart_where_both_distances_are_a_little_short():
    labels = np.ones((3, 12), np.uint8)
    labels[:, 6:] = 2
    distances = to_distances(labels, 2)
    distances[1:] -= 0.1  # neither structure reaches its surface any more
    assert np.array_equal(from_distances(distances), labels)


def test_channels_and_structures_are_each_others_inverse():
    assert [structures_of(channels(n)) for n in range(1, 9)] == list(range(1, 9)) and channels(1) == 1


def test_labels_are_numbered_anew_in_the_order_of_the_structures():
    labels = np.array([[0, 7, 3], [9, 3, 12]])
    found = renumbered(labels, {"a": [3], "b": [7, 12]}, [9], "scan")
    assert found.tolist() == [[0, 2, 1], [0, 1, 2]] and found.dtype == np.uint8


def test_a_label_that_is_named_nowhere_is_told_with_its_scan():
    with pytest.raises(UserError, match=r"sub-01: label 5 in 2 voxels.*labels there: \[3, 9\].*pairs.outside"):
        renumbered(np.array([5, 5, 3, 0]), {"a": [3]}, [9], "sub-01")
