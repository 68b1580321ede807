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
from meddiff_steps.core.registries import claimed_keys


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


class Codebook(Section):
    """What the decoder of a quantised first stage sees: for every latent cell, numbers of entries of codebooks."""

    entries: Annotated[int, Field(ge=2, description="Entries of a codebook.")] = 512
    parts: PositiveInt = Field(
        4,
        description="Parts into which the `latent_channels` of a cell are cut, each with a codebook of its own; must "
        "divide them. 1: one entry for a whole cell, as published. More keep more detail.",
    )
    commitment_weight: Weight = Field(
        0.25,
        description="Weight of the mean squared distance of latents from their entries, beside the mean absolute "
        "error. Keeps the encoder near what the decoder sees.",
    )
    decay: Annotated[
        float,
        Field(gt=0, lt=1, description="Of the running means that entries are; 0.99 looks back about 100 steps."),
    ] = 0.99


class AutoencoderOptimiser(NetworkOptimiser):
    """Training of the autoencoder."""

    steps: Annotated[
        int,
        Field(
            ge=0,
            description="Gradient steps. More for finer grids, until the validation loss is flat. 0 takes the weights "
            "of `init_from` as they are.",
        ),
    ] = 1500
    batch_size: Annotated[
        int, Field(ge=1, description="Images per gradient step, of all GPUs together. Bounds memory.")
    ] = 8


class Autoencoder(Section):
    """Autoencoder (first stage)."""

    network: FirstStageName = Field(
        "resnet",
        description="Kind of first stage. `resnet`: light, of local layers, trained in minutes. `kl`: MONAI's "
        "AutoencoderKL, of the published model. `vq`: `resnet` with codebooks, from whose entries alone images are "
        "decoded. `vqvae`: MONAI's VQVAE.",
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
    grey_levels: Literal["-1..1", "0..1"] = Field(
        "-1..1", description="Scale on which `kl` sees images: about 0, or as most published bundles from 0."
    )
    upsampling: Literal["nearest", "linear"] = Field(
        "nearest", description="How the decoder of `kl` doubles the size before a convolution; MAISI's is linear."
    )
    trains: Literal["all", "decoder"] = Field(
        "all",
        description="Weights that a training changes. `decoder`: from latents to images alone; latents, and a "
        "diffusion model that was trained on them, stay what they are. Needs `init_from`.",
    )
    towards_base: Weight = Field(
        0.0,
        description="Pull of the trained weights back to the base: share of the way per step and unit of the learning "
        "rate (L2-SP, Xuhong et al. 2018). 0 has none. Needs `init_from`.",
    )
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
        description="Weight of the KL divergence in nats per image, beside the mean absolute error. Of `kl` alone.",
    )
    codebook: Codebook = Field(Codebook(), description="Of `vq` and `vqvae` alone.")
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

    @model_validator(mode="after")
    def _parts_divide(self) -> Self:
        if self.latent_channels % self.codebook.parts and self.network in claimed_keys()["codebook"]:
            raise ValueError(
                f"latent_channels must be a multiple of codebook.parts={self.codebook.parts}, found"
                f" {self.latent_channels}"
            )
        return self

    @model_validator(mode="after")
    def _keys_have_a_use(self) -> Self:
        for key, networks in claimed_keys().items():
            given = getattr(self, key) != type(self).model_fields[key].default
            if given and self.network not in networks:
                raise ValueError(
                    f"{key} is set, but network is {self.network}, which has no use for it. Leave {key} out, or choose"
                    f" network: {' or '.join(networks)}"
                )
        return self

    @property
    def downsampling(self) -> int:
        """Voxels per latent cell along one axis."""
        return 2 ** (len(self.channels) - 1) * (1 if self.stem == "none" else 2)
