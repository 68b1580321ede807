"""Section `diffusion`: the model that draws latents."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from meddiff_steps.config.base import Fraction, NetworkOptimiser, PositiveFloat, PositiveInt, Section
from meddiff_steps.config.choices import DenoiserName


class DiffusionOptimiser(NetworkOptimiser):
    """Training of the diffusion network."""

    steps: Annotated[
        int,
        Field(
            ge=1,
            description="Gradient steps. Too few give vague images; too many on few scans give copies, which the "
            "privacy report tells.",
        ),
    ] = 1200
    batch_size: Annotated[
        int, Field(ge=1, description="Latents per gradient step, of all GPUs together. Bounds memory.")
    ] = 32


class NoiseLevels(Section):
    """ln(sigma / alpha) of the noise levels that are trained on, drawn from a normal distribution (Karras et
    al. 2022)."""

    mean: float = Field(-0.6, description="Its mean: lower trains more on details, higher more on the whole.")
    deviation: PositiveFloat = Field(1.2, description="Its standard deviation.")


class Diffusion(Section):
    """Latent diffusion model conditioned on the study's covariates."""

    network: DenoiserName = Field(
        "resnet",
        description="Kind of network. `resnet`: residual blocks at the latents' resolution, as wide as the first of "
        "`channels`; learns fastest on small grids. `unet`: MONAI's, at several sizes, with attention at the small "
        "ones.",
    )
    prediction_type: Literal["epsilon", "v_prediction", "flow"] = Field(
        "v_prediction",
        description="What the network predicts: the noise, a mix of noise and image, or the velocity of a straight "
        "path between them (flow matching, which `generate.sampler` must be able to follow).",
    )
    schedule: Literal["scaled_linear", "linear", "cosine"] = Field(
        "scaled_linear", description="Noise schedule; ignored by `flow`."
    )
    num_train_timesteps: Annotated[int, Field(ge=10)] = Field(
        1000, description="Noise levels of the process that the network learns."
    )
    beta_start: PositiveFloat = Field(
        0.0015, description="Noise variance added at the first level; Pinaya et al. 2022."
    )
    beta_end: PositiveFloat = Field(0.0205, description="Noise variance added at the last level; Pinaya et al. 2022.")
    zero_terminal_snr: bool = Field(
        False, description="Rescale the schedule so that the last step is pure noise (Lin et al. 2023)."
    )
    levels: NoiseLevels = Field(NoiseLevels(), description="Noise levels that are trained on.")
    channels: list[PositiveInt] = Field(
        [64, 128],
        min_length=1,
        description="Feature channels per level; each level after the first halves the size. Wider for larger cohorts.",
    )
    attention_levels: list[bool] = Field(
        [False, True],
        description="Whether a level attends across the whole latent, one entry per level; costly at large levels.",
    )
    num_res_blocks: PositiveInt = Field(3, description="Residual blocks per level.")
    num_head_channels: PositiveInt = Field(
        32,
        description="Channels per attention head; must divide `channels` of the levels that attend, and of the last.",
    )
    norm_num_groups: PositiveInt = Field(
        16, description="Groups of the group normalisation; must divide all `channels`."
    )
    covariate_dim: PositiveInt = Field(64, description="Width of one covariate token.")
    covariate_dropout: Fraction = Field(
        0.1, description="Probability that one covariate is replaced by its learnt null, each on its own."
    )
    condition_dropout: Fraction = Field(
        0.1, description="Probability that all covariates are dropped at once (classifier-free guidance)."
    )
    loss_weights: Literal["equal", "learnt"] = Field(
        "equal",
        description="How much each noise level counts. `equal`: errors in units of what the network gives; `learnt`: "
        "divided by their size at that level, as it is learnt beside (Karras et al. 2024a).",
    )
    guide_share: Fraction = Field(
        0.0,
        description="Share of the training after which a copy of the weights is kept as the guide of "
        "`generate.guidance: autoguidance`; 0 keeps none.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute features again on the way back instead of keeping them: less memory, about a third "
        "slower.",
    )
    optimiser: DiffusionOptimiser = Field(DiffusionOptimiser(), description="Training of the diffusion network.")

    @model_validator(mode="after")
    def _levels_match(self) -> Self:
        if self.network != "unet":  # other networks have no use for these keys
            return self
        if len(self.attention_levels) != len(self.channels):
            raise ValueError(
                f"attention_levels needs one entry per level: {len(self.channels)} channels, "
                f"{len(self.attention_levels)} entries"
            )
        wrong = [c for c in self.channels if c % self.norm_num_groups]
        if wrong:
            raise ValueError(f"channels must be multiples of norm_num_groups={self.norm_num_groups}, found {wrong}")
        # The middle block attends at the width of the last level, whatever attention_levels says.
        attends = zip(self.channels, [*self.attention_levels[:-1], True], strict=True)
        wrong = [c for c, attended in attends if attended and c % self.num_head_channels]
        if wrong:
            raise ValueError(
                "channels with attention (and the last level) must be multiples of "
                f"num_head_channels={self.num_head_channels}, found {wrong}"
            )
        return self

    @model_validator(mode="after")
    def _schedule_is_possible(self) -> Self:
        if self.beta_start >= self.beta_end:
            raise ValueError(f"beta_start must be below beta_end, found {self.beta_start:g} >= {self.beta_end:g}")
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "zero_terminal_snr cannot be used with epsilon prediction: the last step would divide by zero"
            )
        return self
