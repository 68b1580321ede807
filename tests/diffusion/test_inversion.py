"""Inversion: the noise it finds must lead back to the image."""

from __future__ import annotations

import pytest
import torch
from oracle import MixtureDenoiser, process_of

from meddiff_steps.core.errors import UserError
from meddiff_steps.diffusion.inversion import invert
from meddiff_steps.diffusion.samplers import sample

EVERY = [
    ("epsilon", {}),
    ("v_prediction", {}),
    ("v_prediction", {"zero_terminal_snr": True}),
    ("v_prediction", {"schedule": "cosine"}),
    ("flow", {}),
]


def round_trip(prediction_type, settings, iterations, steps=None, guidance_scale=1.0, means=(-1.0, 1.0), n=100):
    """Root mean square error of image -> noise -> image for data from a mixture, and the noise."""
    process = process_of(prediction_type, **settings)
    oracle = MixtureDenoiser(process, std=0.25, means=means)
    generator = torch.Generator().manual_seed(0)
    covariates = torch.full((n, 1), 0.5)
    x0 = (
        0.25 * torch.randn(n, 1, 2, generator=generator)
        + 0.5
        + torch.tensor([means[0], means[-1]]).repeat(n // 2)[:, None, None]
    )
    noise = invert(oracle, x0, covariates, process, steps, guidance_scale, iterations)
    back = sample(oracle, noise, covariates, process, "flow" if process.is_flow else "ddim", steps, guidance_scale)
    return (back - x0).square().mean().sqrt().item(), noise


@pytest.mark.parametrize(("prediction_type", "settings"), EVERY)
def test_sampling_from_the_inverted_noise_returns_the_image(prediction_type, settings):
    error, noise = round_trip(prediction_type, settings, iterations=3)
    assert error < 0.015
    assert torch.isfinite(noise).all()


@pytest.mark.parametrize(("prediction_type", "settings"), EVERY)
def test_more_iterations_bring_the_image_closer(prediction_type, settings):
    errors = [round_trip(prediction_type, settings, iterations=i, steps=40)[0] for i in (1, 3, 8)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 2e-3


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_the_noise_of_gaussian_data_is_standard_normal(prediction_type):
    _, noise = round_trip(prediction_type, {}, iterations=3, steps=100, means=(0.0,), n=2000)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.05)
    assert noise.std().item() == pytest.approx(1.0, abs=0.08)


def test_guided_sampling_is_inverted_with_the_same_scale():
    assert round_trip("v_prediction", {}, iterations=8, guidance_scale=1.5, steps=100)[0] < 0.01


def test_progress_is_reported_from_clean_to_noisy():
    process, seen = process_of(), []
    x0 = torch.zeros(2, 1, 2)
    invert(MixtureDenoiser(process), x0, torch.zeros(2, 1), process, 4, on_step=lambda i, x: seen.append(i))
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("arguments", [{"num_inference_steps": 0}, {"iterations": 0}])
def test_no_steps_are_refused(arguments):
    process = process_of()
    with pytest.raises(UserError, match="at least 1"):
        invert(MixtureDenoiser(process), torch.zeros(2, 1, 2), torch.zeros(2, 1), process, **arguments)
