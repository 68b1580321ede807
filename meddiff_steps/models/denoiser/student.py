"""What a student of the diffusion model was distilled for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from meddiff_steps import config
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registries import is_of_students


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
