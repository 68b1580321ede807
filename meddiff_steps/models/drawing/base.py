"""The drawing decoder as everything else sees it: what a decoded image leaves open, drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.core.registries import DRAWING_DECODERS, SAMPLERS
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.sampling import sample
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.blocks import coordinates, dense
from meddiff_steps.models.first_stage.stem import Stem
from meddiff_steps.models.tone import ToneCurve

#: v-prediction on the default schedule: of residuals of unit variance, that is EDM's preconditioning.
PROCESS = NoiseProcess.of(config.Diffusion())


def sampler() -> str:
    """What takes the residual from noise to an image; loaded here, so that its code counts as code of every decoder
    (`core.code_digest`).
    """
    SAMPLERS.load("dpmpp")
    return "dpmpp"


class DrawingDecoder(nn.Module, ABC):
    """Draws an image from p(image | decoded image); a variant derives from it, and is the network.

    A first stage gives the mean of all images that a latent can mean, and a mean is soft.  What is drawn is the
    residual, scan minus decoded image, of unit variance, by a diffusion of its own.  It is kept in blocks of two voxels
    along each axis, as Haar coefficients; that is orthonormal, so that white noise stays white.

    Parameters
    ----------
    image_shape
        (1, *spatial), even along each axis.

    Attributes
    ----------
    process
        Of the diffusion; what `forward` predicts is its target.
    block
        Voxels of a block along each axis.
    blocks_shape
        Blocks of an image along each axis.
    channels
        Numbers per block.
    deviation
        Standard deviation of residuals, measured before training.
    tone
        Grey levels of what is drawn, the last thing that `draw` does; fitted after training.
    """

    process = PROCESS
    deviation: Tensor

    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__()
        self.stem = Stem(len(image_shape) - 1, "haar")
        self.block, self.channels = self.stem.factor, self.stem.channels(1)
        self.blocks_shape = tuple(n // self.block for n in image_shape[1:])
        self.register_buffer("deviation", torch.ones(()))
        self.tone = ToneCurve()

    @abstractmethod
    def forward(self, x: Tensor, timesteps: Tensor, decoded: Tensor, place: Tensor, slab: int | None = None) -> Tensor:
        """The prediction from noisy residuals, float32 and shaped as these; of an image, or of a crop.

        Parameters
        ----------
        x
            (b, channels, *blocks).
        timesteps
            (b,).
        decoded
            Of `in_blocks`, as x.
        place
            Coordinates of the blocks, (b, d, *blocks).
        slab
            Planes of blocks that are computed at a time.
        """

    @property
    @abstractmethod
    def costly(self) -> list[nn.Module]:
        """The parts that take nearly all of the time: what is worth compiling."""

    def residual(self, images: Tensor, decoded: Tensor) -> Tensor:
        """What is to be drawn, of unit variance: (b, channels, *blocks) of images and decoded ones (b, 1, ...)."""
        return self.stem((images - decoded) / self.deviation)

    def in_blocks(self, decoded: Tensor) -> Tensor:
        """A decoded image (b, 1, *spatial) in [0, 1] as `forward` sees it, (b, channels, *blocks)."""
        return dense(self.stem(decoded * 2.0 - 1.0))

    def place(self, start: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        """Coordinates of blocks, (d, *size): of all, or of a crop that begins at block `start`."""
        whole = coordinates(self.blocks_shape)
        if start is None or size is None:
            return whole
        return whole[(slice(None), *(slice(low, low + n) for low, n in zip(start, size, strict=True)))]

    def step(self, decoded: Tensor) -> Tensor:
        """One evaluation of the network in drawing from `decoded` (b, 1, *spatial); what it costs is counted on it."""
        seen = self.in_blocks(decoded)
        return self(seen, seen.new_zeros(len(seen)), seen, self._places(seen))

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
        seen = self.in_blocks(decoded)
        place = self._places(seen)
        planes = None if slab is None else max(1, slab // self.block)
        drawn = sample(
            lambda x, timesteps, condition: self(dense(x), timesteps, condition.maps["decoded"], place, planes),
            self.stem(noise),
            Condition(seen.new_zeros(len(seen), 0), {"decoded": seen}),
            PROCESS,
            sampler(),
            num_inference_steps=num_inference_steps,
        )
        return self.tone((decoded + self.deviation * self.stem.inverse(drawn).float()).clamp(0.0, 1.0))

    def _places(self, seen: Tensor) -> Tensor:
        """Coordinates of all blocks for a batch, (b, d, *blocks)."""
        return self.place().to(seen).expand(len(seen), -1, *(-1 for _ in self.blocks_shape))


def build(settings: config.Decoder, image_shape: Sequence[int]) -> DrawingDecoder:
    """The decoder that `settings.network` names, with fresh weights, for images (1, *spatial)."""
    assert settings.network is not None, "this study has no drawing decoder"
    return DRAWING_DECODERS.load(settings.network).build(settings, image_shape)
