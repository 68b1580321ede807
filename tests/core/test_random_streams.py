"""The noise is part of the recipe: a change of its bits would make another cohort."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from meddiff_steps.core.random_streams import batch_noise, noise, seed_key


@pytest.mark.parametrize(
    ("arguments", "key", "first"),
    [
        (
            ("demo/cohort", 0, 0, "noise"),
            "e756ca04a452085899b10951f3c94df3",
            [-1.3665741682052612, 0.8508321642875671, -0.48886287212371826],
        ),
        (
            ("demo/cohort", 1, 0, "noise"),
            "4c727d243decfe8a5c415f49e3949699",
            [-0.010822335258126259, 0.23759311437606812, 0.3369477093219757],
        ),
        (
            ("demo/cohort", 0, 0, "steps/0"),
            "11c6087b3bedbf7b7c6da33af86597fa",
            [1.7039073705673218, 0.19408981502056122, 0.8595176339149475],
        ),
    ],
)
def test_golden_keys_and_numbers(arguments, key, first):
    assert seed_key(*arguments) == key
    assert noise(key, (4,))[:3].tolist() == first


def test_golden_latent():
    latent = noise("e756ca04a452085899b10951f3c94df3", (8, 8, 10, 8))
    assert latent.dtype == np.float32 and latent.shape == (8, 8, 10, 8)
    assert (
        hashlib.sha256(latent.tobytes()).hexdigest()
        == "a90e99efbb9289773225b720b92ca4b30d1d4d8c653e91d710477be861408f06"
    )


def test_key_is_the_documented_hash():
    text = "meddiff/seed/v1|seed with | and \u00fc/group|12|3|noise"
    assert seed_key("seed with | and \u00fc/group", 12, 3, "noise") == hashlib.sha256(text.encode()).digest()[:16].hex()


def test_every_field_changes_the_key():
    base = ("root/group", 7, 0, "noise")
    others = [
        ("root/groups", 7, 0, "noise"),
        ("root/group", 8, 0, "noise"),
        ("root/group", 7, 1, "noise"),
        ("root/group", 7, 0, "steps/0"),
    ]
    assert len({seed_key(*a) for a in [base, *others]}) == 5


def test_a_separator_in_the_root_cannot_imitate_other_fields():
    assert seed_key("a|1|0", 2, 0, "noise") != seed_key("a", 1, 0, "noise")
    with pytest.raises(ValueError, match="without '|'"):
        seed_key("a", 1, 0, "0|noise")


def test_keys_of_many_subjects_are_distinct():
    assert len({seed_key("root/group", i, 0, "noise") for i in range(50_000)}) == 50_000


def test_batch_rows_are_the_subjects_own_noise():
    keys = [seed_key("root/group", i, 0, "noise") for i in range(5)]
    batch = batch_noise(keys, (2, 3, 4))
    assert batch.shape == (5, 2, 3, 4) and batch.dtype == np.float32
    for row, key in zip(batch, keys, strict=True):
        np.testing.assert_array_equal(row, noise(key, (2, 3, 4)))


def test_noise_is_standard_normal_and_uncorrelated_between_subjects():
    batch = batch_noise([seed_key("root/group", i, 0, "noise") for i in range(20)], (20_000,))
    assert np.abs(batch.mean(1)).max() < 0.03 and np.abs(batch.std(1) - 1).max() < 0.03
    correlation = np.corrcoef(batch)
    assert np.abs(correlation - np.eye(20)).max() < 0.03


@pytest.mark.parametrize("arguments", [("r", -1, 0, "noise"), ("r", 0, -1, "noise"), ("r", 0, 0, "")])
def test_impossible_keys_are_refused(arguments):
    with pytest.raises(ValueError):
        seed_key(*arguments)


def test_a_short_key_is_refused():
    with pytest.raises(ValueError, match="32 hexadecimal"):
        noise("abc", (1,))
