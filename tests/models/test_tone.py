"""The grey-level curve of generated images."""

import numpy as np
import pytest
import torch

from meddiff_steps.models.tone import LEVELS, ToneCurve, level_counts, level_distance


def fitted(decoded: torch.Tensor, scans: torch.Tensor) -> ToneCurve:
    tone = ToneCurve()
    tone.fit(level_counts(decoded), level_counts(scans))
    return tone


def scans_of(low: float, high: float, empty: float = 0.0) -> torch.Tensor:
    """Eight scans with values spread over low to high, and some exactly 0."""
    generator = torch.Generator().manual_seed(0)
    values = low + (high - low) * torch.rand(8, 1, 40, 40, 10, generator=generator).square()
    return torch.where(torch.rand(values.shape, generator=generator) < empty, 0.0, values)


def test_before_it_is_fitted_it_changes_nothing():
    images = scans_of(0.0, 1.0)
    assert torch.allclose(ToneCurve()(images), images, atol=1e-6)


@pytest.mark.parametrize(
    "distort", [torch.sqrt, lambda x: 0.1 + 0.8 * x, lambda x: x - 0.1 * torch.sin(2 * torch.pi * x)]
)
def test_a_monotone_distortion_is_undone(distort):
    scans = scans_of(0.0, 1.0)
    tone = fitted(distort(scans), scans)
    assert (tone(distort(scans)) - scans).abs().max() < 0.01
    assert (tone.values.diff() >= 0).all()


def test_as_many_voxels_become_zero_as_in_scans_and_unseen_levels_stay():
    scans = scans_of(0.5, 0.9, empty=0.4)
    haze = torch.rand(scans.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    tone = fitted(torch.where(scans == 0, haze, scans), scans)
    made = tone(torch.where(scans == 0, haze, scans))
    assert float((made == 0).float().mean()) == pytest.approx(0.4, abs=0.01)
    assert (made - scans).abs().max() < 0.03
    assert tone(torch.tensor([0.95, 1.0])) == pytest.approx([0.95, 1.0], abs=0.01)


def test_scans_without_empty_voxels_get_none():
    scans = scans_of(0.5, 1.0)
    noise = torch.randn(scans.shape, generator=torch.Generator().manual_seed(1)) * 0.02
    tone = fitted((scans + noise).clamp(0, 1), scans)
    assert (tone((scans + noise).clamp(0, 1)) > 0.45).all()
    high = LEVELS * 3 // 4
    assert tone.values[high:] == pytest.approx(np.linspace(high / LEVELS, 1, LEVELS - high + 1), abs=0.03)


def test_the_distance_of_grey_levels_is_how_far_they_are_moved():
    scans = scans_of(0.1, 0.5)
    assert level_distance(level_counts(scans), level_counts(scans)) == 0
    assert level_distance(level_counts(scans + 0.25), level_counts(scans)) == pytest.approx(0.25, abs=0.003)


def test_what_is_no_number_stays_none():
    images = torch.tensor([0.5, float("nan"), 1.0])
    assert torch.isnan(ToneCurve()(images)).tolist() == [False, True, False]
