"""Section `pairs`: images that are generated with their label maps; and the study of what these are good for."""

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from meddiff_steps.config.base import Fraction, Name, Optimiser, PositiveInt, Section

#: Numbers of structures in a released label map are uint8, and 0 is what lies outside.
MOST_STRUCTURES = 255


class PairsOptimiser(Optimiser):
    """Training of every segmenter of the study; the same in every arm."""

    steps: Annotated[int, Field(ge=1, description="Gradient steps of every segmenter, whatever its arm.")] = 300
    batch_size: Annotated[int, Field(ge=1, description="Pairs per gradient step. Bounds memory.")] = 4
    learning_rate: Annotated[
        float, Field(gt=0.0, description="Largest step size of AdamW. Lower it where the loss jumps.")
    ] = 3e-3
    warmup_steps: Annotated[
        int,
        Field(ge=0, description="Steps over which the learning rate rises from 0; it then falls to 0 along a cosine."),
    ] = 20
    ema_decay: Annotated[
        float, Field(ge=0.0, lt=1.0, description="Decay per step of the averaged weights that are tested.")
    ] = 0.98


class SegmentationStudy(Section):
    """Does a segmenter that also learns from synthetic pairs draw better on real scans that it has not seen?

    Every share of the real training subjects is an arm, alone and with all synthetic pairs; one more has these alone.
    """

    shares: list[Annotated[float, Field(gt=0.0, le=1.0)]] = Field(
        [0.1, 0.25, 1.0],
        min_length=1,
        description="Shares of the real training subjects. The verdict is about the first: with synthetic pairs beside "
        "them against without.",
    )
    synthetic: Annotated[
        float, Field(gt=0.0, lt=1.0, description="Chance that a pair of a batch is synthetic, in arms that have both.")
    ] = 0.5
    seeds: Annotated[int, Field(ge=2, le=100)] = Field(
        3, description="Segmenters per arm: initial weights and order of batches. Below 5, intervals are wide."
    )
    channels: list[PositiveInt] = Field(
        [16, 32, 64], min_length=2, description="Features of the U-Net at half, quarter, ... of the resolution."
    )
    max_shift_voxels: Annotated[int, Field(ge=0)] = Field(
        2, description="Every training pair, real or not, is shifted by up to so many whole voxels along each axis."
    )
    margin: Annotated[float, Field(gt=0.0, le=0.5)] = Field(
        0.02, description="Loss of Dice that would be tolerated (non-inferiority)."
    )
    bootstrap: Annotated[int, Field(ge=200)] = Field(2000, description="Resamples of subjects and seeds.")
    optimiser: PairsOptimiser = Field(PairsOptimiser(), description="Training of every segmenter.")

    @model_validator(mode="after")
    def _shares_differ(self) -> Self:
        if len(set(self.shares)) != len(self.shares):
            raise ValueError(f"shares: each once, found {self.shares}")
        return self


class Pairs(Section):
    """Label maps that are generated from covariates, and images that are generated from these label maps."""

    channel: Name = Field(description="The one of `preprocess.channels` that holds the label map of every scan.")
    structures: dict[Name, list[PositiveInt]] = Field(
        min_length=1,
        max_length=MOST_STRUCTURES,
        description="Labels of the scans' label maps by the structure that they belong to. Released label maps number "
        "the structures from 1 in alphabetical order. A structure named as a covariate in mL is also measured.",
    )
    outside: list[PositiveInt] = Field(
        [], description="Labels that count as 0, outside of all structures. A label that is in neither list is refused."
    )
    empty_share: Fraction = Field(
        0.0,
        description="Largest share of scans whose label map shows none of the structures. Above 0 for lesions, which "
        "not everybody has.",
    )

    @field_validator("structures")
    @classmethod
    def _in_one_order(cls, value: dict[str, list[int]]) -> dict[str, list[int]]:
        return dict(sorted(value.items()))  # canonical JSON, which steps read, keeps no other

    @model_validator(mode="after")
    def _each_label_once(self) -> Self:
        named = [label for labels in (*self.structures.values(), self.outside) for label in labels]
        twice = sorted({label for label in named if named.count(label) > 1})
        if twice:
            raise ValueError(f"labels {twice} are named more than once in structures and outside; name each once")
        if empty := [name for name, labels in self.structures.items() if not labels]:
            raise ValueError(f"structures.{empty[0]}: no label; name at least one, or leave the structure out")
        return self
