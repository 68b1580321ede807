"""Section `latents`: encoded scans, and the Gaussian model of them."""

from pydantic import Field

from meddiff_steps.config.base import Count, PositiveInt, Section


class Latents(Section):
    """What all training scans are encoded to, once, and the closed-form model of it that diffusion starts from."""

    gaussian_rank: Count = Field(
        128,
        description="Principal components of the Gaussian model of the latents that the diffusion network starts "
        "from, at most an eighth as many as there are training subjects; 0 leaves it out.",
    )
    batch_size: PositiveInt = Field(8, description="Scans encoded at once. Bounds memory; changes the last bits.")
