"""Section `cost`: what `plan-cost` cannot know before a study has run."""

from pydantic import Field

from meddiff_steps.config.base import PositiveFloat, PositiveInt, Section


class Cost(Section):
    """What `plan-cost` reckons with; nothing else reads it, and a change of it runs nothing again."""

    scans: PositiveInt | None = Field(
        None,
        description="Scans in the cohort, for a plan where the cohort is not. `--scans` goes before it; a simulated "
        "cohort says it by itself.",
    )
    tflops: PositiveFloat | None = Field(
        None,
        description="TFLOP/s that a GPU sustains on the networks, as `--tflops`; a share of what its data sheet says.",
    )
