"""Section `reconstruction`: an image from a measurement that does not determine it."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from meddiff_steps.config.base import SCANS, NoOrPathPattern, PositiveFloat, PositiveInt, Section, Weight
from meddiff_steps.config.choices import OperatorName
from meddiff_steps.config.inpainting import Lesions
from meddiff_steps.core.registries import OPERATORS

Acceleration = Annotated[float, Field(gt=1.0)]
SliceFactor = Annotated[int, Field(ge=2)]


class Reconstruction(Section):
    """Scans from measurements of them, with the trained model as what is known of heads beforehand.

    Off without `operators`.
    """

    operators: list[OperatorName] = Field(
        [], description="What is measured. Each is done in all of its strengths: the next four keys."
    )
    accelerations: list[Acceleration] = Field(
        [4.0, 8.0], min_length=1, description="Of `mri`: lines of k-space, by those that are measured."
    )
    slice_factors: list[SliceFactor] = Field(
        [4], min_length=1, description="Of `super_resolution`: slices that one thick slice replaces."
    )
    noise_stds: list[PositiveFloat] = Field(
        [0.1], min_length=1, description="Of `denoising`: standard deviation, of the range of grey values."
    )
    counts: list[PositiveFloat] = Field(
        [30.0], min_length=1, description="Of `low_count`: quanta in a voxel of grey value 1."
    )
    noise_std: PositiveFloat = Field(
        0.02,
        description="Of `mri` and `super_resolution`: standard deviation of the noise of each value, of the range of "
        "grey values (k-space by a unitary transform).",
    )
    coils: PositiveInt = Field(6, description="Of `mri`: simulated coils.")
    calibration_share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.2, description="Of `mri`: share of each axis of k-space, in the middle, that is measured wholly."
    )
    blur_mm: PositiveFloat = Field(8.0, description="Of `low_count`: width of the point spread, half maximum.")
    measured: NoOrPathPattern = Field(
        None,
        description="File (.npz) of a scan's measurement, with {subject_id}, {session_id}, {scan_id} in it: `y`, and "
        "`mask` and `maps` for `mri`, `rate` for `low_count`, on the study's grid. Simulated from the scans when left "
        "out.",
    )
    methods: list[Literal["consistency", "projection", "posterior", "moments", "adaptive"]] = Field(
        ["consistency", "posterior"],
        min_length=1,
        description="How the model and the measurement meet: `consistency` (every estimate is moved to agree), "
        "`projection` (the state after every step is), `posterior` (by gradients, DPS), `moments` (by the covariance "
        "that the model implies; slow), `adaptive` (consistency, then the model itself is fitted to the measurement). "
        "Images of the first are written.",
    )
    scans: list[str] = Field([], description=SCANS)
    most_scans: PositiveInt = Field(8, description="Scans at most, where `scans` is left out.")
    samples: PositiveInt = Field(4, description="Draws for each scan and method; at 1 there is no map of their spread.")
    num_inference_steps: PositiveInt | None = Field(
        None, description="Steps of a run; the default of `ddim` (`flow` for a flow model) when left out."
    )
    posterior_scale: Weight = Field(
        600.0, description="Of `posterior`: how far it goes down the gradient. Too small ignores the measurement."
    )
    prior_std: PositiveFloat = Field(
        0.1,
        description="Of `consistency` and `projection`: standard deviation of grey values that the model leaves open "
        "before a measurement. Larger follows the measurement more.",
    )
    iterations: PositiveInt = Field(
        6, description="Of conjugate gradients, wherever a measurement and an image are brought together."
    )
    adaptation_steps: PositiveInt = Field(30, description="Of `adaptive`: gradient steps at most, for each scan.")
    adaptation_rate: PositiveFloat = Field(1e-4, description="Of `adaptive`: step size of Adam.")
    lesions: Lesions = Field(
        Lesions(), description="Lesions that are put into scans before they are measured: does the model erase them?"
    )

    @model_validator(mode="after")
    def _one_measurement(self) -> Self:
        if len(set(self.operators)) != len(self.operators) or len(set(self.methods)) != len(self.methods):
            raise ValueError("`operators` and `methods` must be distinct")
        if self.measured is not None and len(self.tasks) != 1:
            raise ValueError("`measured` are files of one operator in one strength; name just that one")
        if self.measured is not None and self.lesions.given:
            raise ValueError("no lesion can be put into what was measured; leave `lesions` or `measured` out")
        return self

    @property
    def tasks(self) -> list[tuple[str, float]]:
        """Operators and strengths, in order."""
        strengths = {name: getattr(self, OPERATORS.entry(name)["strengths"]) for name in self.operators}
        return [(name, float(value)) for name, values in strengths.items() for value in values]
