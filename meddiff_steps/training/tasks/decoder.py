"""Training of the drawing decoder on crops of scans and of what the first stage makes of them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from meddiff_steps import config
from meddiff_steps.compute.device import channels_last, to_channels_last, to_device
from meddiff_steps.compute.micro_batch import MicroBatch
from meddiff_steps.core.random_streams import batch_noise, seed_key, step_generator
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.imaging.variants import draw_variant
from meddiff_steps.models.drawing.base import DrawingDecoder, build
from meddiff_steps.models.first_stage.base import FirstStage, reconstruct
from meddiff_steps.models.tone import ToneCurve, level_counts
from meddiff_steps.models.weights import start_from
from meddiff_steps.training.loop import batch_rows, clip_gradients, rank_share
from meddiff_steps.training.optimisers import set_up

if TYPE_CHECKING:
    from lightning_fabric import Fabric

#: Crops of one decoded image: decoding costs about as much as training on so many.
CROPS_PER_IMAGE = 4
#: Places that are tried for a crop, and the share of it that must not be black; most of a head scan is.
PLACES, LEAST_SHARE, BLACK = 8, 0.15, 0.02
#: Noise levels that are trained on: ln(sigma / alpha).
LEVELS = config.NoiseLevels(mean=-0.4)
#: Training scans that grey levels are fitted on, and steps in which scans are drawn here.
GREY_LEVEL_SCANS, RECONSTRUCTION_STEPS = 48, 10
#: Held-out scans that a validation looks at, and training scans that the residual's size is measured on.
VALIDATION_SCANS, MEASURED_SCANS = 32, 64
#: Crops of each of these.
MEASURED_CROPS = 16


class DecoderTask:
    """Denoising of residuals, given the image that the first stage decodes from latents with noise.

    Parameters
    ----------
    settings, variants
        The study's `decoder` and `variants` sections.
    first_stage
        Trained.
    shards
        Preprocessed images in [0, 1].
    train_rows, val_rows
        Rows of `shards`.
    root
        The study's seed.
    base
        Trained, to start from.
    """

    def __init__(
        self,
        settings: config.Decoder,
        variants: config.Variants,
        first_stage: FirstStage,
        shards: Shards,
        train_rows: Sequence[int],
        val_rows: Sequence[int],
        root: str,
        fabric: Fabric,
        base: DrawingDecoder | None = None,
    ) -> None:
        self.settings, self.variants, self.shards, self.fabric = settings, variants, shards, fabric
        self.micro, self.root = MicroBatch(fabric), f"{root}/decoder"
        self.train_rows, self.val_rows = np.asarray(train_rows), np.asarray(val_rows)[:VALIDATION_SCANS]
        self.shape = shards.shape("image")
        self.spatial_dims = len(self.shape) - 1
        to_channels_last(first_stage, self.spatial_dims)
        fabric.to_device(first_stage)
        self.first_stage = first_stage
        torch.manual_seed(int(step_generator(self.root, "weights", 0).integers(2**31)))
        self.model = model = build(settings, self.shape)
        self.crop = [min(settings.crop // model.block, n) for n in model.blocks_shape]
        if base is None:
            model.deviation.fill_(self._measure())
        else:  # its residuals' size is part of what it learnt
            start_from(model, base, "decoder")
        to_channels_last(model, self.spatial_dims)
        average = copy.deepcopy(model).requires_grad_(False).eval()
        self.net, self.optimisers = set_up(model, settings.optimiser, fabric)
        self.modules: dict[str, nn.Module] = {"model": model, "average": fabric.to_device(average)}
        #: What `compilation.speed_up` may compile.
        self.costly = list(model.costly)

    def _measure(self) -> float:
        """Standard deviation of residuals where there is an image."""
        total = count = 0.0
        for start, row in enumerate(self.train_rows[:MEASURED_SCANS]):
            generator = step_generator(self.root, "deviation", start)
            residual = self._crops(np.array([row]), np.arange(MEASURED_CROPS), MEASURED_CROPS, generator)[0]
            total, count = total + float(residual.square().sum()), count + residual.numel()
        return max(total / count, 1e-12) ** 0.5

    @torch.no_grad()
    def _crops(
        self, rows: np.ndarray, mine: np.ndarray, count: int, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Residuals, decoded images and coordinates of crops `mine` of `count`, (n, ., *crop).

        Crop i is of row i modulo len(rows).  All random numbers are drawn, but no image is read or decoded that none
        of `mine` is of.
        """
        variants = [draw_variant(self.variants, self.spatial_dims, generator) for _ in rows]
        amplitude = self.settings.latent_noise * generator.random((len(rows), *[1] * (self.spatial_dims + 1)))
        seeds = generator.integers(2**63, size=len(rows))
        images, image_of = np.unique(mine % len(rows), return_inverse=True)
        scans = self.shards.tensors("image", rows[images])
        if self.variants.count > 1:
            scans = np.stack([variants[image](scan) for image, scan in zip(images, scans, strict=True)])
        x = to_device(scans, self.fabric).contiguous(memory_format=channels_last(self.spatial_dims))
        with self.fabric.autocast():
            posterior = self.first_stage.encode(x)
            noise = [
                np.random.Generator(np.random.Philox(seed)).standard_normal(posterior.mean.shape[1:], dtype=np.float32)
                for seed in seeds[images]
            ]
            latents = posterior.sample(
                to_device(np.stack(noise), self.fabric),
                to_device(amplitude[images].astype(np.float32), self.fabric),
            )
            decoded = self.first_stage.decode(latents).clamp(0.0, 1.0)
        residual, seen = self.model.residual(x, decoded), self.model.in_blocks(decoded)
        tries = generator.random((count, PLACES, self.spatial_dims))
        found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for crop, image in zip(mine, image_of, strict=True):
            start = self._place(scans[image, 0], tries[crop])
            window = (slice(None), *(slice(a, a + n) for a, n in zip(start, self.crop, strict=True)))
            found[0].append(residual[image][window])
            found[1].append(seen[image][window])
            found[2].append(self.model.place(start, self.crop).to(seen))
        return torch.stack(found[0]), torch.stack(found[1]), torch.stack(found[2])

    def _place(self, image: np.ndarray, tries: np.ndarray) -> list[int]:
        """Where a crop begins, in blocks: the first place of some, (places, d) in [0, 1), that is not black."""
        block = self.model.block
        room = np.asarray(self.model.blocks_shape) - self.crop + 1
        for start in (tries * room).astype(int).tolist():
            window = tuple(slice(block * a, block * (a + size)) for a, size in zip(start, self.crop, strict=True))
            if (image[window] > BLACK).mean() >= LEAST_SHARE:
                break
        return start

    def _batch(
        self, rows: np.ndarray, mine: np.ndarray, count: int, generator: np.random.Generator
    ) -> tuple[Tensor, ...]:
        """Crops `mine` of `count` of images `rows`, with noise and timesteps of theirs."""
        uniform = (generator.permutation(count) + generator.random(count)) / count
        timesteps = self.model.process.training_timesteps(uniform[mine], LEVELS.mean, LEVELS.deviation)
        crops = self._crops(rows, mine, count, generator)
        noise = generator.standard_normal((count, *crops[0].shape[1:]), dtype=np.float32)[mine]
        return *crops, to_device(noise, self.fabric), to_device(timesteps, self.fabric)

    def train_step(self, step: int) -> dict[str, Tensor]:
        settings, fabric = self.settings, self.fabric
        size = settings.optimiser.batch_size
        rows = self.train_rows[batch_rows(self.root, step, -(-size // CROPS_PER_IMAGE), len(self.train_rows))]
        mine = rank_share(np.arange(size), fabric)
        drawn = self._batch(rows, mine, size, step_generator(self.root, "batch/0", step))

        def losses(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            loss = self._loss(self.net, *(given[part] for given in drawn))
            return loss, {"train/loss": loss}

        found = self.micro.gradients(self.net, len(mine), losses)
        clip_gradients(self.net, settings.optimiser, step, fabric)
        for optimiser in self.optimisers.values():
            optimiser.step()
        return found

    def _loss(
        self, net: nn.Module, residual: Tensor, seen: Tensor, place: Tensor, noise: Tensor, timesteps: Tensor
    ) -> Tensor:
        noisy = self.model.process.add_noise(residual, noise, timesteps)
        predicted = net(noisy, timesteps, seen, place)
        return (predicted - self.model.process.target(residual, noise, timesteps)).square().mean()

    def _average(self) -> DrawingDecoder:
        average = self.modules["average"]
        assert isinstance(average, DrawingDecoder)
        return average

    @torch.no_grad()
    def reconstruct(self, row: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A scan, and one draw from its latents by the averaged weights, float32 (1, *spatial) in [0, 1] each.

        `name` keys the noise: a scan's id.
        """
        average = self._average()
        image = to_device(self.shards.tensors("image", np.array([row])), self.fabric)
        image = image.contiguous(memory_format=channels_last(self.spatial_dims))
        noise = to_device(batch_noise([seed_key(f"{self.root}/{name}", 0, 0, "decoder")], self.shape), self.fabric)
        with self.fabric.autocast():
            decoded = reconstruct(self.first_stage, image)
            drawn = average.draw(decoded, noise, RECONSTRUCTION_STEPS)
        return image[0].cpu().numpy(), drawn[0].cpu().numpy()

    def fit_grey_levels(self) -> None:
        """Give what is drawn the grey levels of training scans, after the last step.

        The curve that a base has goes: it is for what the base draws, and would change what this one is fitted on.
        """
        average = self._average()
        average.tone = ToneCurve().to(self.fabric.device)
        count = min(GREY_LEVEL_SCANS, len(self.train_rows))
        rows = self.train_rows[
            np.sort(step_generator(self.root, "sample", 0).permutation(len(self.train_rows))[:count])
        ]
        drawn = scans = np.zeros(1, np.int64)
        for row in tqdm(rows, desc="fitting grey levels", mininterval=5, file=sys.stderr):
            scan, made = self.reconstruct(int(row), f"tone/{row}")
            scans, drawn = scans + level_counts(scan), drawn + level_counts(made)
        average.tone.fit(drawn, scans)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss of the averaged weights on crops of held-out scans, always the same; nothing if there are none."""
        losses = []
        for row in self.val_rows:
            every = np.arange(CROPS_PER_IMAGE)
            drawn = self._batch(
                np.array([row]), every, CROPS_PER_IMAGE, step_generator(self.root, "validation", int(row))
            )
            with self.fabric.autocast():
                losses.append(float(self._loss(self.modules["average"], *drawn)))
        return {"val/loss": float(np.mean(losses))} if losses else {}
