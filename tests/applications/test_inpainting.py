"""Inpainting with a model whose answer is known, and which latents are known beside a hole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from meddiff_steps.applications.inpainting import inpaint, known_latents
from meddiff_steps.applications.noise import keyed_noise
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.config import ContinuousCovariate, Inpainting
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import noise, seed_key
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.trained import TrainedModel

SHAPE, STD = (1, 6, 6, 6), 0.1
SUBJECT = pd.DataFrame({"size": [1.0], "subject_id": ["sub-a"]})


class Exact(TrainedModel):
    """Latents are images less 0.4 times 10; every voxel is N(0.4 + 0.1 size, STD^2), and the denoiser knows it."""

    def __init__(self, prediction_type: str = "v_prediction") -> None:
        settings: Any = SimpleNamespace(
            prediction_type=prediction_type,
            num_train_timesteps=1000,
            schedule="scaled_linear",
            beta_start=0.0015,
            beta_end=0.0205,
            zero_terminal_snr=False,
        )
        self.process, self.card = NoiseProcess.of(settings), SimpleNamespace(few_step=None)  # type: ignore[assignment]
        covariates: Any = {"size": ContinuousCovariate(unit="mL", range=(-10, 10))}
        self.encoding = CovariateEncoding.fit(pd.DataFrame({"size": [-1.0, 1.0] * 500}), covariates)
        self.latent_shape, self.spatial_dims, self.decoder = SHAPE, 3, None
        self.fabric: Any = SimpleNamespace(device=torch.device("cpu"), to_device=lambda value: value)
        self.denoiser = self.first_stage = nn.Identity()  # type: ignore[assignment]
        self.denoiser.text = None  # it knows no texts

    @property
    def image_shape(self) -> tuple[int, ...]:
        return SHAPE

    def encode(self, images: np.ndarray | Tensor) -> Tensor:
        return (torch.as_tensor(images) - 0.4) * 10

    def decode(self, latents: Tensor, noise: Tensor | None = None, **_: Any) -> Tensor:
        return latents / 10 + 0.4

    def mean_images(self, latents: Tensor) -> Tensor:
        return self.decode(latents)

    def denoise(self, x: Tensor, timesteps: Tensor, condition: Condition, guide: bool = False) -> Tensor:
        alpha, sigma = (v.reshape(-1, 1, 1, 1, 1).to(x.dtype) for v in self.process.alpha_sigma(timesteps))
        mean = torch.nan_to_num(condition.covariates[:, 0]).reshape(-1, 1, 1, 1, 1)
        variance = (10 * STD) ** 2
        x0 = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)
        return self.process.target(x0, torch.where(sigma > 0, (x - alpha * x0) / sigma, 0.0), timesteps)


def scan() -> np.ndarray:
    return (0.5 + STD * np.random.default_rng(0).standard_normal(SHAPE)).astype(np.float32)


def hole() -> np.ndarray:
    hidden = np.zeros(SHAPE[1:], bool)
    hidden[2:4, 1:5, 2:5] = True
    return hidden


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow"])
def test_what_is_drawn_is_the_populations_and_the_rest_is_the_scan(prediction_type: str) -> None:
    settings = Inpainting(samples=40, num_inference_steps=30, resamples=2, seam="copy")
    image, hidden = scan(), hole()
    made = inpaint(Exact(prediction_type), image, hidden, SUBJECT, settings, "x")
    np.testing.assert_array_equal(made.drawn[:, :, ~hidden], np.broadcast_to(image[:, ~hidden], (40, 1, 192)))
    drawn = made.drawn[:, 0, hidden]
    assert drawn.mean() == pytest.approx(0.5, abs=0.01)
    assert drawn.std() == pytest.approx(STD, rel=0.15)
    assert np.abs(np.corrcoef(drawn)[np.triu_indices(40, 1)]).mean() < 0.3, "draws differ"
    assert made.known == pytest.approx((~hidden).mean())


def test_hidden_voxels_are_not_looked_at_and_draws_are_keyed() -> None:
    settings = Inpainting(samples=2, num_inference_steps=8, resamples=2)
    image, hidden = scan(), hole()
    first = inpaint(Exact(), image, hidden, SUBJECT, settings, "x")
    second = inpaint(Exact(), np.where(hidden, 7.0, image), hidden, SUBJECT, settings, "x")
    np.testing.assert_array_equal(first.drawn, second.drawn)
    more = inpaint(Exact(), image, hidden, SUBJECT, settings.model_copy(update={"samples": 3}), "x")
    np.testing.assert_allclose(more.drawn[:2], first.drawn, atol=1e-5)
    other = inpaint(Exact(), image, hidden, SUBJECT, settings, "y")
    assert np.abs(other.drawn - first.drawn).max() > 0.05


def test_noise_is_that_of_its_key() -> None:
    stream = keyed_noise(["a", "b"], (2, 3), "s")
    first, second = next(stream), next(stream)
    np.testing.assert_array_equal(first[1], noise(seed_key("b", 0, 0, "s"), (2, 3)))
    np.testing.assert_array_equal(second[0], noise(seed_key("a", 1, 0, "s"), (2, 3)))


class Blurring(Exact):
    """Latents see two voxels further than their own block of 2 x 2 x 2, and are as far as they look moved alike."""

    def encode(self, images: np.ndarray | Tensor) -> Tensor:
        return nn.functional.avg_pool3d(torch.as_tensor(images), 6, stride=2, padding=2) * 20


def test_a_latent_is_known_if_nothing_it_sees_is_hidden() -> None:
    image, hidden = np.full((1, 24, 24, 24), 0.5, np.float32), np.zeros((24, 24, 24), bool)
    hidden[10:13, 8, 8] = True
    latents, known = known_latents(Blurring(), image, hidden, 1e-4)
    assert latents.shape == known.shape == (1, 1, 12, 12, 12)
    cells = np.arange(12)
    sees = [(2 * cells - 2 <= high) & (2 * cells + 3 >= low) for low, high in ((10, 12), (8, 8), (8, 8))]
    expected = np.ones((12, 12, 12), bool)
    expected[np.ix_(*sees)] = False
    np.testing.assert_array_equal(known[0, 0].numpy(), expected)
    # A voxel of 216 moves a latent little: with a high tolerance all are known but those that have it in their block.
    blocks = np.zeros((12, 12, 12), bool)
    blocks[5:7, 4, 4] = True
    np.testing.assert_array_equal(known_latents(Blurring(), image, hidden, 9.0)[1][0, 0].numpy(), ~blocks)


def test_a_hole_that_leaves_nothing_is_refused() -> None:
    hidden = np.ones((24, 24, 24), bool)
    hidden[0, 0, 0] = False
    with pytest.raises(UserError, match="moves every latent by more than inpainting.tolerance"):
        known_latents(Blurring(), np.full((1, 24, 24, 24), 0.5, np.float32), hidden, 1e-4)
