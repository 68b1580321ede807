"""Section `anomaly`: maps of what is unusual in a scan."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from meddiff_steps.config.base import (
    SCANS,
    Count,
    Name,
    NoOrPathPattern,
    PositiveFloat,
    PositiveInt,
    Scalar,
    Section,
    Weight,
)
from meddiff_steps.config.choices import AnomalyMapName
from meddiff_steps.config.inpainting import Lesions
from meddiff_steps.core.registries import ANOMALY_MAPS

Depth = Annotated[float, Field(gt=0.0, lt=1.0)]
Rate = Annotated[float, Field(gt=0.0, lt=1.0)]


class Anomaly(Section):
    """Maps of what is unusual in scans, by what the trained model would put there, beside maps without a model.

    Off without `methods`.
    """

    methods: list[AnomalyMapName] = Field(
        [],
        description="How a scan is made healthy. Maps without a model (`z_score`, `asymmetry`, `intensity`) always "
        "stand beside them.",
    )
    scans: list[str] = Field([], description=SCANS)
    most_scans: PositiveInt = Field(64, description="Scans at most, where `scans` is left out.")
    most_calibration_scans: PositiveInt = Field(
        200,
        description="Healthy scans of the calibration split at most, that thresholds are taken from: all "
        "of each person, where that leaves enough people.",
    )
    masks: NoOrPathPattern = Field(
        None,
        description="Lesion mask of a scan, with {subject_id}, {session_id}, {scan_id} in it, on the scan's own grid. "
        "Without masks there are maps and scores, and no figures of how well lesions are found.",
    )
    lesions: Lesions = Field(
        Lesions(),
        description="Lesions that are put into half of the scans, by lot, instead of `masks`: a truth where there is "
        "none.",
    )
    healthy: dict[Name, Scalar] = Field(
        {},
        description="Values of covariates that healthy scans have, for example {lesion: '0'}. The model is asked for "
        "these, and never told a scan's own. Leave it out where the model learnt from healthy scans alone.",
    )
    look_for: Literal["bright", "dark", "any"] = Field(
        "any", description="What lesions are: brighter than what is usual, darker, or either."
    )
    margin_voxels: Count = Field(
        1, description="Outermost voxels of the head, scalp and skull, that are left out of every map."
    )
    smoothing_voxels: Weight = Field(0.75, description="Standard deviation of the Gaussian that maps are smoothed by.")
    score_share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.01, description="A scan's score is the mean of its map over this share of the head's voxels, the highest."
    )
    voxel_false_positive_rate: Rate = Field(
        0.01,
        description="Share of the voxels of healthy heads that are marked: the threshold of maps, from healthy scans "
        "of the calibration split.",
    )
    subject_false_positive_rate: Rate = Field(
        0.1,
        description="Share of healthy people of whom any scan is flagged, if they have as many scans as those of the "
        "calibration split: the threshold of scores, from the same scans. It needs 1 / rate - 1 of these people, and "
        "at least 2.",
    )
    num_inference_steps: PositiveInt = Field(30, description="Levels of noise of a whole run.")
    samples: PositiveInt = Field(2, description="Draws that are averaged, of methods that add noise.")
    depths: list[Depth] = Field(
        [0.3, 0.5],
        min_length=1,
        description="How far scans are noised, as shares of the noise process; maps of all depths are averaged. Too "
        "little keeps the lesion, too much loses the person.",
    )
    octaves: PositiveInt = Field(6, description="Of `simplex_noise`: octaves, each of twice the frequency.")
    persistence: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.8, description="Of `simplex_noise`: size of an octave, of that of the one before."
    )
    wavelength: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.25, description="Of `simplex_noise`: length of its longest waves, of the width of the image."
    )
    coarse_cells: Annotated[int, Field(ge=2)] = Field(
        2, description="Of `coarse_noise`: cells of the latents that one value of the noise fills, along an axis."
    )
    patch_cells: Annotated[int, Field(ge=1)] = Field(
        4,
        description="Of `patches` and `modality_cycles`: cells of the latents, and blocks of `translation.block` "
        "voxels, along an axis that are drawn again at once.",
    )
    inversion_depth: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.4, description="Of `classifier_free` and `classifier`: how far scans are taken back, as a share of the noise."
    )
    guidance_scale: Weight = Field(3.0, description="Of `classifier_free`: guidance towards `healthy`.")
    classifier_guidance: PositiveFloat = Field(
        2.0, description="Of `classifier`: weight of the gradient of a predictor of `healthy`."
    )
    healing_percentile: Annotated[float, Field(gt=0.0, lt=100.0)] = Field(
        97.5,
        description="Of `healing`: latents that surprise the model more than this share of those of healthy validation "
        "scans are drawn anew.",
    )

    @property
    def images_held(self) -> int:
        """Images of 4 bytes a voxel that are held of one scan, at most: itself, its lesion and head, three maps
        without a model and the ensemble, maps of every method at every depth and of all, the scan as each expects it,
        and three while thresholds are found.
        """
        return 10 + len(self.methods) * (2 + len(self.depths))

    def need(self, what: str) -> bool:
        """Whether any of the methods says in its entry that it needs this."""
        return any(what in ANOMALY_MAPS.entry(name)["needs"] for name in self.methods)

    @model_validator(mode="after")
    def _one_truth(self) -> Self:
        if len(set(self.methods)) != len(self.methods) or len(set(self.depths)) != len(self.depths):
            raise ValueError("`methods` and `depths` must be distinct")
        if self.masks is not None and self.lesions.given:
            raise ValueError("lesions are known by `masks` or put in by `lesions`; give one of them")
        return self
