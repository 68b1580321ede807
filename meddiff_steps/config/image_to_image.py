"""Sections `segmentation_ensemble` and `translation`: an image drawn from other images of the same scan."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from meddiff_steps.config.base import Count, Fraction, Name, NetworkOptimiser, PositiveInt, Section
from meddiff_steps.config.diffusion import Diffusion, NoiseLevels


class ImageToImageOptimiser(NetworkOptimiser):
    """Training of a network that draws images from images, and of the one without noise beside it."""

    steps: Annotated[
        int, Field(ge=1, description="Gradient steps of each network. Too few give vague draws; watch `val/loss`.")
    ] = 1500
    batch_size: Annotated[
        int, Field(ge=1, description="Images per gradient step, of all GPUs together. Bounds memory.")
    ] = 16


class ImageToImage(Section):
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
    def _a_network_can_be_built(self) -> Self:
        if set(self.target) & set(self.source) and not getattr(self, "missing", False):
            raise ValueError(f"source and target share {sorted(set(self.target) & set(self.source))[0]}")
        for name in ("source", "target"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name} names an image twice, found {given}")
        _ = self.denoiser  # its keys are checked where they are declared
        return self

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.target)

    @property
    def denoiser(self) -> Diffusion:
        """The network as a denoiser is built."""
        return Diffusion(
            network=self.network,
            channels=self.channels,
            attention_levels=[False] * len(self.channels),
            num_res_blocks=self.num_res_blocks,
            levels=self.levels,
        )


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


class Translation(ImageToImage):
    """Another contrast of real scans, drawn from those that there are.

    With `missing` one model draws any contrast from any others (Palette with sources that are left out at random).
    """

    missing: bool = Field(
        False,
        description="Any of `source` may be missing, also what `target` names: each step of the training leaves some "
        "out, and the network is told which are there. A channel with `required: false` may be lacking in scans.",
    )

    lesion: Name | None = Field(
        None,
        description="A channel of kind `mask`: a segmenter that learnt to find it in true images of `target` is asked "
        "whether it is still there in translated ones.",
    )

    volume_steps: Count = Field(
        0,
        description="Of volumes: above 0, networks look at one slice at a time (along the last axis), `block` is of "
        "voxels of a slice, and the diffusion is then made volume-wise by layers across slices that are inserted and "
        "trained for so many steps (Zhu et al. 2023b); a 3D one of the same cost stands beside it.",
    )

    @model_validator(mode="after")
    def _slices_have_a_network(self) -> Self:
        if self.volume_steps and (self.network != "resnet" or self.missing):
            found = "missing: true" if self.missing else f"network: {self.network}"
            raise ValueError(f"volume_steps needs network: resnet, and no contrast missing, found {found}")
        return self

    @model_validator(mode="after")
    def _something_can_be_missing(self) -> Self:
        if self.missing and len(self.source) < 2:
            raise ValueError(
                f"missing: true needs two sources or more, found {self.source}; name them, or leave it out"
            )
        if self.missing and self.lesion is not None:
            raise ValueError("lesion is looked for in one contrast, found missing: true; leave one of both out")
        return self
