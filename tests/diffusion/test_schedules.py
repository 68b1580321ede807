"""The forward process against diffusers, and its own identities."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from oracle import process_of
from scipy.stats import norm

from meddiff_steps.diffusion.schedules import NoiseProcess

NAMES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
EVERY = [(p, s) for p in ("epsilon", "v_prediction") for s in NAMES] + [("flow", "scaled_linear")]


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_tables_are_those_of_diffusers_in_double_precision(schedule, zero_snr):
    process = process_of(schedule=schedule, zero_terminal_snr=zero_snr)
    theirs = DPMSolverMultistepScheduler(
        beta_schedule=NAMES[schedule], beta_start=0.0015, beta_end=0.0205, rescale_betas_zero_snr=zero_snr
    ).alphas_cumprod
    # diffusers keeps float32 tables: its rounding is what is allowed for here.
    np.testing.assert_allclose(process.alphas_cumprod, theirs.double().numpy(), rtol=3e-5, atol=3e-7)
    if zero_snr:
        assert process.alphas_cumprod[-1] < 1e-8
    assert process.alphas_cumprod.dtype == np.float64
    assert (np.diff(process.alphas_cumprod) < 0).all() and (process.alphas_cumprod > 0).all()


@pytest.mark.parametrize("schedule", NAMES)
def test_amplitudes_at_integers_are_the_table_exactly(schedule):
    process = process_of(schedule=schedule)
    alpha, sigma = process.alpha_sigma(torch.arange(1000))
    np.testing.assert_allclose(alpha.numpy() ** 2, process.alphas_cumprod, rtol=1e-12)
    np.testing.assert_allclose(alpha.numpy() ** 2 + sigma.numpy() ** 2, 1.0, rtol=1e-14)


@pytest.mark.parametrize(("prediction_type", "schedule"), EVERY)
def test_fractional_timesteps_are_between_their_neighbours_and_invertible(prediction_type, schedule):
    process = process_of(prediction_type, schedule=schedule)
    timesteps = torch.tensor([0.5, 0.25, 17.125, 998.9], dtype=torch.float64)
    alpha, sigma = process.alpha_sigma(timesteps)
    below, above = (process.alpha_sigma(t) for t in (timesteps.floor(), timesteps.ceil()))
    assert ((above[0] < alpha) & (alpha < below[0]) & (below[1] < sigma) & (sigma < above[1])).all()
    back = [process.timestep_at(float(s if process.is_flow else s / a)) for a, s in zip(alpha, sigma, strict=True)]
    np.testing.assert_allclose(back, timesteps.numpy(), rtol=1e-9)


def test_interpolation_is_linear_in_log_snr_as_in_diffusers():
    process = process_of()
    scheduler = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0205)
    ratios = ((1 - process.alphas_cumprod) / process.alphas_cumprod) ** 0.5
    for ratio in (0.05, 0.7, 30.0):
        assert process.timestep_at(ratio) == pytest.approx(
            float(scheduler._sigma_to_t(np.array(ratio), np.log(ratios))), rel=1e-9
        )


@pytest.mark.parametrize(("prediction_type", "schedule"), EVERY)
def test_a_perfect_prediction_gives_back_image_and_noise(prediction_type, schedule):
    process = process_of(prediction_type, schedule=schedule)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(6, 2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    timesteps = torch.tensor([1.0, 3.5, 250.0, 500.25, 900.0, 990.0])
    x = process.add_noise(x0, noise, timesteps)
    prediction = process.target(x0, noise, timesteps)
    torch.testing.assert_close(process.to_x0(prediction, x, timesteps), x0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(process.to_noise(prediction, x, timesteps), noise, rtol=1e-8, atol=1e-8)
    velocity = process_of("flow" if process.is_flow else "v_prediction", schedule=schedule).target(x0, noise, timesteps)
    torch.testing.assert_close(process.to_velocity(prediction, x, timesteps), velocity, rtol=1e-8, atol=1e-8)


def test_noising_and_target_agree_with_diffusers():
    process = process_of("v_prediction")
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0205)
    x0, noise = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(
        process.add_noise(x0, noise, timesteps), scheduler.add_noise(x0, noise, timesteps), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        process.target(x0, noise, timesteps), scheduler.get_velocity(x0, noise, timesteps), rtol=1e-4, atol=1e-5
    )
    flow = process_of("flow")
    scheduler = FlowMatchEulerDiscreteScheduler()
    timesteps = torch.tensor([1.0, 250.0, 1000.0])
    torch.testing.assert_close(
        flow.add_noise(x0[:3], noise[:3], timesteps), scheduler.scale_noise(x0[:3], timesteps, noise[:3])
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents_neither_lose_precision_nor_change_the_tables(dtype):
    process = process_of()
    before = process.alpha_sigma(torch.arange(1000))[1].clone()
    x0, noise = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    timesteps = torch.tensor([0, 1, 999])
    x = process.add_noise(x0, noise, timesteps)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, process.add_noise(x0.float(), noise.float(), timesteps), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(process.alpha_sigma(torch.arange(1000))[1], before, rtol=0, atol=0)
    with pytest.raises(ValueError):
        process.alphas_cumprod[0] = 0.5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_levels_that_are_trained_on_are_normal_and_end_where_the_process_does(prediction_type):
    process, uniform = process_of(prediction_type), (np.arange(10_000) + 0.5) / 10_000
    timesteps = process.training_timesteps(uniform, -0.6, 1.2)
    assert timesteps.dtype == np.float32 and (np.diff(timesteps) >= 0).all()
    alpha, sigma = process.alpha_sigma(torch.from_numpy(timesteps))
    level = (sigma.log() - alpha.log()).numpy()
    middle = slice(500, 9_500)  # the ends are cut off
    np.testing.assert_allclose(level[middle], norm.ppf(uniform[middle], -0.6, 1.2), atol=2e-3)
    ends = process.training_timesteps(np.array([0.0, 1.0 - 2**-53]), 0.0, 100.0)
    assert list(ends) == pytest.approx([0.0, process.last_timestep], abs=1e-6)
    process.alpha_sigma(torch.from_numpy(ends))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow"])
def test_a_timestep_is_found_again_by_its_level(prediction_type):
    process, timesteps = process_of(prediction_type), torch.tensor([3.0, 250.5, 640.25, 998.0])
    alpha, sigma = process.alpha_sigma(timesteps)
    np.testing.assert_allclose(process.timesteps_at((sigma / alpha).log().numpy()), timesteps, rtol=1e-5)


@pytest.mark.parametrize("timestep", [-1.0, 1000.0, float("nan")])
def test_a_timestep_outside_the_process_is_refused(timestep):
    with pytest.raises(ValueError, match=r"must be in \[0, 999\]"):
        process_of().alpha_sigma(torch.tensor([5.0, timestep]))


def test_a_process_is_made_from_a_study_or_from_anything_like_it():
    from meddiff_steps.config import Diffusion

    for prediction_type in ("epsilon", "v_prediction"):
        study = NoiseProcess.of(Diffusion(prediction_type=prediction_type))
        np.testing.assert_array_equal(study.alphas_cumprod, process_of(prediction_type).alphas_cumprod)
    flow = NoiseProcess.of(SimpleNamespace(prediction_type="flow", num_train_timesteps=100))
    assert flow.is_flow and flow.last_timestep == 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction_type": "sample"}, "expected one of epsilon, v_prediction, flow, found 'sample'"),
        ({"schedule": "sigmoid"}, "expected one of scaled_linear, linear, cosine, found 'sigmoid'"),
    ],
)
def test_an_unknown_process_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        process_of(**settings)
