"""Section `autoencoder`: the first stage, from images to latents and back."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from meddiff_steps.config.base import (
    Count,
    NetworkOptimiser,
    NoOrLocalPath,
    PositiveFloat,
    PositiveInt,
    Section,
    Weight,
)
from meddiff_steps.config.choices import FirstStageName


class Perceptual(Section):
    """Distance between feature maps of a network of your own (Zhang et al. 2018); nothing is downloaded."""

    weight: Weight = Field(0.0, description="Weight of the term beside the mean absolute error; 0 leaves it out.")
    weights: NoOrLocalPath = Field(
        None,
        description="Path of a TorchScript file: from images (b, 1, ...) in [0, 1] to feature maps (b, c, ...); "
        "needed when weight is above 0.",
    )

    @model_validator(mode="after")
    def _weights_given(self) -> Self:
        if self.weight > 0 and self.weights is None:
            raise ValueError("perceptual.weight is above 0 but perceptual.weights names no file")
        return self


class Adversarial(Section):
    """Patch discriminator (least squares), as in Pinaya et al. 2022."""

    weight: Weight = Field(
        0.0, description="Weight of the term beside the mean absolute error; 0 leaves it out. Sharper, and less stable."
    )
    start_step: Count = Field(0, description="Step at which the term is switched on.")
    channels: PositiveInt = Field(
        32, description="Feature channels of the discriminator's first layer; they double with each."
    )
    layers: PositiveInt = Field(
        2, description="Layers of the discriminator that halve the size: more judge larger patches."
    )
    learning_rate: PositiveFloat = Field(2e-4, description="Step size of the discriminator's optimiser.")


class AutoencoderOptimiser(NetworkOptimiser):
    """Training of the autoencoder."""

    steps: Annotated[
        int, Field(ge=1, description="Gradient steps. More for finer grids, until the validation loss is flat.")
    ] = 1500
    batch_size: Annotated[
        int, Field(ge=1, description="Images per gradient step, of all GPUs together. Bounds memory.")
    ] = 8


class Autoencoder(Section):
    """Autoencoder (first stage)."""

    network: FirstStageName = Field(
        "resnet",
        description="Kind of first stage. `resnet`: light, of local layers, trained in minutes. `kl`: MONAI's "
        "AutoencoderKL, of the published model.",
    )
    stem: Literal["haar", "space_to_depth", "none"] = Field(
        "haar",
        description="Invertible 2x reduction before the first convolution: orthonormal Haar wavelet, plain "
        "rearrangement, or none.",
    )
    channels: list[PositiveInt] = Field(
        [32, 64], min_length=1, description="Feature channels per level; each level after the first halves the size."
    )
    num_res_blocks: PositiveInt = Field(1, description="Residual blocks per level; the decoder has one more.")
    norm_num_groups: PositiveInt = Field(
        16, description="Groups of the group normalisation of `kl`; must divide all `channels`."
    )
    latent_channels: PositiveInt = Field(
        16, description="Numbers per latent cell. More keep more detail and are harder to generate."
    )
    latent_noise: Weight = Field(
        0.3,
        description="Largest noise that latents are given in training, in standard deviations of an image's latents. "
        "More makes the decoder bear a sampler's errors, and keeps less detail.",
    )
    kl_weight: Weight = Field(
        1e-7,
        description="Weight of the KL divergence in nats per image, beside the mean absolute error. `resnet` has none.",
    )
    spectral_weight: Weight = Field(
        0.5,
        description="Weight of the L1 distance between Fourier magnitudes, which keeps fine detail; 0 leaves it out.",
    )
    equivariance_weight: Weight = Field(
        0.5,
        description="Weight of the same two terms for the image decoded from latents at half the resolution, beside "
        "the image at half the resolution. Makes latents smooth, so that they are easier to generate; 0 leaves it out.",
    )
    perceptual: Perceptual = Field(Perceptual(), description="Loss on feature maps of a network of your own.")
    adversarial: Adversarial = Field(
        Adversarial(), description="Loss by a network that tells scans from reconstructions."
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute features again on the way back instead of keeping them: less memory, about a third "
        "slower.",
    )
    optimiser: AutoencoderOptimiser = Field(AutoencoderOptimiser(), description="Training of the autoencoder.")

    @model_validator(mode="after")
    def _channels_divide(self) -> Self:
        wrong = [c for c in self.channels if c % self.norm_num_groups]
        if wrong and self.network == "kl":  # other networks have no groups
            raise ValueError(f"channels must be multiples of norm_num_groups={self.norm_num_groups}, found {wrong}")
        return self

    @property
    def downsampling(self) -> int:
        """Voxels per latent cell along one axis."""
        return 2 ** (len(self.channels) - 1) * (1 if self.stem == "none" else 2)
