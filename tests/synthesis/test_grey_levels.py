"""Grey levels of generated images: fitted where that helps, on images of training covariates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.synthesis.grey_levels import IMAGES, fit_tone

SHAPE = (1, 12, 12, 12)
SCANS = 80


def scan(age: float, rng: np.random.Generator) -> np.ndarray:
    """Black around, brighter inside for the old."""
    image = np.zeros(SHAPE, np.float32)
    image[:, 3:9, 3:9, 3:9] = (0.3 + age / 200) * (1 + 0.2 * rng.normal(size=(1, 6, 6, 6)))
    return image.clip(0, 1)


class Made:
    """Generates what is asked for, as `change` spoils it, in batches of any order."""

    def __init__(self, change: Any) -> None:
        self.change, self.asked = change, pd.DataFrame()

    def images(self, subjects: pd.DataFrame, label: str) -> Iterator[tuple[str, np.ndarray]]:
        self.asked = subjects
        for row in subjects.sample(frac=1, random_state=0).to_dict("records"):
            rng = np.random.default_rng(int(row["seed_key"], 16) % 2**32)
            yield row["sample_id"], self.change(scan(row["age"], rng), rng)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Shards, list[int]]:
    path: Path = tmp_path_factory.mktemp("scans") / "shard.arrow"
    rng = np.random.default_rng(0)
    ages = rng.uniform(20, 90, SCANS)
    with ShardWriter(path, {"image": TensorColumn("float16", SHAPE)}) as shard:
        for age in ages[::-1]:
            shard.append(image=scan(age, rng))
    return (
        pd.DataFrame({"scan_id": [f"s{i}" for i in range(SCANS)], "age": ages}),
        Shards([path]),
        [*range(SCANS)][::-1],
    )


def hazy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What sampling leaves: a haze where scans are black, and less contrast."""
    return (0.02 + 0.85 * image + 0.005 * rng.normal(size=SHAPE)).clip(0, 1).astype(np.float32)


def test_a_haze_goes_and_contrast_comes_back(cohort: Any) -> None:
    generator: Any = Made(hazy)
    curve, facts = fit_tone(generator, *cohort, "seed")
    assert facts["used"] and facts["images"] == IMAGES
    assert facts["distance_toned"] < 0.3 * facts["distance"]
    zeros = facts["zeros"]
    assert zeros["images"] < 0.01 and zeros["images_toned"] == pytest.approx(zeros["scans"], abs=0.02)
    truth = scan(50, np.random.default_rng(1))
    spoilt = hazy(truth, np.random.default_rng(2))
    toned = curve(torch.from_numpy(spoilt)).numpy()
    assert np.abs(toned - truth).mean() < 0.3 * np.abs(spoilt - truth).mean()


def test_where_nothing_is_to_be_gained_the_curve_is_the_identity(cohort: Any) -> None:
    """Grey levels of the halves differ by chance alone: what one half fits, the other does not gain by."""
    rng = np.random.default_rng(5)
    images: Any = Made(lambda image, _: (image * rng.choice([0.7, 1.3])).clip(0, 1))
    table, shards, rows = cohort
    curve, facts = fit_tone(images, table[:4], shards, rows[:4], "seed")
    assert facts["images"] == 4
    if not facts["used"]:
        assert torch.equal(curve(torch.linspace(0, 1, 9)), torch.linspace(0, 1, 9))
    assert facts["used"] == (facts["distance_toned"] < facts["distance"])


def test_images_are_asked_for_with_the_covariates_of_scans_and_keys_of_their_own(cohort: Any) -> None:
    table, shards, rows = cohort
    generator: Any = Made(hazy)
    fit_tone(generator, table, shards, rows, "seed")
    asked = generator.asked
    assert len(asked) == asked["sample_id"].nunique() == asked["seed_key"].nunique() == IMAGES
    assert set(asked["age"]) <= set(table["age"])
    assert list(asked["seed_key"]) == [seed_key("seed/tone", i, 0, "noise") for i in range(IMAGES)]
    again: Any = Made(hazy)
    fit_tone(again, table, shards, rows, "seed")
    pd.testing.assert_frame_equal(again.asked, asked)
    fit_tone(again, table, shards, rows, "another seed")
    assert set(again.asked["scan_id"]) != set(asked["scan_id"])


def test_one_scan_is_fitted_without_being_judged(cohort: Any) -> None:
    table, shards, rows = cohort
    generator: Any = Made(hazy)
    _, facts = fit_tone(generator, table[:1], shards, rows[:1], "seed")
    assert facts["images"] == 1 and facts["used"] and facts["distance"] == facts["distance_toned"] == 0.0
