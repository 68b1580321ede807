"""Section `latents`: encoded scans."""

from pydantic import Field

from meddiff_steps.config.base import PositiveInt, Section


class Latents(Section):
    """What all training scans are encoded to, once."""

    batch_size: PositiveInt = Field(8, description="Scans encoded at once. Bounds memory; changes the last bits.")
