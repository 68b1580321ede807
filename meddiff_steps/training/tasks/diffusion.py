"""Training of the second stage on cached latents."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.compute.device import channels_last, to_channels_last, to_device
from meddiff_steps.compute.micro_batch import MicroBatch
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.trained import DenoiserCard
from meddiff_steps.training.latent_data import LatentData, drop
from meddiff_steps.training.loop import batch_rows, clip_gradients, rank_share
from meddiff_steps.training.optimisers import set_up

if TYPE_CHECKING:
    from lightning_fabric import Fabric

#: Held-out latents that a validation looks at.
VALIDATION_LATENTS = 64


class DiffusionTask:
    """Denoising score matching with covariate dropout (classifier-free guidance, Ho and Salimans 2022).

    Noise levels are drawn where there is something to learn: ln(sigma / alpha) is normal (Karras et al. 2022).

    Parameters
    ----------
    settings
        The study's `diffusion` section.
    encoding
        How covariates became the numbers in `data`.
    root
        The study's seed.
    """

    def __init__(
        self, settings: config.Diffusion, data: LatentData, encoding: CovariateEncoding, root: str, fabric: Fabric
    ) -> None:
        self.settings, self.data, self.fabric, self.micro = settings, data, fabric, MicroBatch(fabric)
        self.root = f"{root}/diffusion"
        self.process = NoiseProcess.of(settings)
        self.val_rows = data.val_rows[:VALIDATION_LATENTS]
        shape = data.shards.shape("mean")
        self.spatial_dims = len(shape) - 1
        torch.manual_seed(int(step_generator(self.root, "weights", 0).integers(2**31)))
        #: How the denoiser is made, for its card.
        self.card = DenoiserCard(settings, shape, encoding, data.variant_numbers)
        model = self.card.build()
        model.load_state_dict(data.prior, strict=False)
        to_channels_last(model, self.spatial_dims)
        average = copy.deepcopy(model).requires_grad_(False).eval()
        self.net, self.optimisers = set_up(model, settings.optimiser, fabric)
        self.modules: dict[str, nn.Module] = {"model": model, "average": fabric.to_device(average)}
        #: What `compilation.speed_up` may compile.
        self.costly = list(model.costly)

    def train_step(self, step: int) -> dict[str, Tensor]:
        settings, fabric = self.settings, self.fabric
        rows = self.data.train_rows[
            batch_rows(self.root, step, settings.optimiser.batch_size, len(self.data.train_rows))
        ]
        generator = step_generator(self.root, "batch/0", step)
        x0 = self.data.draw(rows, generator)
        # Stratified times: one per equal slice of [0, 1), which lowers the variance of the loss (Kingma et al. 2021).
        uniform = (generator.permutation(len(rows)) + generator.random(len(rows))) / len(rows)
        covariates = drop(self.data.covariates[rows], settings.covariate_dropout, settings.condition_dropout, generator)
        noise = generator.standard_normal(x0.shape, dtype=np.float32)
        variants = self.data.shards.tensors("numbers", rows)
        mine = [rank_share(drawn, fabric) for drawn in (x0, uniform, noise, covariates, variants)]

        def losses(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            loss = self._loss(self.net, *(drawn[part] for drawn in mine))
            return loss, {"train/loss": loss}

        found = self.micro.gradients(self.net, len(mine[0]), losses)
        clip_gradients(self.net, settings.optimiser, step, fabric)
        for optimiser in self.optimisers.values():
            optimiser.step()
        return found

    def _loss(
        self,
        net: nn.Module,
        x0: np.ndarray,
        uniform: np.ndarray,
        noise: np.ndarray,
        covariates: np.ndarray,
        variants: np.ndarray,
    ) -> Tensor:
        clean, eps, given, seen = (to_device(drawn, self.fabric) for drawn in (x0, noise, covariates, variants))
        levels = self.settings.levels
        timesteps = to_device(self.process.training_timesteps(uniform, levels.mean, levels.deviation), self.fabric)
        noisy = self.process.add_noise(clean, eps, timesteps).contiguous(memory_format=channels_last(self.spatial_dims))
        predicted = net(noisy, timesteps, Condition(given, variant=seen))
        error = predicted - self.process.target(clean, eps, timesteps)
        # In units of what the network gives: every level weighs the same at the start (Karras et al. 2022, table 1)
        return (error / self.modules["average"].gain(timesteps, error.ndim)).square().mean()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss of the averaged weights on held-out latents at fixed times and noise."""
        losses = []
        for start in range(0, len(self.val_rows), 16):
            rows = self.val_rows[start : start + 16]
            generator = step_generator(self.root, "validation", start)
            x0 = self.data.draw(rows, generator)
            uniform = (np.arange(start, start + len(rows)) + 0.5) / len(self.val_rows)
            noise = generator.standard_normal(x0.shape, dtype=np.float32)
            with self.fabric.autocast():
                covariates, variants = self.data.covariates[rows], self.data.shards.tensors("numbers", rows)
                loss = self._loss(self.modules["average"], x0, uniform, noise, covariates, variants)
            losses.append((float(loss), len(rows)))
        return {"val/loss": sum(loss * n for loss, n in losses) / len(self.val_rows)} if losses else {}
