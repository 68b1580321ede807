"""Section `inpainting`: a part of a scan is hidden, and drawn anew by the model."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from meddiff_steps.config.base import SCANS, NoOrPathPattern, PositiveFloat, PositiveInt, Section


class Hole(Section):
    """What is hidden of every scan: one of `file`, `box` and `ball_mm`."""

    file: NoOrPathPattern = Field(
        None,
        description="NIfTI mask or label map of a scan, with {subject_id}, {session_id}, {scan_id} in it, in the "
        "scan's world space and on any grid.",
    )
    labels: list[PositiveInt] = Field(
        [], description="Labels of `file` that are hidden; everything above 0 when left out."
    )
    grow_mm: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="Hides so much more around what `file` marks: a lesion's rim is rarely drawn wholly."
    )
    box: list[tuple[Annotated[int, Field(ge=0)], PositiveInt]] = Field(
        [], description="First voxel and the one after the last, along each axis of the study's grid."
    )
    ball_mm: PositiveFloat | None = Field(
        None,
        description="Diameter of a ball at a random place in each head, the same in every run: to measure how well "
        "holes are filled.",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if sum((self.file is not None, bool(self.box), self.ball_mm is not None)) > 1:
            raise ValueError("a hole is one of `file`, `box` and `ball_mm`; give one of them")
        if self.file is None and (self.labels or self.grow_mm):
            raise ValueError("`labels` and `grow_mm` are about a `file`; give one, or leave them out")
        if any(low >= high for low, high in self.box):
            raise ValueError(f"`box` needs a first voxel below the last on each axis, found {self.box}")
        return self

    @property
    def given(self) -> bool:
        """Whether anything is hidden."""
        return self.file is not None or bool(self.box) or self.ball_mm is not None


class Lesions(Section):
    """Lesions that are put into scans, so that what is beneath them is known."""

    diameter_mm: PositiveFloat | None = Field(
        None, description="Diameter of a ball at a random place in each head; without it none is put in."
    )
    masks: NoOrPathPattern = Field(
        None,
        description="Masks (NIfTI, in the space of the template that the study registers to), with * for what differs "
        "in their paths: scans get one each in turn, instead of a ball.",
    )
    contrast: Annotated[float, Field(ge=-1.0, le=1.0)] = Field(
        -0.3, description="What is added to grey values, of their range; dark on T1 is below 0."
    )

    @property
    def given(self) -> bool:
        """Whether any is put in."""
        return self.diameter_mm is not None or self.masks is not None


class Inpainting(Section):
    """Part of a scan drawn anew, given the rest: RePaint, beside smooth fillings.

    Off without a `hole` and without `lesions`.
    """

    hole: Hole = Field(Hole(), description="What is hidden.")
    lesions: Lesions = Field(
        Lesions(),
        description="Lesions that are put into scans and hidden instead of `hole`: does healing bring volumes back?",
    )
    scans: list[str] = Field([], description=SCANS)
    most_scans: PositiveInt = Field(12, description="Scans at most, where `scans` is left out.")
    samples: PositiveInt = Field(
        4, description="Draws for each scan; their spread says how much the rest of the scan leaves open."
    )
    num_inference_steps: PositiveInt | None = Field(
        None, description="Levels of noise; a third of the default of `ddim` (`flow` for a flow model) when left out."
    )
    jump_length: PositiveInt = Field(5, description="Steps that are gone again each time.")
    resamples: PositiveInt = Field(
        4, description="How often each of them is gone. At 1 what is drawn does not fit its surroundings."
    )
    seam: Literal["membrane", "copy"] = Field(
        "membrane",
        description="How what is drawn comes into the scan: with its difference at the rim taken off, or copied.",
    )
    tolerance: PositiveFloat = Field(
        0.1,
        description="A latent is known if what is hidden can move it by no more, in standard deviations. Lower hides "
        "more latents around the hole.",
    )

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return self.hole.given or self.lesions.given
