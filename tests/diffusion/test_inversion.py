"""Inversion: the states it finds must lead back to the image."""

from __future__ import annotations

import pytest
import torch
from oracle import MixtureDenoiser, process_of, told

from meddiff_steps.core.errors import UserError
from meddiff_steps.diffusion.inversion import invert
from meddiff_steps.diffusion.sampling import levels_of, sample

EVERY = [
    ("epsilon", {}),
    ("v_prediction", {}),
    ("v_prediction", {"zero_terminal_snr": True}),
    ("v_prediction", {"schedule": "cosine"}),
    ("flow", {}),
]


def images(n=100, means=(-1.0, 1.0)):
    """Data from a mixture whose means are shifted by a covariate of 0.5."""
    generator = torch.Generator().manual_seed(0)
    centres = 0.5 + torch.tensor([means[0], means[-1]]).repeat(n // 2)[:, None, None]
    return 0.25 * torch.randn(n, 1, 2, generator=generator) + centres


def round_trip(
    prediction_type, settings, iterations, steps=None, guidance_scale=1.0, means=(-1.0, 1.0), n=100, until=None
):
    """Root mean square error of image -> state -> image for data from a mixture, and the inversion."""
    process = process_of(prediction_type, **settings)
    oracle, condition, x0 = MixtureDenoiser(process, 0.25, means), told(0.5, n), images(n, means)
    both = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    found = invert(oracle, x0, condition, process, iterations=iterations, until=until, **both)
    sampler = "flow" if process.is_flow else "ddim"
    back = sample(oracle, found.state, condition, process, sampler, start=found.timesteps[-1], **both)
    return (back - x0).square().mean().sqrt().item(), found


@pytest.mark.parametrize(("prediction_type", "settings"), EVERY)
def test_sampling_from_the_inverted_noise_returns_the_image(prediction_type, settings):
    error, found = round_trip(prediction_type, settings, iterations=3)
    assert error < 0.015
    assert torch.isfinite(found.state).all()


@pytest.mark.parametrize(("prediction_type", "settings"), EVERY)
@pytest.mark.parametrize("until", [600.0, 321.5])
def test_midway_is_as_good_a_place_to_turn_back(prediction_type, settings, until):
    error, found = round_trip(prediction_type, settings, iterations=3, until=until)
    assert found.timesteps[-1] == until
    assert error < 0.015
    assert round_trip(prediction_type, settings, iterations=8, until=until)[0] < 1e-3


@pytest.mark.parametrize(("prediction_type", "settings"), EVERY)
def test_more_iterations_bring_the_image_closer(prediction_type, settings):
    errors = [round_trip(prediction_type, settings, iterations=i, steps=40)[0] for i in (1, 3, 8)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 2e-3


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("until", [None, 700.0])
def test_the_trajectory_is_that_of_the_sampler_on_its_way_back(prediction_type, until):
    process = process_of(prediction_type)
    oracle, condition, x0, steps = MixtureDenoiser(process, 0.25, (-1.0, 1.0)), told(0.5, 40), images(40), 30
    sampler = "flow" if process.is_flow else "ddim"
    found = invert(oracle, x0, condition, process, num_inference_steps=steps, until=until, iterations=30)
    assert found.timesteps == levels_of(sampler, process, steps, start=until).timesteps[::-1]
    assert len(found.trajectory) == len(found.timesteps) and torch.equal(found.trajectory[-1], found.state)
    for i in range(len(found.timesteps) - 1, 0, -1):
        back = sample(
            oracle,
            found.state,
            condition,
            process,
            sampler,
            num_inference_steps=steps,
            start=found.timesteps[-1],
            stop=found.timesteps[i - 1],
        )
        torch.testing.assert_close(back, found.trajectory[i - 1], rtol=0, atol=1e-3)
        # Each state of the trajectory is as good a place to start from.
        if i % 10 == 0:
            options = {"num_inference_steps": steps, "start": found.timesteps[i]}
            back = sample(oracle, found.trajectory[i], condition, process, sampler, **options)
            torch.testing.assert_close(back, x0, rtol=0, atol=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_the_noise_of_gaussian_data_is_standard_normal(prediction_type):
    _, found = round_trip(prediction_type, {}, iterations=3, steps=100, means=(0.0,), n=2000)
    assert found.state.mean().item() == pytest.approx(0.0, abs=0.05)
    assert found.state.std().item() == pytest.approx(1.0, abs=0.08)


def test_the_inverted_noise_is_noise_to_sample_from():
    """Without `start`, as with drawn noise."""
    process = process_of()
    oracle, condition, x0 = MixtureDenoiser(process, 0.25, (-1.0, 1.0)), told(0.5, 20), images(20)
    state = invert(oracle, x0, condition, process, iterations=8).state
    torch.testing.assert_close(sample(oracle, state, condition, process, "ddim"), x0, rtol=0, atol=5e-3)


def test_a_subject_is_turned_into_what_it_would_be():
    """Inverted as it is, sampled with another covariate: the mean moves, the place within the distribution stays."""
    process = process_of()
    oracle, condition = MixtureDenoiser(process, 0.25), told(0.5, 60)
    x0 = images(60, (0.0,))
    found = invert(oracle, x0, condition, process, iterations=8)
    moved = sample(oracle, found.state, condition.moved(0, 1.5), process, "ddim", start=found.timesteps[-1])
    torch.testing.assert_close(moved - x0, torch.ones_like(x0), rtol=0, atol=0.02)


def test_guided_sampling_is_inverted_with_the_same_scale():
    assert round_trip("v_prediction", {}, iterations=8, guidance_scale=1.5, steps=100)[0] < 0.01


def test_progress_is_reported_from_clean_to_noisy():
    process, seen = process_of(), []
    x0 = torch.zeros(2, 1, 2)
    invert(
        MixtureDenoiser(process),
        x0,
        told(0.0, 2),
        process,
        num_inference_steps=4,
        on_step=lambda i, x: seen.append((i, x.shape)),
    )
    assert seen == [(i, x0.shape) for i in range(4)]


@pytest.mark.parametrize("arguments", [{"num_inference_steps": 0}, {"iterations": 0}])
def test_no_steps_are_refused(arguments):
    process = process_of()
    with pytest.raises(UserError, match="at least 1"):
        invert(MixtureDenoiser(process), torch.zeros(2, 1, 2), told(0.0, 2), process, **arguments)


def test_what_does_not_fit_is_refused():
    process = process_of()
    with pytest.raises(ValueError, match="condition: 3 rows, but x0 has 2"):
        invert(MixtureDenoiser(process), torch.zeros(2, 1, 2), told(0.0, 3), process)
    with pytest.raises(UserError, match="expected a timestep from 0 up to 999"):
        invert(MixtureDenoiser(process), torch.zeros(2, 1, 2), told(0.0, 2), process, until=1000.0)
