"""A denoiser that was distilled to take a few long steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from meddiff_steps import config
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registries import is_of_students
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.denoiser.effects import Estimate


@dataclass(frozen=True)
class Distilled:
    """What a student was distilled for.

    Attributes
    ----------
    method
        Of section `few_step`; the name of the sampler, too.
    num_inference_steps
        Of `progressive`, the steps that it takes; of `consistency`, those that the study meant it for.
    guidance, guidance_scale, guidance_interval
        Of the teacher, as in section `generate`: the student has them in its weights.
    """

    method: Literal["progressive", "consistency"]
    num_inference_steps: int
    guidance: Literal["classifier_free", "autoguidance"]
    guidance_scale: float
    guidance_interval: tuple[float, float] | None

    @classmethod
    def of(cls, settings: config.FewStep, generate: config.Generate) -> Self:
        """What a study asks for."""
        assert settings.method is not None
        guidance = (generate.guidance, generate.guidance_scale, generate.guidance_interval)
        return cls(settings.method, settings.num_inference_steps, *guidance)

    @classmethod
    def from_json(cls, card: Mapping[str, Any]) -> Self:
        interval = card["guidance_interval"]
        return cls(**{**card, "guidance_interval": tuple(interval) if interval else None})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def steps(self) -> int:
        """Levels from each of which it leads to the next; with one, it leads from any level to clean latents."""
        return self.num_inference_steps if self.method == "progressive" else 1


def check_sampler(distilled: Distilled | None, settings: config.Generate) -> None:
    """Refuse to draw from a student, or from a model that is none, otherwise than it was made for.

    Raises
    ------
    UserError
        The sampler is of students and the model none, or the other way round; or the student was distilled for another
        number of steps, or with another guidance.
    """
    if distilled is None:
        if is_of_students(settings.sampler):
            raise UserError(
                f"generate.sampler: {settings.sampler} draws from a student, and this model is none. Give the folder"
                " few_step/, or take another sampler, such as dpmpp."
            )
        return
    asked: dict[str, Any] = {
        "sampler": settings.sampler,
        "guidance": settings.guidance,
        "guidance_scale": settings.guidance_scale,
        "guidance_interval": settings.guidance_interval,
    }
    made: dict[str, Any] = {
        "sampler": distilled.method,
        "guidance": distilled.guidance,
        "guidance_scale": distilled.guidance_scale,
        "guidance_interval": distilled.guidance_interval,
    }
    if distilled.method == "progressive":
        asked["num_inference_steps"] = settings.num_inference_steps or distilled.num_inference_steps
        made["num_inference_steps"] = distilled.num_inference_steps
    for key, value in made.items():
        if asked[key] != value:
            raise UserError(
                f"generate.{key}: found {asked[key]}, but this student was distilled for {value}. Ask for that, or"
                " distil anew."
            )


class Student(Denoiser):
    """The network of a teacher, with a closed form for long steps.

    What is known without training is not the posterior mean of x0, which only short steps may follow, but the x0 that
    leads to the next of `steps` levels (`diffusion.levels.halving_timesteps`) on the exact path of the Gaussian rest
    (`CovariateEffects.path`).  So a student that has learnt nothing draws latents of the right mean and spread in one
    step, and covariates along the readout keep their spread.  Its weights are named as those of `Denoiser`.

    Parameters
    ----------
    steps
        Levels; 1 leads from any level to clean latents.
    settings, latent_shape, levels, variants, maps, tokens
        As of `Denoiser`.
    """

    def __init__(self, steps: int, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.steps = steps

    def known(self, x: Tensor, timesteps: Tensor, condition: Condition) -> Estimate:
        alpha, sigma = self.process.alpha_sigma(timesteps)
        sigma = sigma.clamp_min(1e-6)  # a flow ends at 0
        found = super().known(x, timesteps, condition)
        angle = self._next(torch.atan2(sigma, alpha))
        added = self.effects.path(found.surprise, alpha, sigma, angle.cos(), angle.sin())
        ratio = (alpha / sigma).float().reshape(-1, *[1] * (x.ndim - 1))
        return replace(found, clean=found.clean + added, noise=found.noise - ratio * added)

    def _next(self, angle: Tensor) -> Tensor:
        """arctan(sigma / alpha) of the level that follows; a path does not depend on how amplitudes are scaled."""
        level = (self.steps * (1.0 - angle * 2 / math.pi)).round().clamp(0, self.steps - 1)
        return math.pi / 2 * (1.0 - (level + 1) / self.steps)
