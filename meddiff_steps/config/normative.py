"""Section `normative`: how far a scan is from what a reference population of its covariates looks like."""

from typing import Annotated

from pydantic import Field

from meddiff_steps.config.base import SCANS, Name, PositiveFloat, PositiveInt, Section, Weight
from meddiff_steps.config.inpainting import Lesions


class Normative(Section):
    """Normative deviation maps: a scan beside draws of the reference population that share its coarse anatomy, as a z
    that held-out subjects of the reference calibrate.

    Off without `wanted`.
    """

    wanted: bool = Field(False, description="Whether maps are made; the target `normative` needs it.")
    reference: dict[Name, str] = Field(
        {},
        description="Levels of categorical covariates that make the reference, for example {diagnosis: CN}; subjects "
        "of the calibration split that have them say what is normal. Empty: everybody.",
    )
    matched: list[Name] = Field(
        [],
        description="Covariates of a scan that the reference shares, for example age and sex; all when left out. What "
        "a disease changes (a volume) should not be among them, else it is normal for a scan of that volume.",
    )
    scans: list[str] = Field([], description=SCANS)
    most_scans: PositiveInt = Field(24, description="Scans at most, where `scans` is left out.")
    calibration_scans: Annotated[int, Field(ge=3)] = Field(
        40, description="Scans of the reference in the calibration split at most, which say how far healthy scans are."
    )
    samples: Annotated[int, Field(ge=2)] = Field(8, description="Draws of the reference for each scan.")
    depth: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.3,
        description="How far a scan is noised before it is drawn anew, as a share of the noise process. Larger forgets "
        "more of it, lesions and anatomy.",
    )
    guidance_scale: Weight = Field(1.0, description="Guidance of the draws by the reference's covariates.")
    num_inference_steps: PositiveInt | None = Field(
        None,
        description="Steps of a whole process; the default of `ddim` (`flow` for a flow model) when left out.",
    )
    smoothing_mm: PositiveFloat = Field(
        10.0, description="Full width at half maximum of the Gaussian that images are compared through."
    )
    beyond: PositiveFloat = Field(
        1.96, description="|z| that counts as a deviation; of healthy scans 5 % are beyond 1.96."
    )
    lesions: Lesions = Field(
        Lesions(), description="Lesions that are put into scans of the reference: are they found, and where?"
    )
