"""Section `evaluate`: how good synthetic images are measured to be."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from meddiff_steps.config.base import LocalPath, Name, PositiveInt, Section
from meddiff_steps.config.choices import FeatureSpaceName, MetricName
from meddiff_steps.core.registries import FEATURE_SPACES


class FeatureNetwork(Section):
    """A network of the user's own, whose features realism and diversity are measured on; nothing is downloaded."""

    name: Name = Field(description="Of the feature space in metrics.json and in the report.")
    weights: LocalPath = Field(
        description="A file on this machine: TorchScript, or safetensors of a MONAI ResNet. TorchScript is code: "
        "take it from whom you trust."
    )
    architecture: Literal["torchscript", "resnet10", "resnet18", "resnet34", "resnet50"] = Field(
        "torchscript", description="What the file holds: a TorchScript module, or the weights of this ResNet."
    )
    channels: PositiveInt = Field(1, description="Input channels; the grey image is repeated in each.")
    zscore: bool = Field(
        False,
        description="Give the network images with mean 0 and standard deviation 1 (MedicalNet) rather than in [0, 1].",
    )


class Evaluate(Section):
    """What is measured on synthetic images, each figure beside what real scans give."""

    seed: str | None = Field(
        None,
        min_length=1,
        description="Root of the random numbers of evaluation: resamples, pairs, folds, permutations. The study's "
        "`seed` when left out.",
    )
    bootstrap: Annotated[int, Field(ge=100)] = Field(
        1000, description="Resamples behind the intervals of covariate figures."
    )
    sweep_steps: Annotated[int, Field(ge=3)] = Field(5, description="Images per counterfactual sweep in the report.")
    max_images: Annotated[int, Field(ge=20, le=5000)] = Field(
        500,
        description="Synthetic, training and held-out images at most, of each, that realism and diversity are "
        "measured on.",
    )
    metrics: list[MetricName] | None = Field(
        None,
        min_length=1,
        description="Distances between real and synthetic images that realism is told by; all when left out.",
    )
    spaces: list[FeatureSpaceName] | None = Field(
        None,
        min_length=1,
        description="Built-in feature spaces that realism and diversity are measured in; all when left out. Those of "
        "`features` are added.",
    )
    realism_bootstrap: Annotated[int, Field(ge=100)] = Field(
        200, description="Resamples behind the intervals of Frechet, KID and Wasserstein distances."
    )
    permutations: Annotated[int, Field(ge=100)] = Field(
        1000, description="Of the test behind KID; the smallest p-value is 1 / (permutations + 1)."
    )
    ssim_pairs: PositiveInt = Field(
        100, description="Pairs of images whose similarity is averaged, of synthetic and of real images."
    )
    neighbours: PositiveInt = Field(
        5, description="Nearest neighbours that span the manifolds of precision, recall, density and coverage."
    )
    cutoffs: list[Annotated[float, Field(gt=0.0, lt=0.5)]] = Field(
        [0.05, 0.1, 0.2],
        description="Frequencies in cycles per voxel above which detail is removed before a classifier tells synthetic "
        "from real once more, each a point of a curve; none: all detail alone.",
    )
    sanity_images: Annotated[int, Field(ge=0, le=1000)] = Field(
        60,
        description="Held-out scans at most that are spoilt in known ways, to show which figure sees which fault; 0 "
        "leaves it out.",
    )
    features: list[FeatureNetwork] = Field(
        [], description="Feature spaces beside the built-in ones: networks whose weights you have."
    )

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        own = [network.name for network in self.features]
        if len(set(own)) != len(own) or set(own) & set(FEATURE_SPACES.names()):
            raise ValueError(
                f"features: names must be distinct and none of {', '.join(FEATURE_SPACES.names())}; found {own}"
            )
        return self
