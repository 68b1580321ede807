"""Training of the diffusion of points: whole shapes get a new defect at every step."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.compute.device import adamw, to_device
from meddiff_steps.compute.micro_batch import MicroBatch
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.imaging.points import Shapes, defect
from meddiff_steps.models.points import PointDenoiser, told
from meddiff_steps.training.loop import batch_rows, clip_gradients

if TYPE_CHECKING:
    from lightning_fabric import Fabric

#: Of the random linear map of every training shape, beside the identity: its standard deviation.
WARP = 0.04
#: Noise levels that are trained on: ln(sigma / alpha).
LEVELS = config.NoiseLevels(mean=-0.5, deviation=1.5)


class ShapeTask:
    """Missing points of training shapes, told from noise.

    Parameters
    ----------
    settings
        The study's `shape_completion` section.
    shapes
        All of them.
    train_rows, val_rows
        Which to learn from, and which to watch, with their own defects.
    root
        The study's seed.
    """

    def __init__(
        self,
        settings: config.ShapeCompletion,
        shapes: Shapes,
        train_rows: np.ndarray,
        val_rows: np.ndarray,
        root: str,
        fabric: Fabric,
    ) -> None:
        self.settings, self.shapes, self.fabric = settings, shapes, fabric
        self.micro, self.root = MicroBatch(fabric), f"{root}/shape_completion"
        self.train_rows, self.val_rows = train_rows, val_rows
        torch.manual_seed(int(step_generator(self.root, "weights", 0).integers(2**31)))
        self.model = model = PointDenoiser(settings)
        points = shapes.points[train_rows].reshape(-1, 3)
        model.middle.copy_(torch.from_numpy(points.mean(0)))
        model.scale.fill_(float((points - points.mean(0)).std()))
        average = copy.deepcopy(model).requires_grad_(False).eval()
        fabric.to_device(model)
        optimiser = adamw(model.parameters(), settings.optimiser.learning_rate, fabric)
        self.net, wrapped = fabric.setup(model, optimiser)
        self.optimisers = {"all": wrapped}
        self.modules: dict[str, nn.Module] = {"model": model, "average": fabric.to_device(average)}

    def train_step(self, step: int) -> dict[str, Tensor]:
        settings, size = self.settings, self.settings.optimiser.batch_size
        generator = step_generator(self.root, "batch/0", step)
        rows = self.train_rows[batch_rows(self.root, step, size, len(self.train_rows))]
        whole = self.shapes.points[rows]
        whole = whole @ (np.eye(3) + WARP * generator.standard_normal((size, 3, 3))).transpose(0, 2, 1)
        centres = generator.integers(whole.shape[1], size=size)
        missing = np.stack([defect(p, c, self.shapes.gap) for p, c in zip(whole, centres, strict=True)])
        given = [to_device(one, self.fabric) for one in self._batch(whole, missing, settings.drawn, generator)]

        def losses(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            loss = self._loss(self.net, *(one[part] for one in given))
            return loss, {"train/loss": loss}

        found = self.micro.gradients(self.net, size, losses)
        clip_gradients(self.net, settings.optimiser, step, self.fabric)
        for optimiser in self.optimisers.values():
            optimiser.step()
        return found

    def _batch(
        self, points: np.ndarray, missing: np.ndarray, drawn: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, ...]:
        """Missing points and points that are left, mm (b, ., 3), noise of the first and timesteps."""
        gone = np.stack([generator.permutation(p[m])[:drawn] for p, m in zip(points, missing, strict=True)])
        left = np.stack(
            [generator.permutation(p[~m])[: self.settings.known] for p, m in zip(points, missing, strict=True)]
        )
        noise = generator.standard_normal((len(gone), 3, gone.shape[1]), dtype=np.float32)
        uniform = (generator.permutation(len(gone)) + generator.random(len(gone))) / len(gone)
        timesteps = self.model.process.training_timesteps(uniform, LEVELS.mean, LEVELS.deviation)
        return gone.astype(np.float32), left.astype(np.float32), noise, timesteps

    def _loss(self, net: nn.Module, gone: Tensor, left: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        model = self.model
        x0, known = model.standardise(gone), model.standardise(left)
        predicted = net(model.process.add_noise(x0, noise, timesteps), timesteps, told(known))
        return (predicted - model.process.target(x0, noise, timesteps)).square().mean()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss of the averaged weights on held-out shapes with their own defects; nothing if there are none."""
        if not len(self.val_rows):
            return {}
        generator = step_generator(self.root, "validation", 0)
        shapes = self.shapes
        batch = self._batch(shapes.points[self.val_rows], shapes.missing[self.val_rows], shapes.gap, generator)
        with self.fabric.autocast():
            loss = self._loss(self.modules["average"], *(to_device(one, self.fabric) for one in batch))
        return {"val/loss": float(loss)}
