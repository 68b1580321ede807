"""Sampling under a measurement, held to Gaussian data whose posterior is known: who has its mean, and who its spread.

With a deterministic sampler and a linear measurement, what is drawn is an affine function of the noise it starts from.
So mean and covariance of the draws are found exactly, from the draws of 0 and of unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.guidance import BaseGuidance
from meddiff_steps.diffusion.posterior import (
    DataConsistency,
    MomentMatching,
    PosteriorSampling,
    conjugate_gradients,
    open_variance,
)
from meddiff_steps.diffusion.repaint import KnownPart, noised_again, repaint, visits
from meddiff_steps.diffusion.sampling import levels_of, sample
from meddiff_steps.diffusion.schedules import NoiseProcess

DIM, NOISE = 4, 0.3
MEAN = np.array([0.5, -0.2, 0.0, 1.0])
_FACTOR = np.array([[1.0, 0, 0, 0], [0.7, 0.6, 0, 0], [0.3, 0.3, 0.5, 0], [0.0, 0.4, -0.3, 0.6]])
COVARIANCE = _FACTOR @ _FACTOR.T
FORWARD = np.array([[1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, -0.5]])
MEASURED = np.array([1.2, -0.7])


class Gaussian:
    """Data N(MEAN, covariance), and the denoiser that knows it."""

    def __init__(self, covariance: np.ndarray = COVARIANCE, prediction_type: str = "v_prediction") -> None:
        settings = SimpleNamespace(
            prediction_type=prediction_type,
            num_train_timesteps=1000,
            schedule="scaled_linear",
            beta_start=0.0015,
            beta_end=0.0205,
            zero_terminal_snr=False,
        )
        self.process = NoiseProcess.of(settings)  # type: ignore[arg-type]
        self.covariance = torch.from_numpy(covariance)

    def __call__(self, x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = (float(v[0]) for v in self.process.alpha_sigma(timesteps))
        covariance, mean = self.covariance.to(x.dtype), torch.from_numpy(MEAN).to(x.dtype)
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(DIM, dtype=x.dtype))
        flat = x.reshape(len(x), DIM)
        x0 = (mean + (flat - alpha * mean) @ gain.T).reshape(x.shape)
        return self.process.target(x0, (x - alpha * x0) / sigma, timesteps)

    def run(self, x: Tensor, guidance: BaseGuidance, steps: int) -> Tensor:
        sampler = "flow" if self.process.is_flow else "ddim"
        options = {"num_inference_steps": steps, "guidance": [guidance]}
        return sample(self, x, Condition(torch.zeros(len(x), 0)), self.process, sampler, **options)

    def draws(self, guidance: BaseGuidance, steps: int = 400) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of what is drawn."""
        starts = torch.cat([torch.zeros(1, DIM), torch.eye(DIM)]).double().reshape(-1, 1, DIM)
        ends = self.run(starts, guidance, steps).reshape(-1, DIM).numpy()
        linear = ends[1:] - ends[0]
        return ends[0], linear.T @ linear

    def posterior(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of x0 given MEASURED."""
        s = self.covariance.numpy()
        gain = s @ FORWARD.T @ np.linalg.inv(FORWARD @ s @ FORWARD.T + NOISE**2 * np.eye(2))
        return MEAN + gain @ (MEASURED - FORWARD @ MEAN), s - gain @ FORWARD @ s


def predict(x0: Tensor) -> Tensor:
    return x0 @ torch.from_numpy(FORWARD).to(x0.dtype).T


def measured(b: int = DIM + 1) -> Tensor:
    return torch.from_numpy(MEASURED).expand(b, 1, 2)


def projected(variance: float) -> Callable[[Tensor, float], Tensor]:
    """Least squares between an estimate, as uncertain as it is at a level, and what was measured."""
    a = torch.from_numpy(FORWARD)

    def project(x0: Tensor, ratio: float) -> Tensor:
        open_ = open_variance(ratio, variance)
        gain = open_ * a.T @ torch.linalg.inv(open_ * a @ a.T + NOISE**2 * torch.eye(2, dtype=a.dtype))
        return x0 + (measured(len(x0)) - predict(x0)) @ gain.T

    return project


def distance(found: tuple[np.ndarray, np.ndarray], true: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """Of the means, in posterior standard deviations; of the covariances, as a share of the true one's norm."""
    scale = np.sqrt(np.diag(true[1]))
    return (
        float(np.abs((found[0] - true[0]) / scale).max()),
        float(np.linalg.norm(found[1] - true[1]) / np.linalg.norm(true[1])),
    )


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "flow"])
def test_moment_matching_is_exact(prediction_type: str) -> None:
    """But for the steps of the sampler: with twice as many, half of the error is left."""
    world = Gaussian(prediction_type=prediction_type)
    errors = [
        distance(world.draws(MomentMatching(predict, measured(), NOISE), steps), world.posterior())
        for steps in (60, 120)
    ]
    assert max(errors[1]) < 0.06
    assert max(errors[1]) < 0.65 * max(errors[0])


def test_posterior_sampling_and_consistency_have_the_mean_nearly_and_the_spread_not() -> None:
    world = Gaussian()
    before = distance((MEAN, COVARIANCE), world.posterior())
    for guidance in (PosteriorSampling(predict, measured(), 1.0), DataConsistency(projected(0.6), after_step=True)):
        mean, spread = distance(world.draws(guidance, 120), world.posterior())
        assert 0.05 < mean < 0.35 < before[0] and 0.1 < spread < 0.4 < before[1]


def test_consistency_of_the_estimate_is_exact_for_independent_latents() -> None:
    """And consistency after the step is not: it counts the measurement again in every step."""
    world = Gaussian(0.5 * np.eye(DIM))
    exact = distance(world.draws(DataConsistency(projected(0.5)), 120), world.posterior())
    assert max(exact) < 0.06
    assert distance(world.draws(DataConsistency(projected(0.5), after_step=True), 120), world.posterior())[0] > 0.15


def test_posterior_sampling_that_is_too_weak_ignores_what_was_measured() -> None:
    world = Gaussian()
    mean, spread = distance(world.draws(PosteriorSampling(predict, measured(), 0.0), 60), (MEAN, COVARIANCE))
    assert mean < 0.05 and spread < 0.1


def test_guidance_acts_on_each_subject_alone() -> None:
    world = Gaussian()
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 1, DIM)))
    for make in (
        lambda b: MomentMatching(predict, measured(b), NOISE),
        lambda b: PosteriorSampling(predict, measured(b), 1.0),
    ):
        together, alone = world.run(x, make(3), 20), world.run(x[:1], make(1), 20)
        torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-12)


def test_conjugate_gradients_solve() -> None:
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((6, 6))
    matrix = torch.from_numpy(factor @ factor.T + np.eye(6))
    right = torch.from_numpy(rng.standard_normal((3, 6)))
    right[1] = 0
    found = conjugate_gradients(lambda x: x @ matrix, right, iterations=12)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, right.T).T, rtol=1e-5, atol=1e-6)
    again = conjugate_gradients(lambda x: x @ matrix, right, found, iterations=1)
    torch.testing.assert_close(again, found, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ RePaint

KNOWN, DRAWN = [0, 1], [2, 3]
VALUES = torch.tensor([1.5, 0.9, 0.0, 0.0]).double()


def conditional() -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the drawn part given the known one."""
    s = COVARIANCE
    gain = s[np.ix_(DRAWN, KNOWN)] @ np.linalg.inv(s[np.ix_(KNOWN, KNOWN)])
    mean = MEAN[DRAWN] + gain @ (VALUES.numpy()[KNOWN] - MEAN[KNOWN])
    return mean, s[np.ix_(DRAWN, DRAWN)] - gain @ s[np.ix_(KNOWN, DRAWN)]


def repainted(steps: int, jump_length: int, resamples: int, prediction_type: str = "v_prediction") -> np.ndarray:
    """What is drawn, (n, DIM)."""
    world, n, rng = Gaussian(prediction_type=prediction_type), 3000, np.random.default_rng(0)
    sampler = "flow" if world.process.is_flow else "ddim"
    levels = levels_of(sampler, world.process, steps)

    def step(x: Tensor, start: float, stop: float | None, guidance: KnownPart) -> Tensor:
        ends = {"start": start, "stop": stop, "num_inference_steps": steps, "guidance": [guidance]}
        return sample(world, x, Condition(torch.zeros(len(x), 0)), world.process, sampler, **ends)

    found = repaint(
        step,
        levels,
        VALUES.expand(n, 1, DIM),
        torch.tensor([True, True, False, False]),
        lambda: torch.from_numpy(rng.standard_normal((n, 1, DIM))),
        jump_length=jump_length,
        resamples=resamples,
    )
    return found.reshape(n, DIM).numpy()


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow"])
def test_resampling_brings_the_drawn_part_to_what_the_known_part_says(prediction_type: str) -> None:
    """The mean, that is; with few steps the spread comes out a fifth too small."""
    naive, again = (repainted(30, 5, resamples, prediction_type) for resamples in (1, 8))
    np.testing.assert_array_equal(again[:, KNOWN], np.broadcast_to(VALUES[KNOWN], (3000, 2)))
    first, second = (distance((x[:, DRAWN].mean(0), np.cov(x[:, DRAWN].T)), conditional()) for x in (naive, again))
    assert first[0] > 0.15 and second[0] < 0.5 * first[0]
    assert second[1] < 0.4


def test_the_way_of_repaint() -> None:
    assert visits(3, 10, 1) == [0, 1, 2, 3]
    path = visits(7, 3, 3)
    assert path[0] == 0 and path[-1] == 7
    assert sum(b == a + 1 for a, b in pairwise(path)) == 3 * 7
    assert {(a, b) for a, b in pairwise(path) if b < a} == {(3, 0), (6, 3), (7, 6)}


def test_noise_added_again_is_that_of_the_forward_process() -> None:
    for prediction_type in ("v_prediction", "flow"):
        process = Gaussian(prediction_type=prediction_type).process
        levels = levels_of("flow" if process.is_flow else "ddim", process, 10)
        ones, rng = torch.ones(1, 1, 1).double(), np.random.default_rng(0)
        for cleaner, noisier in ((10, 7), (6, 2)):
            x = levels.alpha[cleaner] * 0.7 + levels.sigma[cleaner] * torch.from_numpy(rng.standard_normal((20000, 1)))
            x = noised_again(levels, cleaner, noisier, x, torch.from_numpy(rng.standard_normal((20000, 1))))
            assert float(x.mean()) == pytest.approx(0.7 * levels.alpha[noisier], abs=0.03)
            assert float(x.std()) == pytest.approx(levels.sigma[noisier], rel=0.03)
        assert noised_again(levels, 10, 10, ones, ones).item() == pytest.approx(1.0)
