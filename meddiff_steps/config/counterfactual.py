"""Section `counterfactual`: a real scan as it would look with another value of a covariate."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from meddiff_steps.config.base import SCANS, Name, NoOrLocalPath, PositiveInt, Scalar, Section, Weight
from meddiff_steps.core.errors import UserError


class Counterfactual(Section):
    """Counterfactuals of real scans: noised by inverted sampling, and drawn again with one covariate moved.

    Off without a covariate.
    """

    covariate: Name | None = Field(None, description="Covariate that is moved; all others stay what they are.")
    values: list[Scalar] = Field(
        [],
        description="Values that it is moved to: numbers within its range, or levels. When left out, `sweep_steps` "
        "values over the training subjects' range, or all levels.",
    )
    sweep_steps: Annotated[int, Field(ge=2)] = Field(5, description="Values of a sweep, where `values` is left out.")
    scans: list[str] = Field([], description=SCANS)
    most_scans: PositiveInt = Field(8, description="Scans at most, where `scans` is left out.")
    invert_with: Literal["covariates", "nothing"] = Field(
        "covariates",
        description="What the model is told while a scan is noised: its own covariates, or nothing. `nothing` moves "
        "scans further, and keeps less of who it is.",
    )
    depth: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.6,
        description="How far a scan is noised, as a share of the noise process. Larger changes more; at 1 little but "
        "its coarse shape is kept.",
    )
    guidance_scale: Weight = Field(
        1.5,
        description="Guidance towards the moved covariate; 1 is none beyond plain conditional sampling, and larger "
        "changes more.",
    )
    num_inference_steps: PositiveInt | None = Field(
        None,
        description="Steps of a whole process, each way; the default of `ddim` (`flow` for a flow model) when left "
        "out.",
    )
    classifier_guidance: Weight = Field(
        0.0,
        description="Weight of the gradient of a predictor of the covariate; 0 leaves it out. Raise it where the "
        "covariate does not move far enough.",
    )
    predictor: NoOrLocalPath = Field(
        None,
        description="TorchScript network of your own for `classifier_guidance`: of images (b, 1, *shape) in [0, 1] a "
        "number in the covariate's unit, (b, 1), or a logit per level in their order. A linear one that is fitted to "
        "training latents when left out.",
    )

    interpolation_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="Images between each of the scans and the next, as a picture; 0 makes none."
    )

    @property
    def moved(self) -> str:
        """The covariate that is moved.

        Raises
        ------
        UserError
            None is named.
        """
        if self.covariate is None:
            raise UserError(
                "counterfactual.covariate: not set, so nothing is moved. Name a covariate of the study, for example"
                " with --config 'counterfactual={covariate: age}'."
            )
        return self.covariate

    @model_validator(mode="after")
    def _a_predictor_is_used(self) -> Self:
        if self.predictor is not None and not self.classifier_guidance:
            raise ValueError("predictor: is given, and classifier_guidance, its weight, is 0; raise it")
        return self

    @model_validator(mode="after")
    def _values_need_a_covariate(self) -> Self:
        if self.values and self.covariate is None:
            raise ValueError("values are given but no covariate that takes them; set `covariate`")
        if len(set(self.values)) != len(self.values):
            raise ValueError(f"values must be distinct, found {self.values}")
        return self
