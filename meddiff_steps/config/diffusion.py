"""Section `diffusion`: the model that draws latents."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from meddiff_steps.config.base import (
    Count,
    Fraction,
    Name,
    NetworkOptimiser,
    PositiveFloat,
    PositiveInt,
    Section,
    Weight,
)
from meddiff_steps.config.choices import DenoiserName
from meddiff_steps.config.covariates import level_text


class DiffusionOptimiser(NetworkOptimiser):
    """Training of the diffusion network."""

    steps: Annotated[
        int,
        Field(
            ge=0,
            description="Gradient steps. Too few give vague images; too many on few scans give copies, which the "
            "privacy report tells. 0 takes the weights of `init_from` as they are.",
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


class Input(Section):
    """One number that a published network is told."""

    covariate: Name | None = Field(None, description="Covariate that it is; `null`: none of this study's.")
    range: tuple[float, float] | None = Field(
        None, description="Values of a continuous covariate, in its unit, that the network knows as 0 and 1."
    )
    levels: list[float] | None = Field(
        None,
        description="Numbers by which the network knows the levels of a categorical covariate, in the order of its "
        "`levels`.",
    )
    value: float = Field(
        0.5, description="Number that the network is told where there is no covariate, or its value is not known."
    )

    @model_validator(mode="after")
    def _scaled_one_way(self) -> Self:
        if self.covariate is None and (self.range is not None or self.levels is not None):
            raise ValueError("an input with `range` or `levels` needs `covariate`, whose they are")
        if self.covariate is not None and (self.range is None) == (self.levels is None):
            raise ValueError(
                f"input {self.covariate}: give `range` for a continuous covariate, `levels` for a categorical one"
            )
        if self.range is not None and self.range[0] == self.range[1]:
            raise ValueError(f"input {self.covariate}: `range` must be two different numbers, found {self.range}")
        return self


class Maisi(Section):
    """What NVIDIA's MAISI networks are told beside the time: size of voxels, and a class (body region or modality)."""

    num_class_embeds: Count = Field(0, description="Classes that the network knows; 0: it is told none.")
    class_label: Count = Field(
        0, description="Class of this study's images, by its number; 0 is images of unknown modality, and refused."
    )
    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = Field(
        None,
        description="Size of this study's voxels, that of `preprocess.spacing_mm` along each axis; `null`: the network "
        "is not told.",
    )

    @model_validator(mode="after")
    def _class_is_known(self) -> Self:
        if self.num_class_embeds and self.class_label >= self.num_class_embeds:
            raise ValueError(f"class_label must be below num_class_embeds={self.num_class_embeds}")
        return self


class Published(Section):
    """What a published diffusion UNet has beside `channels` and the like: how it is told covariates, and its blocks.

    `python -m meddiff_steps read_bundle FOLDER` writes this section for a bundle.
    """

    inputs: list[Input] = Field(
        [], description="Numbers that the network is told, in its order; a covariate that is not among them is not."
    )
    told_by: list[Literal["concatenation", "cross_attention"]] = Field(
        ["concatenation", "cross_attention"],
        description="How it is told them: as constant channels beside the latents, as one vector that it attends to, "
        "or both (Pinaya et al. 2022).",
    )
    head_channels: list[Count] | None = Field(
        None, description="Channels per attention head, one entry per level; by default `num_head_channels` everywhere."
    )
    resblock_updown: bool = Field(False, description="Residual blocks change the size, not single convolutions.")
    transformer_num_layers: PositiveInt = Field(1, description="Transformer layers per attending block.")
    upcast_attention: bool = Field(False, description="Attention in full precision.")
    maisi: Maisi | None = Field(None, description="The network is NVIDIA's MAISI (DiffusionModelUNetMaisi).")


class Conditioning(Section):
    """How the network `conditioned` is told what to draw; the other networks have ways of their own."""

    covariates: Literal["modulation", "addition", "cross_attention", "concatenation"] = Field(
        "modulation",
        description="`modulation`: they scale and shift normalised features (adaptive normalisation). `addition`: they "
        "are added to features, the same at every place. `cross_attention`: a token each, which every place attends "
        "to. `concatenation`: constant channels beside the latents.",
    )
    maps: Literal["concatenation", "spade", "controlnet"] = Field(
        "concatenation",
        description="Images that it is told (label maps of `pairs`). `concatenation`: channels beside the latents. "
        "`spade`: they scale and shift features place by place. `controlnet`: a copy of the blocks sees them, beside "
        "blocks that are frozen.",
    )
    base_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5,
        description="Of `controlnet`: share of the training in which the network learns without maps; it is then "
        "frozen, and copied.",
    )


class Rare(Section):
    """A level of a covariate that is learnt from a handful of subjects, by a network that was trained without them
    (DreamBooth, Ruiz et al. 2023). Needs `init_from`.
    """

    covariate: Name = Field(description="Categorical covariate whose level it is.")
    level: Annotated[str, BeforeValidator(level_text)] = Field(
        description="The level. Where the base does not know it, it is the last of the covariate's `levels`, and all "
        "others are the base's in their order."
    )
    like: Annotated[str | None, BeforeValidator(level_text)] = Field(
        None,
        description="Level that it is taken for until something is learnt of it; `null`: the mean of all, as often as "
        "the base has met them.",
    )
    share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Share of every batch that are scans of that level, one at least; the others keep what was."
    )
    preserved: Count = Field(
        200,
        description="Latents that the base draws, of its own levels, and that are learnt again beside the cohort's "
        "other scans so that they are not forgotten (prior preservation). 0 only where the cohort has others.",
    )


class Diffusion(Section):
    """Latent diffusion model conditioned on the study's covariates."""

    network: DenoiserName = Field(
        "resnet",
        description="Kind of network. `resnet`: residual blocks at the latents' resolution, as wide as the first of "
        "`channels`; learns fastest on small grids. `unet`: MONAI's, at several sizes, with attention at the small "
        "ones. `published`: MONAI's alone, as published bundles have it (section `published`). `conditioned`: as "
        "`resnet`, told in a way to choose (section `conditioning`).",
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
    published: Published = Field(Published(), description="More about the network `published`.")
    trains: Literal["all", "adapters"] = Field(
        "all",
        description="Weights that a training changes. `adapters`: products of two thin matrices that are added to the "
        "weights of linear layers and convolutions (LoRA, Hu et al. 2022), and nothing else of the base; they are "
        "added in for good at the end. Needs `init_from`.",
    )
    adapter_rank: PositiveInt = Field(8, description="Width of the adapters' thin matrices. More can change more.")
    towards_base: Weight = Field(
        0.0,
        description="Pull of the weights back to the base: share of the way per step and unit of the learning rate "
        "(L2-SP, Xuhong et al. 2018). 0 has none; 1 at a rate of 0.003 goes two thirds of the way in 330 steps. Needs "
        "`init_from`.",
    )
    conditioning: Conditioning = Field(
        Conditioning(), description="How the network `conditioned` is told what to draw."
    )
    rare: Rare | None = Field(None, description="A level that few subjects have. Off by default.")
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
        if self.network not in ("unet", "published"):  # other networks have no use for these keys
            return self
        if len(self.attention_levels) != len(self.channels):
            raise ValueError(
                f"attention_levels needs one entry per level: {len(self.channels)} channels, "
                f"{len(self.attention_levels)} entries"
            )
        wrong = [c for c in self.channels if c % self.norm_num_groups]
        if wrong:
            raise ValueError(f"channels must be multiples of norm_num_groups={self.norm_num_groups}, found {wrong}")
        heads = [self.num_head_channels] * len(self.channels)
        if self.network == "published" and self.published.head_channels is not None:
            heads = self.published.head_channels
        if len(heads) != len(self.channels):
            raise ValueError(f"published.head_channels needs one entry per level: {len(self.channels)}, found {heads}")
        # The middle block attends at the width of the last level, whatever attention_levels says.
        attends = zip(self.channels, heads, [*self.attention_levels[:-1], True], strict=True)
        wrong = [c for c, head, attended in attends if attended and (not head or c % head)]
        if wrong:
            raise ValueError(
                "channels with attention (and the last level) must be multiples of "
                f"num_head_channels={heads[0] if len(set(heads)) == 1 else heads}, found {wrong}"
            )
        return self

    @model_validator(mode="after")
    def _base_is_kept_one_way(self) -> Self:
        if self.trains == "adapters" and self.towards_base:
            raise ValueError("towards_base: adapters leave the base as it is; leave it out, or set trains: all")
        if self.trains == "adapters" and self.guide_share:
            raise ValueError("guide_share: adapters keep no guide; set guide_share: 0, or trains: all")
        return self

    @model_validator(mode="after")
    def _conditioning_is_of_its_network(self) -> Self:
        if self.network != "conditioned" and self.conditioning != Conditioning():
            raise ValueError(
                f"conditioning: the network {self.network} has a way of its own to be told; set network: conditioned"
            )
        if self.conditioning.maps == "controlnet" and (self.guide_share or self.trains == "adapters"):
            raise ValueError(
                "conditioning.maps: a ControlNet is trained in two parts; it keeps no guide (guide_share: 0) and has no"
                " adapters (trains: all)"
            )
        return self

    @model_validator(mode="after")
    def _rare_level_has_company(self) -> Self:
        if self.rare is not None and self.optimiser.batch_size < 2:
            raise ValueError(
                "rare: a batch holds scans of that level and others, so optimiser.batch_size must be 2 or more"
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
