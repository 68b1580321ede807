"""From planned subjects to images: noise by key, sampling and decoding in fixed, padded batches."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from meddiff_steps.compute.compilation import cast_weights, speed_up
from meddiff_steps.compute.device import channels_last, to_channels_last, to_device
from meddiff_steps.config import Compute, Generate
from meddiff_steps.core.random_streams import batch_noise, seed_key
from meddiff_steps.diffusion.samplers import sample
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.first_stage.kl import Autoencoder
from meddiff_steps.models.trained import LatentDiffusion

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def batch_slots(index: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Batches of rows, int (size,) each: row i stands at place `index[i]` modulo `size`, and a free place holds some
    row again.

    Consecutive indices fill every batch but the last.

    >>> [batch.tolist() for batch in batch_slots(np.array([2, 3, 4, 6]), 4)]
    [[2, 0, 0, 1], [3, 3, 3, 3]]
    """
    place = index % size
    turn = pd.Series(place).groupby(place).cumcount().to_numpy()
    for number in range(turn.max() + 1 if len(turn) else 0):
        rows = np.flatnonzero(turn == number)
        batch = np.full(size, rows[0])
        batch[place[rows]] = rows
        yield batch


class CohortGenerator:
    """Draws subjects from a trained model.

    A batch always has `settings.batch_size` rows, and a subject always the same place among them, because both change
    the last bits of results; what stands in the other places does not, so that free ones are filled with repeats.

    Parameters
    ----------
    model, autoencoder
        The two trained stages.
    settings, compute
        The study's sections `generate` and `compute`; without the second nothing is compiled.

    Raises
    ------
    UserError
        The study wants networks compiled, and this machine cannot.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        autoencoder: Autoencoder,
        settings: Generate,
        fabric: Fabric,
        compute: Compute | None = None,
    ) -> None:
        self.model, self.settings, self.fabric = model, settings, fabric
        self.process = NoiseProcess.of(model.settings)
        self.spatial_dims = len(model.latent_shape) - 1
        self.denoiser, self.autoencoder = model.denoiser, autoencoder
        for network in (self.denoiser, self.autoencoder):
            to_channels_last(network, self.spatial_dims)
            fabric.to_device(network)
        networks = [*self.denoiser.costly, self.autoencoder.net.decoder]
        cast_weights(networks, fabric)
        on_gpu = fabric.device.type == "cuda"
        self.compiled = compute is not None and speed_up(networks, compute, fabric, training=False)
        self.graphs = self.compiled and on_gpu and compute is not None and compute.cuda_graphs
        self.transfers = torch.cuda.Stream(fabric.device) if on_gpu else None
        #: Batches that are begun before the images of an earlier one are handed out: a GPU works on its own meanwhile.
        self.ahead = 1 if on_gpu else 0

    def images(self, subjects: pd.DataFrame, label: str) -> Iterator[tuple[str, np.ndarray]]:
        """(sample_id, image float32 (1, *spatial) in [0, 1]) for every row of a plan, batch by batch (`batch_slots`)."""
        covariates = self.model.encoding.encode(subjects)
        roots = zip(subjects["cohort_root"], subjects["noise_index"], subjects["attempt"], strict=True)
        subjects_of = [(str(root), int(index), int(attempt)) for root, index, attempt in roots]
        keys, ids, index = list(subjects["seed_key"]), list(subjects["sample_id"]), subjects["index"].to_numpy()
        begun: deque[tuple[np.ndarray, Callable[[], np.ndarray]]] = deque()
        with tqdm(total=len(ids), desc=label, unit="image", mininterval=5, file=sys.stderr) as bar:

            def finished() -> Iterator[tuple[str, np.ndarray]]:
                batch, wait = begun.popleft()
                images = wait()
                for i in np.unique(batch):
                    yield ids[i], images[index[i] % len(batch)]
                    bar.update()

            for batch in batch_slots(index, self.settings.batch_size):
                noise = batch_noise([keys[i] for i in batch], self.model.latent_shape)
                latents = self.latents(noise, covariates[batch], [subjects_of[i] for i in batch])
                begun.append((batch, self.begin_decoding(latents)))
                if len(begun) > self.ahead:
                    yield from finished()
            while begun:
                yield from finished()

    @torch.no_grad()
    def latents(self, noise: np.ndarray, covariates: np.ndarray, subjects: Sequence[tuple[str, int, int]]) -> Tensor:
        """Standardised latents (b, c, *spatial) from noise of that shape; `subjects` are (cohort_root, index, attempt)."""

        def step_noise(step: int) -> Tensor:
            keys = [seed_key(*subject, f"steps/{step}") for subject in subjects]
            return to_device(batch_noise(keys, self.model.latent_shape), self.fabric)

        def denoise(x: Tensor, timesteps: Tensor, values: Tensor) -> Tensor:
            if self.graphs:
                torch.compiler.cudagraph_mark_step_begin()  # the last result may be overwritten: it was copied
            with self.fabric.autocast():
                predicted = self.denoiser(
                    x.contiguous(memory_format=channels_last(self.spatial_dims)), timesteps, values
                )
            return predicted.clone() if self.graphs else predicted

        return sample(
            denoise,
            to_device(noise, self.fabric),
            to_device(covariates, self.fabric),
            self.process,
            self.settings.sampler,
            num_inference_steps=self.settings.num_inference_steps,
            guidance_scale=self.settings.guidance_scale,
            step_noise=step_noise,
        )

    def decode(self, latents: Tensor) -> np.ndarray:
        """Images float32 (b, 1, *spatial), in [0, 1], from standardised latents."""
        return self.begin_decoding(latents)()

    @torch.no_grad()
    def begin_decoding(self, latents: Tensor) -> Callable[[], np.ndarray]:
        """Start what `decode` does, `decode_batch_size` images at a time; the function returned waits for the images.

        A GPU copies images into pinned memory of the host while it decodes the next ones, and without anybody waiting
        for it.
        """
        z = self.denoiser.latents(latents).contiguous(memory_format=channels_last(self.spatial_dims))
        size = self.settings.decode_batch_size or len(z)
        shape = (len(z), 1, *(n * self.autoencoder.block for n in z.shape[2:]))
        host = torch.empty(shape, pin_memory=self.transfers is not None)
        for start in range(0, len(z), size):
            if self.graphs:
                torch.compiler.cudagraph_mark_step_begin()
            with self.fabric.autocast():
                images = self.autoencoder.images(z[start : start + size], self.settings.decode_slab)
            self._copy(images, host[start : start + size])
        if self.transfers is None:
            return host.numpy
        copied = self.transfers.record_event()

        def wait() -> np.ndarray:
            copied.synchronize()
            return host.numpy()

        return wait

    def _copy(self, images: Tensor, target: Tensor) -> None:
        """Copy images to the host; from a GPU beside what it computes next, so that `target` is complete only later."""
        if self.transfers is None:
            target.copy_(images)
            return
        self.transfers.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(self.transfers):
            target.copy_(images, non_blocking=True)
        images.record_stream(self.transfers)  # its memory may be used again only when the copy is done
