"""Section `init_from`: trained weights to start from, in the place of fresh ones."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from meddiff_steps.config.base import NoOrLocalPath, PositiveFloat, Section, Text

#: Networks that can start from given weights, by the name of their section.
BaseModelName = Literal["autoencoder", "decoder", "diffusion"]

#: Keys of each section that say what a network is; all others say how it is trained.
ARCHITECTURE: Mapping[str, Sequence[str]] = {
    "autoencoder": (
        *("network", "stem", "grey_levels", "channels", "num_res_blocks", "norm_num_groups", "latent_channels"),
        *("upsampling", "codebook"),
    ),
    "decoder": ("network", "channels", "num_res_blocks"),
    "diffusion": (
        *("network", "channels", "attention_levels", "num_res_blocks", "num_head_channels", "norm_num_groups"),
        *("covariate_dim", "published", "conditioning"),
        *("prediction_type", "schedule", "num_train_timesteps", "beta_start", "beta_end", "zero_terminal_snr"),
    ),
}
#: Keys of `autoencoder.codebook` that say what a network is.
OF_CODEBOOK: Sequence[str] = ("entries", "parts")


class InitFrom(Section):
    """Weights that were trained already (the base): those of a MONAI bundle, files, or models that a study released.

    A training whose `optimiser.steps` is 0 takes them as they are; any other goes on from them.
    """

    path: NoOrLocalPath = Field(
        None,
        description="Folder of a MONAI bundle (with configs/inference.json or .yaml), a MONAI configuration file, or "
        "the folder of a model release (`model-release/`).",
    )
    autoencoder: NoOrLocalPath = Field(
        None,
        description="File with the autoencoder's weights (.pt, .pth, .safetensors), where `path` does not say or is "
        "not given.",
    )
    diffusion: NoOrLocalPath = Field(None, description="File with the diffusion network's weights; see `autoencoder`.")
    models: Annotated[list[BaseModelName], Field(min_length=1)] = Field(
        ["autoencoder", "diffusion"],
        description="Networks that start from these weights. `decoder`, the drawing decoder, is in model releases "
        "alone. A diffusion network only fits the latents of its own autoencoder.",
    )
    other_shape: bool = Field(
        False,
        description="Allow `preprocess.shape` to differ from the size that a bundle was trained on. Its networks are "
        "convolutional and run at any size, but have to be trained further to be of use there.",
    )
    scale_factor: PositiveFloat | None = Field(
        None,
        description="Number that the diffusion network's latents were multiplied by, where neither bundle nor weights "
        "say it; otherwise 1.",
    )
    source: Text = Field(
        "", description="Where the weights come from (a name, a version, an address), for the card of the release."
    )
    licence: Text = Field(
        "",
        description="Licence of the weights, where their folder does not say it; the cards of the release and of the "
        "models tell it.",
    )
