"""Section `privacy`: what may be released."""

from typing import Annotated, Literal

from pydantic import Field

from meddiff_steps.config.base import Fraction, Name, Optimiser, PositiveFloat, PositiveInt, Section
from meddiff_steps.config.choices import DetectorName


class EmbedderOptimiser(Optimiser):
    """Training of the learned copy detector."""

    steps: Annotated[
        int, Field(ge=1, description="Gradient steps. More where the planted copies are not all found.")
    ] = 300
    batch_size: Annotated[
        int,
        Field(ge=1, description="Scans per gradient step; each is told from all others of its batch. Bounds memory."),
    ] = 64
    learning_rate: Annotated[
        float, Field(gt=0.0, description="Largest step size of AdamW. Lower it where the loss jumps.")
    ] = 1e-3
    warmup_steps: Annotated[
        int,
        Field(ge=0, description="Steps over which the learning rate rises from 0; it then falls to 0 along a cosine."),
    ] = 20


class Embedder(Section):
    """The learned copy detector (SimCLR)."""

    temperature: PositiveFloat = Field(
        0.1, description="Of the NT-Xent loss; smaller attends to the nearest strangers."
    )
    optimiser: EmbedderOptimiser = Field(EmbedderOptimiser(), description="Training of the learned copy detector.")


class Privacy(Section):
    """What may be released: every synthetic image is compared with every training scan."""

    enforce: Literal["stop", "report"] = Field(
        "stop",
        description="`stop`: a gate that fails, too few calibration subjects (NOT_CALIBRATED) or detectors that miss "
        "planted copies end the run before the release; `report`: it is only told.",
    )
    level: Annotated[float, Field(gt=0.0, lt=0.5)] = Field(
        0.05,
        description="Share of unseen real subjects that the filter may take for copies; fixes the thresholds. Raise "
        "it where calibration subjects are few: 59 are needed at 0.05, 14 at 0.2, with three detectors.",
    )
    detectors: list[DetectorName] | None = Field(
        None,
        min_length=1,
        description="Copy detectors that judge each image, any of which may reject it; all when left out. Fewer need "
        "fewer calibration subjects and see fewer kinds of copies.",
    )
    subgroup: Name | None = Field(
        None,
        description="Categorical covariate whose levels get thresholds of their own where they have enough subjects.",
    )
    max_attempts: PositiveInt = Field(5, description="Draws per planned subject before it is given up as failed.")
    max_failed_share: Fraction = Field(
        0.05, description="Gate: share of planned subjects that were given up as failed, or left out as doubles."
    )
    # The nearest two of the demo's 1,000 scans have 0.977, of 185 IXI brains at 4 mm 0.980; a scan and itself with
    # 3 % noise have 0.997.
    duplicate_correlation: Annotated[float, Field(gt=0.5, lt=1.0)] = Field(
        0.99,
        description="Correlation of all voxels from which two synthetic images count as one; coarse images of many "
        "subjects need more.",
    )
    embedder: Embedder = Field(Embedder(), description="The learned copy detector.")
    bootstrap: Annotated[int, Field(ge=100)] = Field(
        500, description="Resamples behind the intervals of attacks and gates."
    )
    max_excess_copies: Fraction = Field(
        0.05, description="Gate: copies before the filter beyond those that unseen real scans would be taken for."
    )
    max_membership_auc: Annotated[float, Field(ge=0.5, le=1.0)] = Field(
        0.6,
        description="Gate: AUC of every membership attack on the released cohort; 0.5 is guessing, and as far below "
        "it tells as much.",
    )
    max_nearer_to_training: Annotated[float, Field(ge=0.5, le=1.0)] = Field(
        0.6,
        description="Gate: share of released images nearer to the training set than to as many unseen scans; as far "
        "below 0.5 tells as much.",
    )
    max_table_risk: Fraction = Field(
        0.1,
        description="Gate: success of singling out and attribute inference on the covariate table beyond that on "
        "subjects who were not trained on.",
    )
    min_recall: Fraction = Field(0.95, description="Gate: share of planted copies that the detectors must find.")
