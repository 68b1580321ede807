"""Sampling: from noise, or from a state on the way, to clean latents or to another state.

A run is a function of its arguments and nothing else. Three habits keep it exact:

- The network's output is turned into an estimate of x0 by the study's own `NoiseProcess`, corrected by guidance if
  there is any, and handed to the solver as x0. So every sampler takes every prediction type and guidance.
- The noise levels are ours (`diffusion.levels`), and the network is told the timestep of exactly the level at hand.
- A solver is made for every call, never clips (latents are not bounded), and never draws a random number.

Between steps the state is always `alpha * x0 + sigma * noise` at a level's timestep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registries import SAMPLERS, default_steps, samplers_of
from meddiff_steps.diffusion.conditioning import Condition, Denoiser
from meddiff_steps.diffusion.guidance import (
    Guidance,
    Interval,
    State,
    check_interval,
    corrected,
    is_within,
    predict,
)
from meddiff_steps.diffusion.levels import Levels, StepNoise
from meddiff_steps.diffusion.schedules import NoiseProcess

#: on_step(evaluation, x0): how many evaluations came before in this run, and the estimate, guidance included.
OnStep = Callable[[int, Tensor], None]


def sample(
    denoiser: Denoiser,
    x: Tensor,
    condition: Condition,
    process: NoiseProcess,
    sampler: str,
    *,
    num_inference_steps: int | None = None,
    start: float | None = None,
    stop: float | None = None,
    guidance: Sequence[Guidance] = (),
    guidance_scale: float = 1.0,
    guidance_interval: Interval | None = None,
    guide: Denoiser | None = None,
    step_noise: StepNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Clean latents, or a state on the way to them, (b, c, *spatial), at least float32.

    Draws no random number and touches no generator. Every operation acts on each subject alone, so that at a fixed
    batch size the result does not depend on the other subjects in the batch, as far as this holds for the denoiser.

    A run can be interrupted, and can branch: `sample(..., stop=t)` and then `sample(..., start=t)` with the same
    sampler and steps is the uninterrupted run where t is one of its own levels (`levels_of`). Multistep samplers
    (`pndm`, `dpmpp`, `unipc`) forget what they remembered, and begin again with a step of lower order.

    Parameters
    ----------
    denoiser
        Called as denoiser(x, timesteps, condition); timesteps are float32 (b,).
    x
        Standard normal noise, (b, c, *spatial), or with `start` a state at that timestep.
    condition
        Of the same b subjects.
    process
        The forward process that the denoiser was trained on.
    sampler
        A file of `diffusion.samplers`.
    num_inference_steps
        Steps of a full run; by default what the sampler was tested with.
    start
        Timestep of x. The run takes the levels of a full run that are cleaner, preceded by this one, so that it is
        shorter than a full run (as img2img is).
    stop
        Timestep to end at: the result is the state there, and not the clean latents.
    guidance
        Corrects every estimate and the state after every step, each in turn.
    guidance_scale
        Classifier-free guidance (`guidance.predict`): 1 is the conditional and 0 the unconditional prediction.
    guidance_interval
        Levels where that scale holds, in sigma / alpha, as (low, high]; elsewhere it is 1, in one pass
        (Kynkäänniemi et al. 2024).
    guide
        A less trained denoiser, for autoguidance instead of the classifier-free one (`guidance.predict`).
    step_noise
        Needed by a stochastic sampler: step_noise(i) gives the standard normal noise (b, c, *spatial) that step i of a
        full run adds, wherever this run starts; but see `Levels.first` for starts noisier than a full run's.
    on_step
        Called after every evaluation as on_step(evaluation, x0), for progress and previews.

    Raises
    ------
    UserError
        The sampler does not exist, does not fit the prediction type, or cannot take that many steps; or start and stop
        are no timesteps of which the second is cleaner.
    ValueError
        Noise that the sampler needs is not given, or x and condition are not of the same subjects.
    """
    levels = levels_of(sampler, process, num_inference_steps, start, stop)
    if len(condition) != len(x):
        raise ValueError(f"condition: {len(condition)} rows, but x has {len(x)}. Give a row per subject in both.")
    if SAMPLERS.entry(sampler)["stochastic"] and step_noise is None and any(levels.sigma[1:]):
        raise ValueError(f"sampler {sampler!r} adds noise at every step and draws none itself: give step_noise")
    network = _Network(
        denoiser, condition, process, levels, guidance, guidance_scale, guidance_interval, guide, on_step
    )
    step = SAMPLERS.load(sampler).solver(levels, step_noise and (lambda i: step_noise(levels.first + i)))
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if start is None:
        # Latents have unit variance, so the state of a flow that starts a little before pure noise has this std.
        x = x * math.hypot(levels.alpha[0], levels.sigma[0])
    for i in range(levels.steps):
        network.begin(i)
        with torch.no_grad():
            x = step(i, x, network.estimate)
        x = network.after(x)
    return x


def levels_of(
    sampler: str,
    process: NoiseProcess,
    num_inference_steps: int | None = None,
    start: float | None = None,
    stop: float | None = None,
) -> Levels:
    """Levels of a run; arguments and exceptions as in `sample`."""
    able = samplers_of(process.prediction_type)
    if sampler not in (*able, *samplers_of(process.prediction_type, of_students=True)):
        SAMPLERS.entry(sampler)  # says so where there is no such sampler at all
        raise UserError(
            f"sampler {sampler!r} cannot sample a model with prediction_type: {process.prediction_type}; "
            f"use one of {', '.join(able)}"
        )
    steps = default_steps(sampler, process.num_train_timesteps) if num_inference_steps is None else num_inference_steps
    if steps < 1:
        raise UserError(f"num_inference_steps must be at least 1, found {steps}")
    return Levels.of(process, SAMPLERS.load(sampler).timesteps(process, steps), start, stop)


@dataclass
class _Network:
    """What a solver asks: the denoiser under guidance, as an estimate of x0 at a level."""

    denoiser: Denoiser
    condition: Condition
    process: NoiseProcess
    levels: Levels
    guidance: Sequence[Guidance]
    scale: float
    interval: Interval | None
    guide: Denoiser | None
    on_step: OnStep | None
    i: int = 0  # the step of this run
    first: State | None = None  # at the step's first evaluation
    evaluations: int = 0

    def __post_init__(self) -> None:
        check_interval(self.interval)
        self.gradients = any(each.needs_gradients for each in self.guidance)

    def begin(self, i: int) -> None:
        """Step i of this run begins."""
        self.i, self.first = i, None

    def estimate(self, x: Tensor, level: int) -> Tensor:
        """The network's x0, corrected by guidance; the graph stays behind, with the step's first state."""
        levels, following = self.levels, self.i + 1
        shape = (len(x), *[1] * (x.ndim - 1))
        timesteps = torch.full((len(x),), levels.timesteps[level], dtype=torch.float64, device=x.device)
        scale = self.scale if is_within(self.interval, levels.ratio[level]) else 1.0
        with torch.set_grad_enabled(self.gradients):
            x = x.detach().requires_grad_(self.gradients)
            x0 = self.process.to_x0(
                predict(self.denoiser, x, timesteps, self.condition, scale, self.guide), x, timesteps
            )
            state = State(
                step=levels.first + self.i,
                timesteps=timesteps.float(),
                alpha=x.new_full(shape, levels.alpha[level]),
                sigma=x.new_full(shape, levels.sigma[level]),
                x=x,
                x0=x0,
                alpha_next=levels.alpha[following],
                sigma_next=levels.sigma[following],
                ratio=levels.ratio[level],
            )
            state = corrected(self.guidance, state)
        self.first = self.first or state
        x0 = state.x0.detach()
        if self.on_step is not None:
            self.on_step(self.evaluations, x0)
        self.evaluations += 1
        return x0

    def after(self, x: Tensor) -> Tensor:
        """The next state, corrected by guidance."""
        assert self.first is not None, "a solver evaluates at least once in every step"
        with torch.set_grad_enabled(self.gradients):
            for each in self.guidance:
                x = each.after(self.first, x)
        return x.detach()
