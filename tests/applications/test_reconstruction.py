"""Reconstruction with a model of independent Gaussian voxels, where the image given a measurement is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_inpainting import SHAPE, STD, SUBJECT, Exact, scan

from meddiff_steps.applications.reconstruction import (
    LEAST_VARIANCE,
    WEIGHTS,
    Measurement,
    Reconstructor,
    best_weight,
    first_stage_variance,
    without_a_model,
)
from meddiff_steps.config import Reconstruction
from meddiff_steps.imaging.operators.base import build
from meddiff_steps.imaging.operators.denoising import Denoising

MEAN = 0.5  # of a voxel of SUBJECT's population


def measured(name: str = "denoising", strength: float = 0.1, image: np.ndarray | None = None) -> Measurement:
    settings = Reconstruction(operators=[name], coils=2, calibration_share=0.4, blur_mm=3)
    generator = np.random.default_rng(1)
    operator = build(name, strength, settings, SHAPE, (2.0, 2.0, 2.0), generator)
    return Measurement(*operator.measure(torch.from_numpy(scan() if image is None else image)[None], generator))


def maker(**changes: Any) -> Reconstructor:
    settings = Reconstruction(operators=["denoising"], num_inference_steps=60, prior_std=STD, **changes)
    return Reconstructor(Exact(), settings, torch.full(SHAPE, LEAST_VARIANCE))


def test_moments_draw_from_the_known_posterior() -> None:
    measurement = measured(strength=0.1)
    draws, mean = maker(samples=30, iterations=8).reconstruct("moments", measurement, SUBJECT, "x")
    gain = STD**2 / (STD**2 + 0.1**2)
    truth = MEAN + gain * (measurement.values[0].numpy() - MEAN)
    assert np.abs(draws.mean(0) - truth).mean() < 0.02
    assert np.abs(mean - truth).mean() < 0.02
    assert draws.std(axis=0).mean() == pytest.approx((STD**2 * (1 - gain)) ** 0.5, rel=0.1)


def test_consistency_draws_from_it_where_latents_are_independent() -> None:
    measurement = measured(strength=0.1)
    draws, mean = maker(samples=30).reconstruct("consistency", measurement, SUBJECT, "x")
    truth = MEAN + 0.5 * (measurement.values[0].numpy() - MEAN)
    assert np.abs(mean - truth).mean() < 0.02 and np.abs(draws.mean(0) - truth).mean() < 0.02
    assert draws.std(axis=0).mean() == pytest.approx((STD**2 / 2) ** 0.5, rel=0.1)


@pytest.mark.parametrize("method", ["projection", "posterior"])
def test_other_ways_go_towards_it(method: str) -> None:
    """As far as a weak measurement lets them: nearer than the prior's mean is."""
    measurement = measured(strength=0.03)
    _, mean = maker(samples=8, posterior_scale=200.0).reconstruct(method, measurement, SUBJECT, "x")
    truth = MEAN + STD**2 / (STD**2 + 0.03**2) * (measurement.values[0].numpy() - MEAN)
    assert np.abs(mean - truth).mean() < 0.6 * np.abs(MEAN - truth).mean()


@pytest.mark.parametrize(
    ("name", "strength", "limit"), [("mri", 2.0, 0.7), ("super_resolution", 2, 0.7), ("low_count", 2000.0, 0.9)]
)
def test_what_was_measured_is_in_what_is_made(name: str, strength: float, limit: float) -> None:
    measurement = measured(name, strength)
    _, mean = maker(samples=12, iterations=8).reconstruct("consistency", measurement, SUBJECT, "x")
    truth = scan()
    assert np.square(mean - truth).mean() < limit * np.square(MEAN - truth).mean()


def test_the_last_step_is_the_posterior_of_gaussians() -> None:
    """A mean and draws by conjugate gradients, against the closed form voxel by voxel."""
    operator = Denoising((1, 8, 8), 0.2)
    values = torch.full((1, 1, 8, 8), 1.0)
    variance = torch.linspace(0.01, 0.09, 64).reshape(1, 8, 8)
    gain = variance / (variance + 0.04)
    images = torch.zeros(2000, 1, 8, 8)
    measurement = Measurement(operator, values)
    mean = measurement.closest(images[:1], variance, 30)
    torch.testing.assert_close(mean[0], gain, rtol=1e-4, atol=1e-5)
    rng = np.random.default_rng(0)
    noise = [torch.from_numpy(rng.standard_normal(images.shape).astype(np.float32)) for _ in range(2)]
    draws = measurement.closest(images, variance, 30, (noise[0], noise[1]))
    torch.testing.assert_close(draws.mean(0), gain, rtol=0, atol=0.02)
    torch.testing.assert_close(draws.var(0), variance * (1 - gain), rtol=0.15, atol=0)


def test_what_a_first_stage_loses_becomes_noise_of_the_measurement() -> None:
    for name, strength in (("denoising", 0.1), ("mri", 2.0)):
        measurement = measured(name, strength)
        std = measurement.operator.noise_std
        without = measurement.noise_variance(torch.full(SHAPE, 1e-12))
        assert without == pytest.approx(std**2, rel=1e-4)
    assert measured().noise_variance(torch.full(SHAPE, 0.03)) == pytest.approx(0.01 + 0.03, rel=0.2)


@pytest.mark.parametrize(("kept_in", "rate", "steps"), [(torch.float32, 0.05, 200), (torch.bfloat16, 0.003, 900)])
def test_adaptation_stops_where_noise_is_left_and_changes_no_model(
    kept_in: torch.dtype, rate: float, steps: int
) -> None:
    """A denoiser that is wrong by a constant, which fitting can take off; also in steps that bfloat16 rounds away."""

    class Shifted(torch.nn.Module):
        text = None  # it knows no texts

        def __init__(self) -> None:
            super().__init__()
            self.shift = torch.nn.Parameter(torch.tensor(2.0, dtype=kept_in))

        def latents(self, z: torch.Tensor) -> torch.Tensor:
            return z

    class Wrong(Exact):
        def __init__(self) -> None:
            super().__init__()
            self.denoiser = Shifted()  # type: ignore[assignment]

        def denoise(self, x: Any, timesteps: Any, condition: Any, guide: bool = False) -> Any:
            alpha, sigma = (v.reshape(-1, 1, 1, 1, 1).to(x.dtype) for v in self.process.alpha_sigma(timesteps))
            right = self.process.to_x0(super().denoise(x, timesteps, condition), x, timesteps)
            x0 = right + self.denoiser.shift
            return self.process.target(x0, torch.where(sigma > 0, (x - alpha * x0) / sigma, 0.0), timesteps)

    model, measurement = Wrong(), measured(strength=0.02)
    settings = Reconstruction(operators=["denoising"], samples=1, adaptation_steps=steps, adaptation_rate=rate)
    made = Reconstructor(model, settings, torch.full(SHAPE, LEAST_VARIANCE))
    roots, condition = ["x"], model.condition(SUBJECT)
    start = model.encode(scan()[None])
    found = made._adapted(start, measurement, condition, roots)
    shift = model.denoiser.shift.detach()  # type: ignore[operator]
    assert float(shift) == 2.0 and shift.dtype == kept_in
    assert float((model.decode(found) - torch.from_numpy(scan())).abs().mean()) < 0.05
    not_fitted = Reconstructor(model, settings.model_copy(update={"adaptation_steps": 1}), made.first_stage_variance)
    assert float((model.decode(not_fitted._adapted(start, measurement, condition, roots)) - scan()).abs().mean()) > 0.1


def test_the_same_key_gives_the_same_images() -> None:
    made = maker(samples=2, iterations=3)
    first, again = (made.reconstruct("consistency", measured(), SUBJECT, "x")[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first[0] - first[1]).max() > 0.01


def test_ways_without_a_model() -> None:
    image = np.zeros(SHAPE, np.float32)
    image[0, :, 1:5, 1:5] = 0.6
    pairs = [(measured(strength=0.1, image=image), image)]
    weight = best_weight(pairs)
    found = without_a_model(pairs[0][0], weight)
    errors = {name: np.abs(made - image).mean() for name, made in found.items()}
    assert (
        weight in WEIGHTS
        and errors["total_variation"] < errors["first_look"]
        and set(found) == {"first_look", "total_variation"}
    )


def test_what_a_first_stage_loses_is_measured_where_it_loses_it() -> None:
    class Lossy(Exact):
        def mean_images(self, latents: torch.Tensor) -> torch.Tensor:
            images = self.decode(latents).clone()
            images[..., :3] += 0.1
            return images

    found = first_stage_variance(Lossy(), np.stack([scan(), scan()]))
    assert float(found[..., 0].mean()) == pytest.approx(0.01, rel=0.2)
    assert float(found[..., -1].mean()) < 0.003
