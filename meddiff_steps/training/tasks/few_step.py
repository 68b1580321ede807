"""Distillation of a trained diffusion model, guidance included (Meng et al. 2023), into a student that draws in a few
steps.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.compute.compilation import speed_up
from meddiff_steps.compute.device import channels_last, to_channels_last, to_device
from meddiff_steps.compute.micro_batch import MicroBatch
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.levels import halving_timesteps
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.denoiser.student import Distilled
from meddiff_steps.models.trained import DenoiserCard
from meddiff_steps.training.latent_data import LatentData, drop
from meddiff_steps.training.loop import batch_rows, clip_gradients, fit, rank_share
from meddiff_steps.training.optimisers import set_up

if TYPE_CHECKING:
    from lightning_fabric import Fabric

#: Held-out latents that a validation looks at, and how many at a time.
VALIDATION_LATENTS, VALIDATED = 32, 16


class Teacher:
    """What a denoiser says of clean latents, where every row of a batch is at a level of its own.

    Parameters
    ----------
    denoiser
        Trained, on its device.
    guidance
        What its prediction is guided by; None for a student, which has it in its weights.
    """

    def __init__(self, denoiser: Denoiser, guidance: Distilled | None, fabric: Fabric) -> None:
        self.denoiser, self.guidance, self.fabric = denoiser, guidance, fabric
        self.process = denoiser.process

    @torch.no_grad()
    def clean(self, x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Estimate of x0 under guidance, float32 (b, c, *spatial), from states x at `timesteps`, float64 (b,)."""
        times, asked = timesteps.float(), self.guidance
        with self.fabric.autocast():
            predicted = self.denoiser(x, times, condition)
            if asked is not None and asked.guidance_scale != 1.0:
                if asked.guidance == "autoguidance":
                    other = self.denoiser(x, times, condition, guide=True)
                else:
                    other = self.denoiser(x, times, condition.null())
                predicted = other + self._scale(timesteps, x.ndim) * (predicted - other)
        return self.process.to_x0(predicted, x, timesteps)

    def _scale(self, timesteps: Tensor, ndim: int) -> Tensor:
        """Of guidance, (b, 1, ...): 1 at levels outside of the interval, as in `diffusion.sampling`."""
        assert self.guidance is not None
        scale = torch.full_like(timesteps, self.guidance.guidance_scale)
        if self.guidance.guidance_interval is not None:
            low, high = self.guidance.guidance_interval
            alpha, sigma = self.process.alpha_sigma(timesteps)
            scale = torch.where((sigma > low * alpha) & (sigma <= high * alpha), scale, 1.0)
        return scale.float().reshape(-1, *[1] * (ndim - 1))


class BatchLevels:
    """The levels of `steps` steps (`halving_timesteps`), where every row of a batch is at a level of its own."""

    def __init__(self, process: NoiseProcess, steps: int, fabric: Fabric) -> None:
        self.steps = steps
        timesteps = torch.from_numpy(halving_timesteps(process, steps))
        alpha, sigma = process.alpha_sigma(timesteps)
        #: Of the levels, float64 (steps,); amplitudes have clean latents, too.
        self.timesteps = fabric.to_device(timesteps)
        self.alpha = fabric.to_device(torch.cat([alpha, alpha.new_ones(1)]))
        self.sigma = fabric.to_device(torch.cat([sigma, sigma.new_zeros(1)]))

    def towards(self, level: Tensor, x: Tensor, clean: Tensor) -> Tensor:
        """The states at the next level, on the straight way from x at `level`, (b,), to clean latents (DDIM)."""
        shrink, rest = self._step(level, x.ndim)
        return shrink * x + rest * clean

    def clean_of(self, level: Tensor, x: Tensor, end: Tensor) -> Tensor:
        """The clean latents on whose straight way from x the state `end` lies at the next level."""
        shrink, rest = self._step(level, x.ndim)
        return (end - shrink * x) / rest

    def _step(self, level: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        shrink = self.sigma[level + 1] / self.sigma[level]
        rest = self.alpha[level + 1] - shrink * self.alpha[level]
        shape = (-1, *[1] * (ndim - 1))
        return shrink.float().reshape(shape), rest.float().reshape(shape)


class FewStepTask(ABC):
    """A student learns, at every level, the clean latents to which its teacher's steps lead.

    States are those of training latents with noise, told the covariates that these have, some of them dropped as in the
    teacher's training.  Errors are in units of what the network gives, so that all levels weigh the same: of latents of
    unit variance that is the weight SNR + 1 of Salimans and Ho 2022, finite also at pure noise.

    Parameters
    ----------
    settings
        The study's `few_step` section.
    card
        How the student is built; its `few_step` says for how many steps.
    weights
        What it begins with: those of its teacher.
    teacher
        Whose steps it learns.
    levels
        Levels that it is taught at.
    data
        The teacher's latents.
    root
        The study's seed.
    """

    def __init__(
        self,
        settings: config.FewStep,
        card: DenoiserCard,
        weights: Denoiser,
        teacher: Teacher,
        levels: int,
        data: LatentData,
        root: str,
        fabric: Fabric,
    ) -> None:
        self.settings, self.card, self.teacher, self.data, self.fabric = settings, card, teacher, data, fabric
        self.micro, self.root = MicroBatch(fabric), f"{root}/few_step/{levels}"
        self.levels = BatchLevels(teacher.process, levels, fabric)
        self.val_rows = data.val_rows[:VALIDATION_LATENTS]
        self.spatial_dims = len(card.latent_shape) - 1
        model = card.build()
        model.load_state_dict(weights.state_dict())
        to_channels_last(model, self.spatial_dims)
        average = copy.deepcopy(model).requires_grad_(False).eval()
        self.model = model
        self.net, self.optimisers = set_up(model, settings.optimiser, fabric)
        self.modules: dict[str, nn.Module] = {"model": model, "average": fabric.to_device(average)}
        #: What `compilation.speed_up` may compile.
        self.costly = list(model.costly)
        self._held_out: list[tuple[Tensor, Tensor, Condition, Tensor]] | None = None

    @property
    def average(self) -> Denoiser:
        average = self.modules["average"]
        assert isinstance(average, Denoiser)
        return average

    @abstractmethod
    def target(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        """What the student shall say of clean latents, from states x at levels (b,)."""

    def held_out_target(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        """What a validation compares with; always the same."""
        return self.target(x, level, condition)

    def train_step(self, step: int) -> dict[str, Tensor]:
        settings, fabric, data = self.settings.optimiser, self.fabric, self.data
        rows = data.train_rows[batch_rows(self.root, step, settings.batch_size, len(data.train_rows))]
        mine = [rank_share(drawn, fabric) for drawn in self._drawn(rows, step_generator(self.root, "batch/0", step))]

        def losses(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            x, level, condition = self._states(*(drawn[part] for drawn in mine))
            loss = self._errors(self.net, x, level, condition, self.target(x, level, condition)).mean()
            return loss, {"train/loss": loss}

        found = self.micro.gradients(self.net, len(mine[0]), losses)
        clip_gradients(self.net, settings, step, fabric)
        for optimiser in self.optimisers.values():
            optimiser.step()
        return found

    def _drawn(self, rows: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
        """Latents, noise, levels and covariates of a batch; each level as often as the others."""
        taught = self.card.settings
        x0 = self.data.draw(rows, generator)
        noise = generator.standard_normal(x0.shape, dtype=np.float32)
        uniform = (generator.permutation(len(rows)) + generator.random(len(rows))) / len(rows)
        covariates, _ = drop(self.data.covariates[rows], taught.covariate_dropout, taught.condition_dropout, generator)
        return [x0, noise, (uniform * self.levels.steps).astype(np.int64), covariates]

    def _states(
        self, x0: np.ndarray, noise: np.ndarray, level: np.ndarray, covariates: np.ndarray
    ) -> tuple[Tensor, Tensor, Condition]:
        clean, eps, at, given = (to_device(drawn, self.fabric) for drawn in (x0, noise, level, covariates))
        x = self.teacher.process.add_noise(clean, eps, self.levels.timesteps[at])
        return x.contiguous(memory_format=channels_last(self.spatial_dims)), at, Condition(given)

    def _errors(self, net: nn.Module, x: Tensor, level: Tensor, condition: Condition, clean: Tensor) -> Tensor:
        """Mean squared error of each row, in units of what the network gives, (b,)."""
        process, timesteps = self.teacher.process, self.levels.timesteps[level]
        shape = (-1, *[1] * (x.ndim - 1))
        alpha, sigma = (a[level].float().reshape(shape) for a in (self.levels.alpha, self.levels.sigma))
        target = process.target(clean, (x - alpha * clean) / sigma, timesteps)
        error = net(x, timesteps.float(), condition) - target
        return (error / self.average.gain(timesteps, x.ndim)).square().flatten(1).mean(1)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Error of the averaged weights on held-out latents with fixed noise; nothing if there are none."""
        if self._held_out is None:
            self._held_out = list(self._validation())
        losses = []
        for x, level, condition, target in self._held_out:
            with self.fabric.autocast():
                losses += self._errors(self.average, x, level, condition, target).tolist()
        return {"val/loss": float(np.mean(losses))} if losses else {}

    def _validation(self) -> Iterator[tuple[Tensor, Tensor, Condition, Tensor]]:
        for start in range(0, len(self.val_rows), VALIDATED):
            rows = self.val_rows[start : start + VALIDATED]
            x, level, condition = self._states(*self._drawn(rows, step_generator(self.root, "validation", start)))
            yield x, level, condition, self.held_out_target(x, level, condition)


class ProgressiveTask(FewStepTask):
    """One step of the student is two steps of its teacher (Salimans and Ho 2022, algorithm 2)."""

    def target(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        fine, end = BatchLevels(self.teacher.process, 2 * self.levels.steps, self.fabric), x
        for at in (2 * level, 2 * level + 1):
            end = fine.towards(at, end, self.teacher.clean(end, fine.timesteps[at], condition))
        return self.levels.clean_of(level, x, end)


class ConsistencyTask(FewStepTask):
    """A state leads to where its neighbour on the teacher's path does (Song et al. 2023, algorithm 2).

    The neighbour is judged by the weights of the moment, not by their average (Song and Dhariwal 2024, section 3.2).
    """

    def target(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        levels = self.levels
        there = levels.towards(level, x, self.teacher.clean(x, levels.timesteps[level], condition))
        following = (level + 1).clamp(max=levels.steps - 1)
        own = Teacher(self.model, None, self.fabric).clean(there, levels.timesteps[following], condition)
        ends = (level + 1 == levels.steps).reshape(-1, *[1] * (x.ndim - 1))
        return torch.where(ends, there, own)

    def held_out_target(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        """Where all steps of the teacher end, between however many levels the student learns."""
        fine = BatchLevels(self.teacher.process, self.settings.teacher_steps, self.fabric)
        teacher = Teacher(self.teacher.denoiser.taking(fine.steps), self.teacher.guidance, self.fabric)
        begin = level * (fine.steps // self.levels.steps)
        for number in range(fine.steps):
            at = torch.full_like(level, number)
            moved = fine.towards(at, x, teacher.clean(x, fine.timesteps[at], condition))
            x = torch.where((begin <= number).reshape(-1, *[1] * (x.ndim - 1)), moved, x)
        return x


def distil(
    settings: config.FewStep,
    distilled: Distilled,
    teacher: tuple[Denoiser, DenoiserCard],
    data: LatentData,
    root: str,
    fabric: Fabric,
    compute: config.Compute,
    state: Path,
) -> tuple[FewStepTask, pd.DataFrame, bool]:
    """Train a student to its last step, resuming from `state`.

    Parameters
    ----------
    settings, distilled
        The study's `few_step` section, and what it asks for.
    teacher
        A trained denoiser and its card.
    data, root
        Its latents, and the study's seed.

    Returns
    -------
    task, curve, compiled
        The last training (`stages`), whose averaged weights are the student; the curve of all (step, metric, value);
        and whether networks were compiled.

    Raises
    ------
    UserError
        The teacher is a student itself.
    """
    denoiser, card = teacher
    if card.few_step is not None:
        raise UserError("--diffusion: this model is a student itself. Give the folder of its teacher, diffusion/.")
    to_channels_last(denoiser, len(card.latent_shape) - 1)
    fabric.to_device(denoiser)
    judge = Teacher(denoiser.taking(settings.teacher_steps), distilled, fabric)
    curves, weights, compiled = [], denoiser, False
    kind: type[FewStepTask]
    for number, levels in enumerate(stages(settings, distilled)):
        if compiled:
            torch.compiler.reset()  # its limit of variants of one network is for all trainings together
        if distilled.method == "progressive":
            own, kind = replace(distilled, num_inference_steps=levels), ProgressiveTask
        else:
            own, kind = distilled, ConsistencyTask
            judge = Teacher(denoiser.taking(levels), distilled, fabric)
        task = kind(settings, replace(card, few_step=own), weights, judge, levels, data, root, fabric)
        compiled = speed_up([*task.costly, *judge.denoiser.costly], compute, fabric, training=True)
        label = f"{distilled.method} {levels}"
        curve = fit(task, settings.optimiser, fabric, state / f"{distilled.method}-{levels}", label)
        curves.append(curve.assign(step=curve["step"] + number * settings.optimiser.steps))
        weights = task.average
        if distilled.method == "progressive":
            judge = Teacher(weights, None, fabric)
    return task, pd.concat(curves, ignore_index=True), compiled


def stages(settings: config.FewStep, distilled: Distilled) -> list[int]:
    """Levels of the trainings, one after the other.

    Those of `progressive` are halved, from half of the teacher's steps to the student's.  Those of `consistency` are
    doubled (Song and Dhariwal 2024, section 3.4): between few levels a student soon knows the whole way, from clean
    latents to noise, if not exactly; between many at once it learns it level by level.  Of Gaussian data of deviation
    0.5, one step drew a deviation of 0.51 after 100 steps between each of 2, 4, 8 and 16 levels, and of 0.62 after 400
    between 16.

    >>> stages(config.FewStep(num_inference_steps=2, teacher_steps=16), Distilled("progressive", 2, "", 1, None))
    [8, 4, 2]
    >>> stages(config.FewStep(num_inference_steps=4, teacher_steps=16), Distilled("consistency", 4, "", 1, None))
    [2, 4, 8, 16]
    """
    last = settings.teacher_steps
    if distilled.method == "progressive":
        return [last >> k for k in range(1, last.bit_length()) if last >> k >= distilled.num_inference_steps]
    levels = [last]
    while levels[0] % 2 == 0 and levels[0] > 2:
        levels.insert(0, levels[0] // 2)
    return levels
