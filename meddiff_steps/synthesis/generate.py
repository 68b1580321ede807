"""From planned subjects to images: noise by key, sampling and decoding in fixed, padded batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from meddiff_steps.config import Generate
from meddiff_steps.diffusion.noise import batch_noise, seed_key
from meddiff_steps.diffusion.samplers import sample
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.autoencoder import Autoencoder
from meddiff_steps.models.files import LatentDiffusion
from meddiff_steps.training.backend import channels_last, to_channels_last

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def places(index: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Batches of rows, int (size,) each: row i stands at place `index[i]` modulo `size`, and a free place holds some row again.

    Consecutive indices fill every batch but the last.

    >>> [batch.tolist() for batch in places(np.array([2, 3, 4, 6]), 4)]
    [[2, 0, 0, 1], [3, 3, 3, 3]]
    """
    place = index % size
    turn = pd.Series(place).groupby(place).cumcount().to_numpy()
    for number in range(turn.max() + 1 if len(turn) else 0):
        rows = np.flatnonzero(turn == number)
        batch = np.full(size, rows[0])
        batch[place[rows]] = rows
        yield batch


class Generator:
    """Draws subjects from a trained model.

    A batch always has `settings.batch_size` rows, and a subject always the same place among them, because both change the last
    bits of results; what stands in the other places does not, so that free ones are filled with repeats.

    Parameters
    ----------
    model, autoencoder
        The two trained stages.
    settings
        The study's `generate` section.
    """

    def __init__(self, model: LatentDiffusion, autoencoder: Autoencoder, settings: Generate, fabric: Fabric) -> None:
        self.model, self.settings, self.fabric = model, settings, fabric
        self.process = NoiseProcess.of(model.settings)
        self.spatial_dims = len(model.latent_shape) - 1
        self.denoiser, self.autoencoder = model.denoiser, autoencoder
        for network in (self.denoiser, self.autoencoder):
            to_channels_last(network, self.spatial_dims)
            fabric.to_device(network)

    def images(self, subjects: pd.DataFrame, label: str) -> Iterator[tuple[str, np.ndarray]]:
        """(sample_id, image float32 (1, *spatial) in [0, 1]) for every row of a plan, batch by batch (`places`)."""
        covariates = self.model.encoding.encode(subjects)
        roots = zip(subjects["cohort_root"], subjects["noise_index"], subjects["attempt"], strict=True)
        subjects_of = [(str(root), int(index), int(attempt)) for root, index, attempt in roots]
        keys, ids, index = list(subjects["seed_key"]), list(subjects["sample_id"]), subjects["index"].to_numpy()
        with tqdm(total=len(ids), desc=label, unit="image", mininterval=5, file=sys.stderr) as bar:
            for batch in places(index, self.settings.batch_size):
                noise = batch_noise([keys[i] for i in batch], self.model.latent_shape)
                images = self.decode(self.latents(noise, covariates[batch], [subjects_of[i] for i in batch]))
                for i in np.unique(batch):
                    yield ids[i], images[index[i] % len(batch)]
                    bar.update()

    @torch.no_grad()
    def latents(self, noise: np.ndarray, covariates: np.ndarray, subjects: Sequence[tuple[str, int, int]]) -> Tensor:
        """Standardised latents (b, c, *spatial) from noise of that shape; `subjects` are (cohort_root, index, attempt)."""

        def step_noise(step: int) -> Tensor:
            keys = [seed_key(*subject, f"steps/{step}") for subject in subjects]
            return self.fabric.to_device(torch.from_numpy(batch_noise(keys, self.model.latent_shape)))

        def denoise(x: Tensor, timesteps: Tensor, values: Tensor) -> Tensor:
            with self.fabric.autocast():
                return self.denoiser(x.contiguous(memory_format=channels_last(self.spatial_dims)), timesteps, values)

        return sample(
            denoise,
            self.fabric.to_device(torch.from_numpy(noise)),
            self.fabric.to_device(torch.from_numpy(covariates)),
            self.process,
            self.settings.sampler,
            num_inference_steps=self.settings.num_inference_steps,
            guidance_scale=self.settings.guidance_scale,
            step_noise=step_noise,
        )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Images float32 (b, 1, *spatial), in [0, 1], from standardised latents."""
        z = self.denoiser.latents(latents).contiguous(memory_format=channels_last(self.spatial_dims))
        with self.fabric.autocast():
            return self.autoencoder.images(z).cpu().numpy()
