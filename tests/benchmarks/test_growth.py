"""How growth is fitted and carried to the published scale."""

import math

import numpy as np
import pytest

from benchmarks import growth
from benchmarks.growth import Point, fit, sized, table
from meddiff_steps.config import parse_study
from meddiff_steps.operations.work import work

TARGET = Point(160 * 224 * 160, 100_000, 31_740)
POINTS = [Point(side**3, 8, 60) for side in (32, 48, 64, 96)] + [Point(16**3, n, 64) for n in (1_000, 3_000, 10_000)]


def seconds(point, voxels, subjects):
    return 1e-6 * point.voxels**voxels * point.subjects**subjects


def test_exponents_are_found_and_carried_to_another_size():
    counted = [seconds(point, 1.0, 1.0) for point in POINTS]
    found = fit(POINTS, [seconds(point, 1.2, 1.0) for point in POINTS], counted, TARGET)
    (voxels, _), (subjects, _) = found.exponents
    assert (voxels, subjects) == (pytest.approx(1.2), pytest.approx(1.0))
    low, ratio, high = found.ratio
    assert ratio == pytest.approx(TARGET.voxels**0.2) and low <= ratio <= high


def test_an_interval_holds_a_new_run_as_often_as_it_says():
    """95 % of times, of 600 fits of noisy seconds."""
    rng, held = np.random.default_rng(0), 0
    counted = [seconds(point, 1.0, 1.0) for point in POINTS]
    for _ in range(600):
        noisy = [value * math.exp(0.2 * rng.standard_normal()) for value in counted]
        low, _, high = fit(POINTS, noisy, counted, TARGET).ratio
        held += low <= math.exp(0.2 * rng.standard_normal()) <= high
    assert 0.93 < held / 600 < 0.97


def test_too_few_points_say_nothing():
    assert fit(POINTS[:3], [1.0] * 3, [1.0] * 3, TARGET) is None


@pytest.mark.parametrize("side", growth.SIDES)
def test_every_size_is_a_study_whose_stages_are_counted(side):
    subjects, sections = sized(side)
    content = growth.scale.STUDY | {"study": "scale", "plan": [{"name": "syn", "subjects": subjects}]} | sections
    study = parse_study(content, "growth")
    assert study.preprocess.shape == (side,) * 3
    assert {"latents", "generate", "filter", "images", "audit"} <= work(study, growth.SCANS).keys()


def test_a_line_per_stage_that_took_long_enough():
    def point(one, factor):
        stage = {"jobs": 1, "wall": 0.0, "memory_mb": 0.0, "counted": seconds(one, 1, 1)}
        slow = stage | {"cpu": growth.START_S + factor * seconds(one, 1, 1) * 1e3}
        return {
            "voxels": one.voxels,
            "subjects": one.subjects,
            "scans": one.scans,
            "seconds": 1.0,
            "stages": {"generate": slow, "plan": stage | {"cpu": 0.5}},
        }

    lines = table({"points": [point(one, 1.0) for one in POINTS]})
    assert len(lines) == 3 and lines[-1].startswith("| `generate` |")
