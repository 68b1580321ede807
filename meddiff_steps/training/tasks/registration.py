"""Training of a network that registers scans of different people, with a score or without."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from monai.losses import BendingEnergyLoss
from torch import Tensor, nn
from torch.nn import functional

from meddiff_steps import config
from meddiff_steps.compute.device import to_channels_last, to_device
from meddiff_steps.compute.micro_batch import MicroBatch
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.imaging.deformation import moved
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.deformation import RegistrationNetwork
from meddiff_steps.training.loop import batch_rows, clip_gradients
from meddiff_steps.training.optimisers import set_up

if TYPE_CHECKING:
    from lightning_fabric import Fabric

#: Pairs of held-out scans that a validation looks at.
VALIDATION_PAIRS = 8
#: Voxels from one window to the next, along each axis: neighbours say nearly the same.
STRIDE = 2
#: Added to variances of grey values within a window.
FLAT = 1e-5


def local_correlation(a: Tensor, b: Tensor, window: int, stride: int = STRIDE) -> Tensor:
    """Mean squared correlation of windows of two images (b, 1, *spatial), in [0, 1]; Avants et al. 2008.

    MONAI's `LocalNormalizedCrossCorrelationLoss` has a window around every voxel, at five times the time.
    """
    moments = functional.avg_pool3d(torch.cat([a, b, a * a, b * b, a * b], 1), window, stride)
    mean_a, mean_b, aa, bb, ab = moments.split(1, 1)
    joint, of_a, of_b = ab - mean_a * mean_b, aa - mean_a.square(), bb - mean_b.square()
    return (joint.square() / ((of_a.clamp_min(0) + FLAT) * (of_b.clamp_min(0) + FLAT))).mean()


class RegistrationTask:
    """Pairs of training scans, each a random one moved onto another.

    Parameters
    ----------
    settings
        The study's `registration` section.
    shards
        Preprocessed volumes in [0, 1].
    train_rows, val_rows
        Rows of `shards`.
    root
        The study's seed.
    score
        Whether the network is told a noise level and tells the score, beside the deformation.
    """

    def __init__(
        self,
        settings: config.PairRegistration,
        shards: Shards,
        train_rows: Sequence[int],
        val_rows: Sequence[int],
        root: str,
        fabric: Fabric,
        *,
        score: bool,
    ) -> None:
        self.settings, self.shards, self.fabric = settings, shards, fabric
        self.micro, self.root = MicroBatch(fabric), f"{root}/registration"
        self.train_rows, self.val_rows = np.asarray(train_rows), np.asarray(val_rows)[:VALIDATION_PAIRS]
        torch.manual_seed(int(step_generator(self.root, "weights", 0).integers(2**31)))
        self.model = model = RegistrationNetwork(settings, shards.shape("image"), score)
        to_channels_last(model, 3)
        average = copy.deepcopy(model).requires_grad_(False).eval()
        self.net, self.optimisers = set_up(model, settings.optimiser, fabric)
        self.modules: dict[str, nn.Module] = {"model": model, "average": fabric.to_device(average)}
        self.bending = BendingEnergyLoss()
        #: What `compilation.speed_up` may compile.
        self.costly = list(model.costly)

    def train_step(self, step: int) -> dict[str, Tensor]:
        size = self.settings.optimiser.batch_size
        generator = step_generator(self.root, "batch/0", step)
        fixed = self.train_rows[batch_rows(self.root, step, size, len(self.train_rows))]
        # Any other scan, each as likely
        others = generator.integers(1, len(self.train_rows), size)
        place = {row: i for i, row in enumerate(self.train_rows.tolist())}
        moving = self.train_rows[[(place[row] + k) % len(place) for row, k in zip(fixed, others, strict=True)]]
        drawn = self._drawn(moving, fixed, generator)

        def losses(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            found = self._losses(self.net, self.model, *(given[part] for given in drawn))
            return found["loss"], {f"train/{name}": value for name, value in found.items()}

        found = self.micro.gradients(self.net, size, losses)
        clip_gradients(self.net, self.settings.optimiser, step, self.fabric)
        for optimiser in self.optimisers.values():
            optimiser.step()
        return found

    def _drawn(self, moving: np.ndarray, fixed: np.ndarray, generator: np.random.Generator) -> tuple[Tensor, ...]:
        """Moving and fixed scans, reduced, noise and timesteps; half of these 0, as in use."""
        shape = (1, *(n // self.model.factor for n in self.model.shape))
        uniform = generator.random(len(fixed), dtype=np.float32)
        noise = np.zeros((len(fixed), *shape), np.float32)
        if self.model.score:
            noise = generator.standard_normal(noise.shape, dtype=np.float32)
        images = (to_device(self.shards.tensors("image", rows), self.fabric) for rows in (moving, fixed))
        noisy = generator.random(len(fixed)) >= 0.5
        times = np.where(noisy, uniform, np.float32(0)) * np.float32(self.model.process.last_timestep)
        return (
            *(self.model.reduced(image) for image in images),
            *(to_device(array, self.fabric) for array in (noise, times)),
        )

    def _losses(
        self, net: nn.Module, model: RegistrationNetwork, moving: Tensor, fixed: Tensor, noise: Tensor, times: Tensor
    ) -> dict[str, Tensor]:
        noisy = model.process.add_noise(fixed * 2.0 - 1.0, noise, times) if model.score else None
        velocity, told = net(moving, fixed, noisy, times if model.score else None)
        likeness = local_correlation(
            moved(moving, model.displacement(velocity, whole=False)), fixed, self.settings.window
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of torch, about how MONAI indexes
            bending = self.bending(velocity)
        found = {"likeness": likeness, "bending": bending}
        loss = self.settings.smoothness * bending - likeness
        if told is not None:
            found["score"] = (told - noise).square().mean()
            loss = loss + self.settings.score_weight * found["score"]
        return {"loss": loss, **found}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Of held-out scans, each moved onto the next as in use, without noise; nothing of a single one."""
        model = self.modules["average"]
        assert isinstance(model, RegistrationNetwork)
        found = []
        for moving, fixed in zip(self.val_rows, np.roll(self.val_rows, -1), strict=True):
            if moving != fixed:
                generator = step_generator(self.root, "validation", int(fixed))
                pair = self._drawn(np.array([moving]), np.array([fixed]), generator)
                with self.fabric.autocast():
                    found.append(self._losses(model, model, pair[0], pair[1], pair[2], torch.zeros_like(pair[3])))
        names = ("loss", "likeness", "bending")
        return {f"val/{name}": float(np.mean([float(one[name]) for one in found])) for name in names} if found else {}
