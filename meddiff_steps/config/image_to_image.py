"""Sections `segmentation_ensemble`, `translation` and `harmonisation`: an image drawn from other images."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from meddiff_steps.config.base import (
    SCANS,
    Count,
    Fraction,
    Name,
    NetworkOptimiser,
    PositiveFloat,
    PositiveInt,
    Section,
    Weight,
)
from meddiff_steps.config.diffusion import Diffusion, NoiseLevels


class ImageToImageOptimiser(NetworkOptimiser):
    """Training of a network that draws images from images, and of the one without noise beside it."""

    steps: Annotated[
        int, Field(ge=1, description="Gradient steps of each network. Too few give vague draws; watch `val/loss`.")
    ] = 1500
    batch_size: Annotated[
        int, Field(ge=1, description="Images per gradient step, of all GPUs together. Bounds memory.")
    ] = 16


#: What `block` means, wherever it has a default of its own.
BLOCK = (
    "Voxels along each axis that become channels of one place (Haar wavelets) before the network: 4 is 16 times less "
    "work in 2D than 1, and enough for masks; grey values are grainy in blocks of 4. Must divide `preprocess.shape`."
)


class DrawingNetwork(Section):
    """A network that draws an image from images."""

    block: Literal[1, 2, 4] = Field(4, description=BLOCK)
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
    patch: list[PositiveInt] | None = Field(
        None,
        description="Voxels along each axis of patches to train on, at random places, instead of whole scans (Bieder "
        "et al. 2023): memory of the training falls with their size. Whole scans are drawn all the same. Multiples of "
        "`block`, and for a `unet` of what it halves; large beside what a `resnet` sees.",
    )
    coordinates: bool = Field(
        True, description="Whether the network is told where each place lies, and draws about the mean there."
    )
    levels: NoiseLevels = Field(NoiseLevels(mean=0.4, deviation=1.4), description="Noise levels that are trained on.")
    optimiser: ImageToImageOptimiser = Field(ImageToImageOptimiser(), description="Training.")
    samples: Annotated[int, Field(ge=2)] = Field(
        8, description="Draws of each scan: their mean is the best guess, their variance says how unsure it is."
    )
    num_inference_steps: PositiveInt = Field(10, description="Evaluations of the network per draw.")
    scans: list[str] = Field([], description=SCANS)
    most_scans: PositiveInt = Field(400, description="Scans at most, where `scans` is left out.")
    most_images: PositiveInt = Field(24, description="Scans whose images are written; all of them are measured.")

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if set(self.target) & set(self.source) and not getattr(self, "missing", False):
            raise ValueError(f"source and target share {sorted(set(self.target) & set(self.source))[0]}")
        for name in ("source", "target"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name} names an image twice, found {given}")
        return self

    @property
    def denoiser(self) -> Diffusion:
        """The network as a denoiser is built."""
        return super().denoiser.model_copy(update={"levels": self.levels})

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

    levels: NoiseLevels = Field(
        NoiseLevels(mean=3.0, deviation=1.4),
        description="Noise levels that are trained on: higher than of images, for marks are seen under more noise.",
    )
    start: Fraction = Field(
        0.5,
        description="Draws are also begun at this share of the noise levels, from the mask of the network without "
        "noise (Guo et al. 2022): fewer evaluations. At 0 that is left out.",
    )
    labelled: list[PositiveInt] = Field(
        [],
        description="Numbers of labelled training subjects, for example [5, 10, 20]: networks without noise are trained"
        " with the labels of so many alone, and of all, to compare. Smaller numbers are parts of larger ones.",
    )
    pretraining_steps: Annotated[int, Field(ge=0)] = Field(
        0,
        description="With `labelled`: gradient steps in which a network learns to denoise all training images, without "
        "labels; networks that start from it are trained beside those from scratch (Rousseau et al. 2023).",
    )
    beside: list[Literal["whole", "unplaced"]] = Field(
        [],
        description="With `patch`: what is trained beside, to compare. `whole`: on whole scans, for as many steps less "
        "as they have more voxels; `unplaced`: on patches, without `coordinates`.",
    )

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        for name in ("labelled", "beside"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name} names something twice, found {given}")
        return self

    @property
    def few_labels(self) -> list[str]:
        """Networks that learn from some labels, or from all, by name."""
        counts = [*map(str, sorted(self.labelled)), "all"] if self.labelled else []
        return [f"{way}_{n}" for n in counts for way in ("scratch", *["pretrained"] * bool(self.pretraining_steps))]

    def compared(self, name: str, shape: Sequence[int]) -> Self:
        """Settings of what is trained `beside` on scans of a shape."""
        if name == "unplaced":
            return self.model_copy(update={"coordinates": False})
        assert self.patch is not None, "checked where the section is read"
        steps = math.ceil(self.optimiser.steps * math.prod(self.patch) / math.prod(shape))
        return self.model_copy(update={"patch": None, "optimiser": self.optimiser.model_copy(update={"steps": steps})})


class UnpairedOptimiser(NetworkOptimiser):
    """Training of networks between two groups of images that are not paired."""

    steps: Annotated[
        int, Field(ge=1, description="Gradient steps of all networks together. Too few leave images as they are.")
    ] = 1500
    batch_size: Annotated[int, Field(ge=1, description="Images of either group per gradient step. Bounds memory.")] = 8
    learning_rate: Annotated[
        float,
        Field(
            gt=0.0,
            description="Largest step size of what draws, smaller than that of the critics, which have to stay ahead.",
        ),
    ] = 3e-4


class Unpaired(DrawingNetwork):
    """Networks between two groups of images of which no two belong together (SynDiff, Özbey et al. 2023): each way, one
    that guesses at once, and one that draws in a few large steps of diffusion, from what the other way's guess gives.
    """

    block: Literal[1, 2, 4] = Field(2, description=BLOCK)
    num_inference_steps: PositiveInt = Field(4, description="Steps of diffusion, which are also those of training.")
    cycle_weight: Weight = Field(
        0.5, description="Weight of the way there and back, which has to end where it began, beside the critics."
    )
    critic_channels: PositiveInt = Field(32, description="Feature channels of the networks that tell drawn from real.")
    critic_blocks: PositiveInt = Field(4, description="Residual blocks of these: more of them see further.")
    critic_rate: PositiveFloat = Field(1e-3, description="Step size of these.")
    critic_penalty: Weight = Field(
        0.1, description="Weight of the squared gradient of the critics at real images (R1, Mescheder et al. 2018)."
    )
    optimiser: UnpairedOptimiser = Field(UnpairedOptimiser(), description="Training.")


class Translation(ImageToImage):
    """Another contrast of real scans, drawn from those that there are: a network without noise says its mean, and a
    diffusion draws what is left (CorrDiff, Mardani et al. 2023).

    With `missing` one model draws any contrast from any others (Palette with sources that are left out at random).
    """

    block: Literal[1, 2, 4] = Field(2, description=BLOCK)
    missing: bool = Field(
        False,
        description="Any of `source` may be missing, also what `target` names: each step of the training leaves some "
        "out, and the network is told which are there. A channel with `required: false` may be lacking in scans.",
    )
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
    cycle: bool = Field(
        False,
        description="Learn from scans with the values of `anomaly.healthy` alone, and learn the way back from `target` "
        "to the scan, too: what the anomaly map `modality_cycles` asks.",
    )
    volume_steps: Count = Field(
        0,
        description="Of volumes: above 0, networks look at one slice at a time (along the last axis), `block` is of "
        "voxels of a slice, and the diffusion is then made volume-wise by layers across slices that are inserted and "
        "trained for so many steps (Zhu et al. 2023b); a 3D one of the same cost stands beside it.",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.volume_steps and self.network != "resnet":
            raise ValueError(f"volume_steps needs network: resnet, found {self.network}")
        apart = {
            "missing": ("lesion", "cycle", "volume_steps", "patch", "unpaired"),
            "volume_steps": ("cycle", "patch"),
        }
        for one, others in apart.items():
            for other in others:
                if getattr(self, one) and getattr(self, other):
                    raise ValueError(f"{one} and {other} do not go together; leave one of them out")
        if self.missing and len(self.source) < 2:
            raise ValueError(
                f"missing: true needs two sources or more, found {self.source}; name them, or leave it out"
            )
        return self


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
    scans: list[str] = Field([], description=SCANS)
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
