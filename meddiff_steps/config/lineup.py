"""Section `lineup`: a blind test, real and synthetic images for people to tell apart."""

from typing import Annotated

from pydantic import Field

from meddiff_steps.config.base import Section


class Lineup(Section):
    """A page of real and synthetic images in random order, for people to tell apart."""

    images: Annotated[int, Field(ge=2, le=200)] = Field(
        20, description="Held-out scans on the page, of one subject each, and as many synthetic images."
    )
    seed: str | None = Field(
        None,
        min_length=1,
        description="Root of the order, and of who is shown; another one makes another page. The study's `seed` when "
        "left out.",
    )
