"""The drawing decoder as everything else sees it: what a decoded image leaves open, drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.core.registries import DRAWING_DECODERS
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.tone import ToneCurve


class DrawingDecoder(nn.Module, ABC):
    """Draws an image from p(image | decoded image); a variant derives from it.

    A first stage gives the mean of all images that a latent can mean, and a mean is soft.

    It denoises residuals, scan minus decoded image, of unit variance.  These are kept in blocks of voxels, of which it
    can learn from crops: its `forward` is told where a crop lies.

    Attributes
    ----------
    process
        Of the diffusion; what `forward` predicts is its target.
    block
        Voxels of a block along each axis.
    blocks_shape
        Blocks of an image along each axis.
    deviation
        Standard deviation of residuals, measured before training.
    tone
        Grey levels of what is drawn, the last thing that `draw` does; fitted after training.
    """

    process: NoiseProcess
    block: int
    blocks_shape: tuple[int, ...]
    deviation: Tensor
    tone: ToneCurve

    @abstractmethod
    def residual(self, images: Tensor, decoded: Tensor) -> Tensor:
        """What is to be drawn, of unit variance: (b, c, *blocks) of images and decoded ones, (b, 1, *spatial)."""

    @abstractmethod
    def in_blocks(self, decoded: Tensor) -> Tensor:
        """A decoded image (b, 1, *spatial) in [0, 1] as `forward` sees it, (b, c, *blocks)."""

    @abstractmethod
    def place(self, start: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        """Coordinates of blocks, (d, *size): of all, or of a crop that begins at block `start`."""

    @abstractmethod
    def forward(self, x: Tensor, timesteps: Tensor, decoded: Tensor, place: Tensor, slab: int | None = None) -> Tensor:
        """The prediction from noisy residuals.

        Parameters
        ----------
        x
            (b, c, *blocks), of an image or a crop.
        timesteps
            (b,).
        decoded
            Of `in_blocks`, the same crop.
        place
            Coordinates of the blocks, (b, d, *blocks).
        slab
            Planes of blocks that are computed at a time.
        """

    @abstractmethod
    def draw(self, decoded: Tensor, noise: Tensor, num_inference_steps: int, slab: int | None = None) -> Tensor:
        """One draw, float32 (b, 1, *spatial) in [0, 1].

        Parameters
        ----------
        decoded
            Images of a first stage, (b, 1, *spatial), clipped to [0, 1].
        noise
            Standard normal, of the same shape: all that is random in it.
        num_inference_steps
            Evaluations of the network; more draw better, and take longer.
        slab
            Planes of the first axis that are computed at a time, for less memory; the same but for rounding.
        """

    @abstractmethod
    def step(self, decoded: Tensor) -> Tensor:
        """One evaluation of the network in drawing from `decoded` (b, 1, *spatial); what it costs is counted on it."""

    @property
    @abstractmethod
    def costly(self) -> list[nn.Module]:
        """The parts that take nearly all of the time: what is worth compiling."""


def build(settings: config.Decoder, image_shape: Sequence[int]) -> DrawingDecoder:
    """The decoder that `settings.network` names, with fresh weights, for images (1, *spatial)."""
    assert settings.network is not None, "this study has no drawing decoder"
    return DRAWING_DECODERS.load(settings.network).build(settings, image_shape)
