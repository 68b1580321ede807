"""An image from a measurement that leaves it open, with the trained model as what is known of heads beforehand.

The model draws latents; what was measured is A of the image that they decode to.  What the first stage cannot hold of
an image is taken for independent noise of the size that it has on validation scans.  So the last step, from decoded
latents to the image, is a linear problem of Gaussians and solved exactly, and fine detail comes from the measurement
where the first stage has none.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch import Tensor

from meddiff_steps import config
from meddiff_steps.applications.noise import keyed_noise
from meddiff_steps.core.random_streams import noise, seed_key
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.guidance import Guidance
from meddiff_steps.diffusion.posterior import (
    DataConsistency,
    MomentMatching,
    PosteriorSampling,
    conjugate_gradients,
    open_variance,
)
from meddiff_steps.diffusion.samplers import ddim, flow
from meddiff_steps.imaging.operators.base import Operator
from meddiff_steps.imaging.total_variation import total_variation
from meddiff_steps.models.trained import TrainedModel

log = logging.getLogger(__name__)

ENTRY = {
    "order": 4,
    "summary": "A scan from undersampled k-space, thick slices, noise or few counts, with a map of what is unsure",
    "source": "Zhu et al. 2023; Song et al. 2022; Chung et al. 2023 and 2024; Boys et al. 2024; Gungor et al. 2023",
    "needs": ["a trained model", "a measurement, or a scan to simulate one from"],
}

#: sigma / alpha at which a model is fitted to a measurement: most of an image is there, and some is still drawn.
ADAPTED_AT = 0.3
#: Weights of total variation that are tried on validation scans, in squares of the measurement's noise.
WEIGHTS = (1.0, 4.0, 15.0, 60.0)
#: What a first stage loses at least, so that equations with it can be solved.
LEAST_VARIANCE = 1e-6
#: Width (standard deviation, voxels) over which losses of the first stage are averaged.
SMOOTHING = 1.5
#: Validation scans that losses of the first stage, and the weight of total variation, are found on.
VALIDATION_SCANS, WEIGHT_SCANS = 8, 2


@dataclass(frozen=True)
class Measurement:
    """One scan as it was measured.

    Attributes
    ----------
    operator
        On the device of the model.
    values
        y, (1, *measured_shape).
    """

    operator: Operator
    values: Tensor

    def to(self, device: torch.device) -> Measurement:
        """The same on a device."""
        return Measurement(self.operator.to(device), self.values.to(device))

    def real(self, measured: Tensor) -> Tensor:
        """Measurements (b, ...) as real numbers, whose noise is independent and of `noise_std` each."""
        return torch.view_as_real(measured) if measured.is_complex() else measured

    def closest(
        self, images: Tensor, variance: Tensor, iterations: int, noise: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """The mean of x given y where x is N(images, variance) before, (b, 1, *spatial).

        With `noise`, standard normal as the images and as (real) measurements, a draw: the mean for an image and a
        measurement that have noise added to them (Papandreou and Yuille 2010).

        Parameters
        ----------
        variance
            Of every voxel, broadcasts to the images.
        """
        operator, values, std = self.operator, self.values, variance.sqrt()
        start = torch.zeros_like(images)
        if noise is not None:
            start = noise[0]
            added = torch.view_as_complex(noise[1]) if operator.is_complex else noise[1]
            values = values + operator.noise_std * operator.reached().to(added.device) * added

        def apply(u: Tensor) -> Tensor:
            return std * operator.adjoint(operator.forward(std * u)) + operator.noise_std**2 * u

        # In units of the spread before: the equations are as well conditioned as they can be where it differs.
        right = std * operator.adjoint(values - operator.forward(images)) + operator.noise_std**2 * start
        return images + std * conjugate_gradients(apply, right, start, iterations=iterations)

    def noise_variance(self, variance: Tensor) -> float:
        """Variance of every measured value, where images have independent noise of this variance beside them."""
        image = torch.from_numpy(noise(seed_key("reconstruction", 0, 0, "gain"), (1, *self.operator.image_shape)))
        seen = self.real(self.operator.forward(variance.sqrt() * image.to(variance)))
        added = float(seen.square().sum() / self.operator.reached().sum()) / (1 + self.operator.is_complex)
        return self.operator.noise_std**2 + added


@dataclass(frozen=True)
class Reconstructor:
    """The trained model and how it is used.

    Attributes
    ----------
    first_stage_variance
        Of what the first stage loses of a scan, (1, *spatial).
    """

    model: TrainedModel
    settings: config.Reconstruction
    first_stage_variance: Tensor

    def forward(self) -> config.Generate:
        """How latents are drawn: by a deterministic sampler, so that noise enters at the start alone."""
        sampler = flow if self.model.process.is_flow else ddim
        return config.Generate(
            sampler=sampler.__name__.rpartition(".")[2],
            num_inference_steps=self.settings.num_inference_steps,
            guidance_scale=1.0,
        )

    def reconstruct(
        self, method: str, measurement: Measurement, subject: pd.DataFrame, root: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws, float32 (samples, 1, *spatial) in [0, 1], of one measurement, and their mean (1, *spatial).

        A single draw is the mean given its latents, and so as good a guess as one draw can be.  Of several, each has
        its own noise where the first stage leaves an image open, and the mean is without it.

        Parameters
        ----------
        method
            One of `settings.methods`.
        subject
            Covariates, one row; empty cells are missing.
        root
            Of its random numbers.
        """
        model, settings = self.model, self.settings
        count = settings.samples
        roots = [f"{root}/{i}" for i in range(count)]
        start = next(keyed_noise(roots, model.latent_shape, f"reconstruction/{method}"))
        condition = model.condition(pd.concat([subject] * count))
        for network in (model.denoiser, model.first_stage):
            network.requires_grad_(False)
        guidance = self._guidance(method, measurement, count)
        latents = model.sample(start, condition, self.forward(), guidance=[guidance])
        if method == "adaptive":
            latents = self._adapted(latents, measurement, condition, roots)
        with torch.no_grad():
            images = model.mean_images(latents)
            iterations = 4 * settings.iterations
            mean = measurement.closest(images, self.first_stage_variance, iterations)
            draws = mean
            if count > 1:
                shapes = {"image": model.image_shape, "measured": tuple(measurement.real(measurement.values).shape[1:])}
                first, second = (next(keyed_noise(roots, shape, name)).to(images) for name, shape in shapes.items())
                draws = measurement.closest(images, self.first_stage_variance, iterations, (first, second))
        draws, mean = draws.clamp(0.0, 1.0), mean.clamp(0.0, 1.0).mean(0)
        return draws.cpu().numpy(), mean.cpu().numpy()

    def _guidance(self, method: str, measurement: Measurement, count: int) -> Guidance:
        settings, variance = self.settings, self.first_stage_variance
        predict = self._predict(measurement)
        values = measurement.real(measurement.values)
        values = values.expand(count, *values.shape[1:])
        if method == "posterior":
            return PosteriorSampling(predict, values, settings.posterior_scale)
        if method == "moments":
            return MomentMatching(predict, values, measurement.noise_variance(variance) ** 0.5, settings.iterations)
        return DataConsistency(partial(self._consistent, measurement), after_step=method == "projection")

    def _predict(self, measurement: Measurement) -> Callable[[Tensor], Tensor]:
        return lambda latents: measurement.real(measurement.operator.forward(self.model.mean_images(latents)))

    def _consistent(self, measurement: Measurement, x0: Tensor, ratio: float) -> Tensor:
        """Latents moved as their image must be moved to agree with the measurement.

        The difference of two encodings, not an encoding: what the first stage loses of both falls out.
        """
        with torch.no_grad():
            images = self.model.mean_images(x0)
            variance = open_variance(ratio) * self.settings.prior_std**2 + self.first_stage_variance
            closer = measurement.closest(images, variance, self.settings.iterations)
            return x0 + self.model.encode(closer) - self.model.encode(images)

    def _adapted(self, latents: Tensor, measurement: Measurement, condition: Condition, roots: Sequence[str]) -> Tensor:
        """Latents that the model makes of these once it was fitted to the measurement: Gungor et al. 2023.

        The weights of a copy of the denoiser are moved until what it predicts leaves no more of y than noise does
        (Morozov's discrepancy principle), or the steps are over.  The copy is in float32, whatever type the weights
        have (`compute.compilation.cast_weights`): bfloat16 rounds most moves away, as small as they are.
        """
        model, settings = copy.copy(self.model), self.settings
        model.denoiser = copy.deepcopy(self.model.denoiser).float().requires_grad_(True)
        process = model.process
        level = process.timestep_at(ADAPTED_AT / (1 + ADAPTED_AT) if process.is_flow else ADAPTED_AT)
        timesteps = torch.full((len(latents),), level, dtype=torch.float64, device=latents.device)
        added = next(keyed_noise(roots, model.latent_shape, "adaptation")).to(latents)
        state = process.add_noise(latents, added, timesteps)
        predict, values = self._predict(measurement), measurement.real(measurement.values)
        enough, count = measurement.noise_variance(self.first_stage_variance), int(measurement.operator.reached().sum())
        optimiser = torch.optim.Adam(model.denoiser.parameters(), lr=settings.adaptation_rate)
        for _ in range(settings.adaptation_steps):
            with torch.enable_grad():
                x0 = process.to_x0(model.denoise(state, timesteps.float(), condition), state, timesteps)
                total = (values - predict(x0)).square().sum()
                left = total / (count * len(x0) * (1 + measurement.operator.is_complex))
            if float(left.detach()) <= enough:
                break
            optimiser.zero_grad()
            left.backward()
            optimiser.step()
        with torch.no_grad():
            return process.to_x0(model.denoise(state, timesteps.float(), condition), state, timesteps)


def first_stage_variance(model: TrainedModel, images: np.ndarray) -> Tensor:
    """Mean squared difference of scans (n, 1, *spatial) and what the first stage makes of them, (1, *spatial), smoothed
    over neighbours: few scans say little of a single voxel.
    """
    with torch.no_grad():
        again = np.concatenate([model.mean_images(model.encode(one[None])).cpu().numpy() for one in images])
    mean = ndimage.gaussian_filter(np.square(again - images).mean(0)[0], SMOOTHING)[None]
    return torch.from_numpy(np.maximum(mean, LEAST_VARIANCE).astype(np.float32)).to(model.fabric.device)


def best_weight(measured: Sequence[tuple[Measurement, np.ndarray]]) -> float:
    """The weight of total variation with the smallest error over heads, on validation scans (1, *spatial)."""
    errors = {}
    for weight in WEIGHTS:
        found = []
        for measurement, truth in measured:
            scaled = weight * measurement.operator.noise_std**2
            image = total_variation(measurement.operator, measurement.values, scaled)[0].cpu().numpy()
            found.append(np.square(image - truth)[truth > 0].mean())
        errors[weight] = float(np.mean(found))
    return min(errors, key=lambda weight: errors[weight])


def without_a_model(measurement: Measurement, weight: float) -> Mapping[str, np.ndarray]:
    """What one has without a trained model, (1, *spatial) in [0, 1] by name: a first look, and total variation."""
    operator, values = measurement.operator, measurement.values
    smooth = total_variation(operator, values, weight * operator.noise_std**2)
    return {
        "first_look": operator.first_look(values)[0].clamp(0, 1).cpu().numpy(),
        "total_variation": smooth[0].clamp(0, 1).cpu().numpy(),
    }
