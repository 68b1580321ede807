"""Section `decoder`: what draws the detail that latents leave open."""

from typing import Annotated

from pydantic import Field

from meddiff_steps.config.base import NetworkOptimiser, PositiveInt, Section, Weight
from meddiff_steps.config.choices import DrawingDecoderName


class DecoderOptimiser(NetworkOptimiser):
    """Training of the drawing decoder."""

    steps: Annotated[
        int, Field(ge=0, description="Gradient steps. Too few leave grain. 0 takes the weights of `init_from`.")
    ] = 1200
    batch_size: Annotated[
        int, Field(ge=1, description="Crops per gradient step, of all GPUs together. Bounds memory.")
    ] = 12


class Decoder(Section):
    """Drawing decoder: a small diffusion of scan minus decoded image, so that images are as sharp as scans."""

    network: DrawingDecoderName | None = Field(
        "residual_diffusion",
        description="Kind of drawing decoder; `null` leaves images as the autoencoder decodes them.",
    )
    channels: PositiveInt = Field(64, description="Feature channels.")
    num_res_blocks: PositiveInt = Field(4, description="Residual blocks; each sees four voxels further.")
    crop: PositiveInt = Field(24, description="Voxels along each axis of the pieces of scans it learns from; even.")
    latent_noise: Weight = Field(
        0.2,
        description="Largest noise on the latents of the decoded images it learns from, in standard deviations of an "
        "image's latents: about the error of the diffusion model.",
    )
    optimiser: DecoderOptimiser = Field(DecoderOptimiser(), description="Training of the drawing decoder.")
