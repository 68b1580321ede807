"""Levels of a run: whole, in parts, and how a state is carried between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import process_of

from meddiff_steps.diffusion.levels import MAX_RATIO, MIN_FLOW_RATIO, Levels, flow_timesteps, karras_timesteps


def test_karras_levels_are_equation_5():
    process = process_of()
    levels = Levels.of(process, karras_timesteps(process, 9))
    table = process.alphas_cumprod
    smallest = ((1 - table[0]) / table[0]) ** 0.5
    largest = min(((1 - table[-1]) / table[-1]) ** 0.5, MAX_RATIO)
    wanted = np.linspace(largest ** (1 / 7), smallest ** (1 / 7), 9) ** 7
    np.testing.assert_allclose(levels.ratio, [*wanted, 0.0], rtol=1e-9)
    assert (levels.alpha[-1], levels.sigma[-1]) == (1.0, 0.0) and len(levels.timesteps) == levels.steps == 9
    assert levels.log_snr[-1] == np.inf


def test_levels_of_a_flow():
    process = process_of("flow")
    assert Levels.of(process, flow_timesteps(process, 4)).timesteps == (1000.0, 750.0, 500.0, 250.0)
    assert Levels.of(process, flow_timesteps(process, 4)).log_snr[0] == -np.inf
    ratio = Levels.of(process, karras_timesteps(process, 5)).ratio
    assert ratio[0] == pytest.approx(MAX_RATIO) and ratio[-2] == pytest.approx(MIN_FLOW_RATIO)


OWN = np.array([900.0, 600.0, 300.0, 100.0, 0.0])


@pytest.mark.parametrize(
    ("start", "stop", "timesteps", "first"),
    [
        (None, None, (900, 600, 300, 100, 0), 0),
        (600.0, None, (600, 300, 100, 0), 1),
        (450.0, None, (450, 300, 100, 0), 1),
        (950.0, None, (950, 900, 600, 300, 100, 0), 0),
        (0.0, None, (0,), 4),
        (None, 300.0, (900, 600, 300), 0),
        (None, 200.0, (900, 600, 300, 200), 0),
        (600.0, 100.0, (600, 300, 100), 1),
        (550.0, 350.0, (550, 350), 1),
        (600.0, 600.0, (600,), 1),
        # A level within a twentieth of a step of an end is left out, on either side of it.
        (305.0, None, (305, 100, 0), 2),
        (295.0, None, (295, 100, 0), 2),
        (899.99, None, (899.99, 600, 300, 100, 0), 0),
        (900.01, None, (900.01, 600, 300, 100, 0), 0),
        (None, 295.0, (900, 600, 295), 0),
        (None, 305.0, (900, 600, 305), 0),
    ],
)
def test_parts_of_a_run(start, stop, timesteps, first):
    levels = Levels.of(process_of(), OWN, start, stop)
    assert levels.timesteps == timesteps and levels.first == first
    assert len(levels.alpha) == len(levels.sigma) == len(timesteps) + (stop is None)
    alpha, sigma = process_of().alpha_sigma(torch.tensor(timesteps, dtype=torch.float64))
    assert levels.alpha[: len(timesteps)] == tuple(alpha.tolist())
    assert levels.sigma[: len(timesteps)] == tuple(sigma.tolist())


def test_stopping_a_flow_at_zero_is_going_to_the_end():
    process = process_of("flow")
    whole, stopped = (Levels.of(process, flow_timesteps(process, 5), stop=stop) for stop in (None, 0.0))
    assert whole.alpha == stopped.alpha and whole.sigma == stopped.sigma and whole.steps == stopped.steps


def test_a_single_level():
    process = process_of()
    assert Levels.of(process, karras_timesteps(process, 1), start=300.0).timesteps == (300.0,)
    assert Levels.of(process, karras_timesteps(process, 1), stop=300.0).steps == 1


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow"])
def test_a_state_is_carried_on_by_its_image_or_by_its_noise(prediction_type):
    """Both are exact for the image and the noise that it is made of."""
    process = process_of(prediction_type)
    levels = Levels.of(process, karras_timesteps(process, 6))
    x0, noise = torch.randn(2, 1, 1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for i in range(levels.steps):
        x, following = (levels.alpha[j] * x0 + levels.sigma[j] * noise for j in (i, i + 1))
        torch.testing.assert_close(levels.noise(i, x, x0), noise)
        torch.testing.assert_close(levels.towards(i, x, x0), following)
        torch.testing.assert_close(levels.along(i, x, noise), following)
