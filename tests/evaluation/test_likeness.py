"""Who is compared with whom where subjects have several scans: a generator as good as reality is at its floors."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from meddiff_steps.config import Evaluate
from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation.diversity import variety
from meddiff_steps.evaluation.likeness import Kind, kinds_of, smallest
from meddiff_steps.evaluation.realism import frechet
from meddiff_steps.evaluation.realism.base import Draws, Sample, Scale
from meddiff_steps.evaluation.sampler_study import _Yardstick
from meddiff_steps.imaging.selection import Images, one_of_each

SCANS, FEATURES = 3, 8


def images(kind: str, subjects: int, scans: int) -> Images:
    """Without shards: of `scans` each, one subject after the other."""
    table = pd.DataFrame({"id": [f"{kind}-{i}-{j}" for i in range(subjects) for j in range(scans)]})
    table["subject"] = [f"{kind}-{i}" for i in range(subjects) for _ in range(scans)]
    table["split"], table["row"] = kind, range(len(table))
    return Images(None, table, "id", "subject", kind)  # type: ignore[arg-type]


def features(some: Images, rng: np.random.Generator) -> np.ndarray:
    """Of people whose scans are much alike."""
    people = np.unique(some.units, return_inverse=True)[1]
    return rng.normal(size=(people.max() + 1, FEATURES))[people] + 0.1 * rng.normal(size=(len(some), FEATURES))


def kinds(subjects: int, made: int, scans: int = SCANS) -> dict[str, Kind]:
    return kinds_of(
        images("syn", made, 1), images("train", subjects, scans), images("test", 40, scans), images("test", 0, 1), 500
    )


def test_training_stand_ins_are_of_nobody_two_and_as_many_as_synthetic_images() -> None:
    found = kinds(60, 90)
    assert {kind: len(some) for kind, some in found.items()} == {"synthetic": 60, "training": 60, "held_out": 120}
    assert len(set(found["training"].images.units)) == 60
    visits = [name.rsplit("-", 1)[1] for name in found["training"].images.ids]
    assert min(visits.count(visit) for visit in "012") >= 10, "not always the first visit"
    assert visits == [name.rsplit("-", 1)[1] for name in kinds(60, 90)["training"].images.ids]
    assert smallest(found) == 40


def test_a_cohort_of_one_scan_each_is_as_it_was() -> None:
    found, train = kinds(60, 40, scans=1), images("train", 60, 1)
    assert found["training"].images.ids == train.at_most(40).ids and train.one_of_each() is train
    assert one_of_each(train.units).tolist() == list(range(60))


def test_a_study_of_samplers_reads_no_more_images_than_its_floor_has() -> None:
    rng, some, real = philox("test", "samplers"), images("train", 30, 1), images("test", 40, SCANS)
    study: Any = SimpleNamespace(evaluate=Evaluate(bootstrap=100, realism_bootstrap=100, permutations=100), seed="s")
    space: Any = None
    yardstick = _Yardstick(space, features(some, rng), features(real, rng), some, real, study)
    made = images("syn", 50, 1)
    found = yardstick.read(features(made, rng), made.units)
    assert found["frechet"]["n"] == found["frechet"]["floor"]["n"] == found["precision"]["n"] == 30


@pytest.fixture(scope="module")
def perfect() -> list[dict[str, Any]]:
    """Figures of images of other people, and of training scans in their place, of ten cohorts."""
    found = []
    for cohort in range(10):
        rng, chosen = philox("test", f"longitudinal {cohort}"), kinds(60, 60)
        whole = {kind: features(images(kind, 60 if kind != "test" else 40, SCANS), rng) for kind in ("train", "test")}
        samples = {
            "synthetic": Sample(rng.normal(size=(60, FEATURES)), chosen["synthetic"].images.units),
            "training": Sample(whole["train"][chosen["training"].images.rows], chosen["training"].images.units),
        }
        held = Sample(whole["test"], chosen["held_out"].images.units)
        scale, draws = Scale.of(held.features, smallest(chosen)), Draws(20, 20, 20, "s", "synthetic")
        options: dict[str, Any] = {"neighbours": 5, "resamples": 20, "seed": "s", "label": "l"}
        found.append(
            {
                kind: {"frechet": frechet.figure(sample, held, scale, draws)}
                | variety(sample, held, float(2 * FEATURES), **options)
                for kind, sample in samples.items()
            }
        )
    return found


@pytest.mark.parametrize("name", ["frechet", "precision", "recall", "density", "coverage", "vendi"])
def test_a_generator_as_good_as_reality_is_at_its_floor(perfect: list[dict[str, Any]], name: str) -> None:
    figure, reference = (np.mean([one[kind][name]["value"] for one in perfect]) for kind in ("synthetic", "training"))
    assert figure == pytest.approx(reference, rel=0.12)


def test_balls_are_about_people_and_not_about_their_next_scans(perfect: list[dict[str, Any]]) -> None:
    for name in ("density", "coverage"):
        assert np.mean([one["synthetic"][name]["value"] for one in perfect]) == pytest.approx(1.0, abs=0.12)
