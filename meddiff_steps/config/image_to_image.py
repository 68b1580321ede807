"""Sections `segmentation_ensemble`, `translation` and `harmonisation`: an image drawn from other images."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from meddiff_steps.config.base import Fraction, Name, NetworkOptimiser, PositiveFloat, PositiveInt, Section, Weight
from meddiff_steps.config.diffusion import Diffusion, NoiseLevels


class ImageToImageOptimiser(NetworkOptimiser):
    """Training of a network that draws images from images, and of the one without noise beside it."""

    steps: Annotated[
        int, Field(ge=1, description="Gradient steps of each network. Too few give vague draws; watch `val/loss`.")
    ] = 1500
    batch_size: Annotated[
        int, Field(ge=1, description="Images per gradient step, of all GPUs together. Bounds memory.")
    ] = 16


class DrawingNetwork(Section):
    """A network that draws an image from images."""

    block: Literal[1, 2, 4] = Field(
        4,
        description="Voxels along each axis that become channels of one place (Haar wavelets) before the network: 4 "
        "is 16 times less work in 2D than 1. Must divide `preprocess.shape`.",
    )
    network: Literal["resnet", "unet"] = Field(
        "resnet",
        description="`resnet`: residual blocks of one size, the first of `channels`; learns fastest, sees what is near "
        "(`block` times 2 x `num_res_blocks` + 2 voxels). `unet`: MONAI's, which sees the whole image.",
    )
    channels: list[PositiveInt] = Field(
        [64],
        min_length=1,
        description="Feature channels per level; each level after the first halves the size. `unet`: multiples of 16, "
        "the last of 32.",
    )
    num_res_blocks: PositiveInt = Field(4, description="Residual blocks per level.")

    @model_validator(mode="after")
    def _a_network_can_be_built(self) -> Self:
        _ = self.denoiser  # its keys are checked where they are declared
        return self

    @property
    def denoiser(self) -> Diffusion:
        """The network as a denoiser is built."""
        return Diffusion(
            network=self.network,
            channels=self.channels,
            attention_levels=[False] * len(self.channels),
            num_res_blocks=self.num_res_blocks,
        )


class ImageToImage(DrawingNetwork):
    """One image of a scan from others: a diffusion that sees them beside its state (Palette, Saharia et al. 2022), and
    the same network trained without noise for as many steps, to compare with.

    Off without a `target`.
    """

    source: list[Name] = Field(
        ["image"],
        min_length=1,
        description="What is given: `image` (the scan itself), contrasts and masks among `preprocess.channels`.",
    )
    target: list[Name] = Field([], description="What is drawn, by the same names.")
    levels: NoiseLevels = Field(NoiseLevels(mean=0.4, deviation=1.4), description="Noise levels that are trained on.")
    optimiser: ImageToImageOptimiser = Field(ImageToImageOptimiser(), description="Training.")
    samples: Annotated[int, Field(ge=2)] = Field(
        8, description="Draws of each scan: their mean is the best guess, their variance says how unsure it is."
    )
    num_inference_steps: PositiveInt = Field(10, description="Evaluations of the network per draw.")
    scans: list[str] = Field(
        [],
        description="Scans by their `scan_id` in the manifest; the first `most_scans` of the test split when left out.",
    )
    most_scans: PositiveInt = Field(400, description="Scans at most, where `scans` is left out.")
    most_images: PositiveInt = Field(24, description="Scans whose images are written; all of them are measured.")

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if self.target and set(self.target) & set(self.source):
            raise ValueError(f"source and target share {sorted(set(self.target) & set(self.source))[0]}")
        for name in ("source", "target"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name} names an image twice, found {given}")
        return self

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.target)


class SegmentationEnsemble(ImageToImage):
    """A structure of real scans, marked by several draws of a diffusion (Wolleb et al. 2022), beside one network
    without noise.

    `target` is one channel of kind `mask` or `labels`; several, where several readers marked each scan: draws then
    differ as readers do.  (Section `segmentation` is about something else: an instrument that measures volumes.)
    """

    start: Fraction = Field(
        0.5,
        description="Draws are also begun at this share of the noise levels, from the mask of the network without "
        "noise (Guo et al. 2022): fewer evaluations. At 0 that is left out.",
    )


class UnpairedOptimiser(NetworkOptimiser):
    """Training of networks between two groups of images that are not paired."""

    steps: Annotated[
        int, Field(ge=1, description="Gradient steps of all networks together. Too few leave images as they are.")
    ] = 1000
    batch_size: Annotated[int, Field(ge=1, description="Images of either group per gradient step. Bounds memory.")] = 8
    learning_rate: Annotated[
        float,
        Field(gt=0.0, description="Largest step size of what draws. Lower it where the critics' loss falls to 0."),
    ] = 1e-3


class Unpaired(DrawingNetwork):
    """Networks between two groups of images of which no two belong together (SynDiff, Özbey et al. 2023): each way, one
    that guesses at once, and one that draws in a few large steps of diffusion, from what the other way's guess gives.
    """

    num_inference_steps: PositiveInt = Field(4, description="Steps of diffusion, which are also those of training.")
    cycle_weight: Weight = Field(
        0.5, description="Weight of the way there and back, which has to end where it began, beside the critics."
    )
    critic_channels: PositiveInt = Field(32, description="Feature channels of the networks that tell drawn from real.")
    critic_blocks: PositiveInt = Field(2, description="Residual blocks of these: more of them see further.")
    critic_rate: PositiveFloat = Field(5e-4, description="Step size of these.")
    critic_penalty: Weight = Field(
        1.0, description="Weight of the squared gradient of the critics at real images (R1, Mescheder et al. 2018)."
    )
    optimiser: UnpairedOptimiser = Field(UnpairedOptimiser(), description="Training.")


class Translation(ImageToImage):
    """Another contrast of real scans, drawn from those that there are."""

    unpaired: Unpaired | None = Field(
        None,
        description="The same without pairs, beside it: networks that never see two contrasts of one subject. `{}` for "
        "defaults.",
    )

    lesion: Name | None = Field(
        None,
        description="A channel of kind `mask`: a segmenter that learnt to find it in true images of `target` is asked "
        "whether it is still there in translated ones.",
    )


class Harmonisation(Section):
    """Images of some sites or scanners, as those of another show them, by networks that see no person at two of them.

    Off without a `covariate`.
    """

    covariate: Name | None = Field(None, description="A categorical covariate: the site, the scanner, the protocol.")
    to: str = Field("", description="Its level whose look is taken.")
    others: list[str] = Field([], description="Levels that are taken to it; all others where left out.")
    channel: Name = Field("image", description="Images: `image` (the scan itself) or a contrast among the channels.")
    kept: list[Name] = Field(
        [], description="Covariates that shall be as readable afterwards; all of the study's others where left out."
    )
    unpaired: Unpaired = Field(Unpaired(), description="Networks and training.")
    samples: Annotated[int, Field(ge=2)] = Field(4, description="Draws of each image; their mean is written.")
    scans: list[str] = Field(
        [],
        description="Scans by their `scan_id` in the manifest; the first `most_scans` of the test split when left out.",
    )
    most_scans: PositiveInt = Field(400, description="Scans at most, where `scans` is left out.")
    most_images: PositiveInt = Field(24, description="Scans whose images are written; all of them are measured.")

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return self.covariate is not None

    @model_validator(mode="after")
    def _says_where_to(self) -> Self:
        if self.wanted and not self.to:
            raise ValueError("`to` is missing: the level of `covariate` whose look is taken")
        if self.to and self.to in self.others:
            raise ValueError(f"`others` has {self.to!r}, which is `to`")
        return self
