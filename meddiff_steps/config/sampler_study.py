"""Section `sampler_study`: which sampler, how many steps, how much guidance."""

from typing import Annotated

from pydantic import Field

from meddiff_steps.config.base import PositiveInt, Section, Weight
from meddiff_steps.config.choices import Sampler


class SamplerStudy(Section):
    """Quality against steps and seconds, for the target `sampler_study`."""

    samplers: list[Sampler] | None = Field(
        None,
        min_length=1,
        description="Those compared; by default all that can sample the model but `ddpm`, which takes hundreds of "
        "steps.",
    )
    num_inference_steps: list[PositiveInt] = Field([4, 8, 16], min_length=1, description="Steps of each sampler.")
    guidance_scales: list[Weight] = Field([1.0, 1.5], min_length=1, description="Guidance scales of each sampler.")
    images: Annotated[int, Field(ge=20)] = Field(
        48, description="Synthetic images per sampler, steps and scale: the first planned subjects, the same for all."
    )
