"""Section `segmentation`: label maps of the cohort."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from meddiff_steps.config.base import Name, Optimiser, PathPattern, PositiveInt, Section


class Structure(Section):
    """A structure in a label map."""

    labels: list[PositiveInt] = Field([], description="Labels that belong to it.")
    all_but: list[PositiveInt] = Field(
        [], description="Instead: labels that do not belong to it, while all others above 0 do."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if bool(self.labels) == bool(self.all_but):
            raise ValueError("a structure needs either `labels` or `all_but`, and not both")
        return self


class SegmenterOptimiser(Optimiser):
    """Training of the segmenter."""

    steps: Annotated[
        int, Field(ge=1, description="Gradient steps. More where held-out volumes are far from the label maps'.")
    ] = 400
    batch_size: Annotated[
        int, Field(ge=1, description="Scans per gradient step, at least 2 for batch normalisation. Bounds memory.")
    ] = 4
    learning_rate: Annotated[
        float, Field(gt=0.0, description="Largest step size of AdamW. Lower it where the loss jumps.")
    ] = 0.01
    warmup_steps: Annotated[
        int,
        Field(ge=0, description="Steps over which the learning rate rises from 0; it then falls to 0 along a cosine."),
    ] = 20
    ema_decay: Annotated[
        float,
        Field(
            ge=0.0, lt=1.0, description="Decay per step of the averaged weights that measure; about 1 - 5 / `steps`."
        ),
    ] = 0.98


class Segmentation(Section):
    """Label maps of real scans, from which a segmenter learns to measure volumes in synthetic ones.

    A second instrument beside the predictors.
    """

    labels: PathPattern = Field(
        description="Path of a scan's label map, with {subject_id}, {session_id}, {scan_id} in it; same world space "
        "as the scan.",
    )
    structures: dict[Name, Structure] = Field(
        min_length=1, description="Structures by the covariate, in mL, that is their volume."
    )
    channels: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt, PositiveInt] = Field(
        (16, 32, 64, 64, 64), description="Features of the U-Net at half, quarter, ... of the resolution."
    )
    optimiser: SegmenterOptimiser = Field(SegmenterOptimiser(), description="Training of the segmenter.")

    @model_validator(mode="after")
    def _batch_has_statistics(self) -> Self:
        if self.optimiser.batch_size < 2:
            raise ValueError("optimiser.batch_size must be at least 2 for batch normalisation, found 1")
        return self
