"""How growth is fitted and carried to the published scale."""

import numpy as np
import pytest

from benchmarks import growth
from benchmarks.growth import fit, sized, table
from meddiff_steps.config import parse_study
from meddiff_steps.operations.work import work

#: Jobs and counted seconds of seven runs.
JOBS = np.array([1, 1, 1, 1, 1, 3, 10])
COUNTED = np.array([0.5, 2.0, 6.0, 20.0, 3.0, 9.0, 30.0])


def test_starting_and_the_ratio_are_found():
    found = fit(JOBS, COUNTED, 4.0 * JOBS + 1.7 * COUNTED)
    assert found.start == pytest.approx(4.0) and found.ratio == pytest.approx((1.7, 1.7, 1.7), abs=1e-6)
    assert found.exponent[0] == pytest.approx(1.0)


def test_what_grows_faster_than_it_is_counted_shows():
    found = fit(np.ones(7), COUNTED, 0.01 + COUNTED**1.5)
    assert found.exponent[0] > 1.3


def test_an_interval_holds_the_ratio_as_often_as_it_says():
    """95 % of times, of 600 fits of noisy seconds."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(600):
        low, _, high = fit(JOBS, COUNTED, (4.0 * JOBS + COUNTED) * np.exp(0.1 * rng.standard_normal(7))).ratio
        held += low <= 1.0 <= high
    assert 0.92 < held / 600 < 0.98


def test_a_stage_that_only_starts_has_no_exponent():
    found = fit(JOBS, COUNTED, 4.0 * JOBS + 0.01 * COUNTED)
    assert found.exponent is None and found.ratio[1] == pytest.approx(0.01)


def test_too_few_points_say_nothing():
    assert fit(JOBS[:3], COUNTED[:3], np.ones(3)) is None


@pytest.mark.parametrize("side", growth.SIDES)
def test_every_size_is_a_study_whose_stages_are_counted(side):
    subjects, sections = sized(side)
    content = growth.scale.STUDY | {"study": "scale", "plan": [{"name": "syn", "subjects": subjects}]} | sections
    study = parse_study(content, "growth")
    assert study.preprocess.shape == (side,) * 3
    assert {"latents", "generate", "filter", "images", "audit"} <= work(study, growth.SCANS).keys()


def test_a_line_per_stage_that_took_long_enough():
    def point(jobs, counted):
        stage = {"jobs": int(jobs), "wall": 0.0, "memory_mb": 0.0, "counted": float(counted)}
        slow, fast = stage | {"cpu": 4.0 * jobs + 2.0 * counted}, stage | {"cpu": 0.5 * jobs}
        return {"voxels": 1, "subjects": 1, "scans": 1, "seconds": 1.0, "stages": {"generate": slow, "plan": fast}}

    lines = table({"points": [point(*one) for one in zip(JOBS, COUNTED, strict=True)]})
    assert len(lines) == 3 and lines[-1].startswith("| `generate` | 4.0 | 1.00 ± 0.00 | 2.00 [2.00, 2.00] |")
