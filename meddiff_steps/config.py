"""One study, one model: every default, unit and bound of the workflow lives here and nowhere else.

A study is one YAML file.  `load_study` reads and validates it; `freeze` writes what each stage is allowed to
see into content-addressed JSON files; `load_stage` is how a step reads its own.  The JSON Schema for editors
(`config/study.schema.json`) is generated from these classes.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from meddiff_steps.core.canonical import canonical_json
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import write_atomic

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
Alphanumeric = Annotated[str, Field(pattern=r"^[A-Za-z0-9]+$")]


class Section(BaseModel):
    """A part of a study: unknown keys are refused, values cannot change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# --------------------------------------------------------------------------------------------- covariates


class ContinuousCovariate(Section):
    """A number with a unit, for example age in years."""

    unit: str = Field(description="Unit of the column, for example `year` or `mL`.")
    range: tuple[float, float] = Field(description="Smallest and largest plausible value; anything outside is refused.")
    column: str | None = Field(None, description="Column in the source table; the covariate's own name by default.")
    description: str = Field("", description="One sentence for data dictionaries.")

    @model_validator(mode="after")
    def _range_is_ordered(self) -> Self:
        low, high = self.range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"range must be [low, high] with low < high, found [{low:g}, {high:g}]")
        return self


class CategoricalCovariate(Section):
    """A label from a fixed list, for example sex."""

    levels: list[str] = Field(min_length=2, description="All labels that may occur, as written in the source table.")
    column: str | None = Field(None, description="Column in the source table; the covariate's own name by default.")
    description: str = Field("", description="One sentence for data dictionaries.")

    @field_validator("levels", mode="before")
    @classmethod
    def _levels_are_text(cls, value: Any) -> Any:
        def text(level: Any) -> Any:
            if isinstance(level, bool) or not isinstance(level, (int, float)):
                return level
            return str(int(level)) if float(level).is_integer() else repr(level)

        return [text(level) for level in value] if isinstance(value, list) else value

    @field_validator("levels")
    @classmethod
    def _levels_are_unique(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError(f"levels must be distinct, found {value}")
        return value


def _covariate_kind(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "categorical" if isinstance(value, CategoricalCovariate) else "continuous"
    return "categorical" if "levels" in value else "continuous" if {"unit", "range"} & set(value) else None


Covariate = Annotated[
    Annotated[ContinuousCovariate, Tag("continuous")] | Annotated[CategoricalCovariate, Tag("categorical")],
    Discriminator(
        _covariate_kind,
        custom_error_type="covariate_kind",
        custom_error_message="give `levels` (a label) or `unit` and `range` (a number)",
    ),
]
Covariates = dict[Name, Covariate]


# ------------------------------------------------------------------------------------------------- cohort


class SimulatedSource(Section):
    """A simulated brain cohort from the MNI152 templates that ship with nilearn (no data needed)."""

    source: Literal["simulated"] = "simulated"
    subjects: Annotated[int, Field(ge=20, le=1_000_000)] = 600
    shape: tuple[PositiveInt, PositiveInt, PositiveInt] = Field((32, 40, 32), description="Voxels.")
    spacing_mm: PositiveFloat = 5.0
    case_share: Fraction = Field(0.2, description="Share of subjects with the simulated diagnosis.")
    missing_share: Fraction = Field(
        0.02, description="Share of age values left out, so that missing values are exercised."
    )


class BidsSource(Section):
    """A BIDS dataset: images under sub-*/[ses-*/]DATATYPE, covariates in participants.tsv and sessions.tsv."""

    source: Literal["bids"]
    root: str = Field(
        description="Directory that holds dataset_description.json; relative paths start at the working directory."
    )
    datatype: str = "anat"
    suffix: str = "T1w"
    entities: dict[str, str] = Field({}, description="Entities an image name must carry, for example {acq: mprage}.")


class TableSource(Section):
    """A CSV, TSV or Parquet table with one row per image and a column of paths."""

    source: Literal["table"]
    table: str = Field(description="The table; relative paths start at the working directory.")
    path_column: str = "path"
    subject_column: str = Field(
        "subject_id", description="Column that says whom the image shows; splits are made by it."
    )
    root: str | None = Field(
        None, description="Directory that relative image paths start at; the table's own by default."
    )


CohortSource = Annotated[SimulatedSource | BidsSource | TableSource, Field(discriminator="source")]


class Splits(Section):
    """Shares of subjects; a subject's split is a stable hash of its id, so newcomers move nobody."""

    train: Fraction = 0.75
    val: Fraction = 0.05
    calibration: Fraction = 0.1
    test: Fraction = 0.1

    @model_validator(mode="after")
    def _shares_add_up(self) -> Self:
        total = self.train + self.val + self.calibration + self.test
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"train + val + calibration + test must be 1, found {total:g}")
        if self.train == 0 or self.test == 0:
            raise ValueError("train and test must both be above 0: every figure is reported on held-out subjects")
        return self


# --------------------------------------------------------------------------------------------- preprocess


class Preprocess(Section):
    """From any scan to one grid and one intensity scale [0, 1]; defined once, used by every later stage."""

    shape: tuple[PositiveInt, PositiveInt] | tuple[PositiveInt, PositiveInt, PositiveInt] = Field(
        (32, 40, 32),
        description="Voxels (3D, axes left-right, posterior-anterior, inferior-superior) or pixels (2D, rows, columns).",
    )
    spacing_mm: PositiveFloat | None = Field(
        5.0, description="Isotropic voxel size of the 3D grid; null for 2D images."
    )
    center: Literal["image", "foreground"] = Field("image", description="What the grid is centred on.")
    foreground: Literal["nonzero", "all"] = Field(
        "nonzero", description="Voxels that intensity percentiles are taken over."
    )
    percentiles: tuple[float, float] = Field((0.0, 99.5), description="Mapped to 0 and 1; values outside are clipped.")
    brain_mask: str | None = Field(
        None,
        description="Path pattern of a mask per scan, with {subject_id}, {session_id} and {scan_id}; voxels outside become 0.",
    )
    shards: Annotated[int, Field(ge=1, le=10_000)] = 2
    max_failed_share: Fraction = Field(0.05, description="More left-out scans than this stop the study.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        low, high = self.percentiles
        if not 0.0 <= low < high <= 100.0:
            raise ValueError(f"percentiles must be 0 <= low < high <= 100, found [{low:g}, {high:g}]")
        if (len(self.shape) == 3) != (self.spacing_mm is not None):
            raise ValueError("a 3D shape needs spacing_mm in millimetres, a 2D shape needs spacing_mm: null")
        return self


# --------------------------------------------------------------------------------------------- models


class Optimiser(Section):
    """How a network is trained; what a study leaves out keeps its default."""

    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    gradient_clip: PositiveFloat = Field(1.0, description="Largest gradient norm.")
    log_every: PositiveInt = Field(25, description="Steps that one point of the training curve averages.")
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.999, description="Decay per step of the averaged weights that are released."
    )
    checkpoint_every: PositiveInt = Field(250, description="Steps between resumable checkpoints.")
    validate_every: PositiveInt = Field(200, description="Steps between validation losses.")


class Perceptual(Section):
    """Distance between feature maps of a network of your own (Zhang et al. 2018); nothing is downloaded."""

    weight: Annotated[float, Field(ge=0.0)] = 0.0
    weights: str | None = Field(
        None,
        description="Path of a TorchScript file: from images (b, 1, ...) in [0, 1] to feature maps (b, c, ...); needed when weight is above 0.",
    )

    @model_validator(mode="after")
    def _weights_given(self) -> Self:
        if self.weight > 0 and self.weights is None:
            raise ValueError("perceptual.weight is above 0 but perceptual.weights names no file")
        return self


class Adversarial(Section):
    """Patch discriminator (least squares), as in Pinaya et al. 2022."""

    weight: Annotated[float, Field(ge=0.0)] = 0.0
    start_step: Annotated[int, Field(ge=0)] = Field(0, description="Step at which the term is switched on.")
    channels: PositiveInt = 32
    layers: PositiveInt = 2
    learning_rate: PositiveFloat = 2e-4


class AutoencoderOptimiser(Optimiser):
    steps: PositiveInt = 1500
    batch_size: PositiveInt = 8
    learning_rate: PositiveFloat = 1e-3


class Autoencoder(Section):
    """KL-regularised autoencoder (first stage)."""

    stem: Literal["haar", "space_to_depth", "none"] = Field(
        "haar",
        description="Invertible 2x reduction before the first convolution: orthonormal Haar wavelet, plain rearrangement, or none.",
    )
    linear_path: bool = Field(
        True, description="A linear map of blocks beside the network: the best linear code of the training images."
    )
    channels: list[PositiveInt] = Field(
        [32, 64], min_length=1, description="Feature channels per level; each level after the first halves the size."
    )
    num_res_blocks: PositiveInt = 1
    norm_num_groups: PositiveInt = 16
    latent_channels: PositiveInt = 16
    kl_weight: Annotated[float, Field(ge=0.0)] = Field(
        1e-7, description="Weight of the KL divergence in nats per image, beside the mean absolute error."
    )
    spectral_weight: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="Weight of the L1 distance between Fourier magnitudes, which keeps fine detail."
    )
    perceptual: Perceptual = Perceptual()
    adversarial: Adversarial = Adversarial()
    gradient_checkpointing: bool = False
    optimiser: AutoencoderOptimiser = AutoencoderOptimiser()

    @model_validator(mode="after")
    def _channels_divide(self) -> Self:
        wrong = [c for c in self.channels if c % self.norm_num_groups]
        if wrong:
            raise ValueError(f"channels must be multiples of norm_num_groups={self.norm_num_groups}, found {wrong}")
        return self

    @property
    def downsampling(self) -> int:
        """Voxels per latent cell along one axis."""
        return 2 ** (len(self.channels) - 1) * (1 if self.stem == "none" else 2)


class Augmentation(Section):
    """Variants of each training scan, drawn once and encoded with it (variant 0 is always the scan itself)."""

    variants: PositiveInt = 1
    flip: bool = Field(False, description="Mirror left-right in half of the variants.")
    max_shift_voxels: Annotated[int, Field(ge=0)] = Field(
        0, description="Largest whole-voxel shift per axis; no interpolation, so nothing is blurred."
    )


class Latents(Section):
    gaussian_rank: Annotated[int, Field(ge=0)] = Field(
        128,
        description="Principal components of the Gaussian model of the latents that the diffusion network starts from, "
        "at most an eighth as many as there are training subjects; 0 leaves it out.",
    )
    batch_size: PositiveInt = 8


class DiffusionOptimiser(Optimiser):
    steps: PositiveInt = 1200
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 5e-4


class Diffusion(Section):
    """Latent diffusion model conditioned on the study's covariates."""

    prediction_type: Literal["epsilon", "v_prediction", "flow"] = "v_prediction"
    schedule: Literal["scaled_linear", "linear", "cosine"] = Field(
        "scaled_linear", description="Noise schedule; ignored by `flow`."
    )
    num_train_timesteps: Annotated[int, Field(ge=10)] = 1000
    beta_start: PositiveFloat = Field(0.0015, description="Pinaya et al. 2022.")
    beta_end: PositiveFloat = Field(0.0205, description="Pinaya et al. 2022.")
    zero_terminal_snr: bool = Field(
        False, description="Rescale the schedule so that the last step is pure noise (Lin et al. 2023)."
    )
    channels: list[PositiveInt] = Field([32, 64], min_length=1)
    attention_levels: list[bool] = [False, True]
    num_res_blocks: PositiveInt = 2
    num_head_channels: PositiveInt = 32
    norm_num_groups: PositiveInt = 16
    covariate_dim: PositiveInt = Field(64, description="Width of one covariate token.")
    covariate_dropout: Fraction = Field(
        0.1, description="Probability that one covariate is replaced by its learnt null, each on its own."
    )
    condition_dropout: Fraction = Field(
        0.1, description="Probability that all covariates are dropped at once (classifier-free guidance)."
    )
    component_steps: Annotated[int, Field(ge=0)] = Field(
        800,
        description="Steps of the small network that learns how the Gaussian's components depend on each other; 0 leaves it out.",
    )
    gradient_checkpointing: bool = False
    optimiser: DiffusionOptimiser = DiffusionOptimiser()

    @model_validator(mode="after")
    def _levels_match(self) -> Self:
        if len(self.attention_levels) != len(self.channels):
            raise ValueError(
                f"attention_levels needs one entry per level: {len(self.channels)} channels, {len(self.attention_levels)} entries"
            )
        wrong = [c for c in self.channels if c % self.norm_num_groups]
        if wrong:
            raise ValueError(f"channels must be multiples of norm_num_groups={self.norm_num_groups}, found {wrong}")
        # The middle block attends at the width of the last level, whatever attention_levels says.
        attended = [
            c
            for c, a in zip(self.channels, [*self.attention_levels[:-1], True], strict=True)
            if a and c % self.num_head_channels
        ]
        if attended:
            raise ValueError(
                f"channels with attention (and the last level) must be multiples of num_head_channels={self.num_head_channels}, found {attended}"
            )
        if self.beta_start >= self.beta_end:
            raise ValueError(f"beta_start must be below beta_end, found {self.beta_start:g} >= {self.beta_end:g}")
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "zero_terminal_snr cannot be used with epsilon prediction: the last step would divide by zero"
            )
        return self


# --------------------------------------------------------------------------------------- plan and generate

Scalar = float | int | str
Condition = Scalar | list[Scalar]


class PlanGroup(Section):
    """A group of synthetic subjects with the same origin of covariates; its subjects are numbered from 0 on their own."""

    name: Alphanumeric = Field(description="Prefix of the synthetic subject ids.")
    subjects: PositiveInt = Field(
        description="Number of subjects; for `grid` and `counterfactual`, subjects per grid point."
    )
    covariates: Literal["copula", "table", "grid", "counterfactual"] = "copula"
    where: dict[Name, Condition] = Field(
        {},
        description="Copula only. A level, a list of levels, a number, or [low, high]: every subject of the group fulfils it.",
    )
    table: str | None = Field(
        None, description="Table only. CSV, TSV or Parquet with a column per covariate; empty cells are missing values."
    )
    grid: dict[Name, list[Scalar]] = Field(
        {}, description="Grid and counterfactual. Values per covariate; all combinations are planned."
    )
    base: dict[Name, Scalar] = Field(
        {},
        description="Grid and counterfactual. Values of the covariates that stay fixed; the rest is drawn from the copula.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.covariates == "table") != (self.table is not None):
            raise ValueError("`table` must name a file when covariates is `table`, and only then")
        if (self.covariates in ("grid", "counterfactual")) != bool(self.grid):
            raise ValueError("`grid` must be given when covariates is `grid` or `counterfactual`, and only then")
        if self.where and self.covariates != "copula":
            raise ValueError("`where` belongs to covariates: copula")
        if self.covariates == "counterfactual" and len(self.grid) != 1:
            raise ValueError("a counterfactual group moves exactly one covariate; `grid` must have one entry")
        return self


Sampler = Literal["ddpm", "ddim", "pndm", "heun", "dpmpp", "unipc", "flow"]

#: Steps at which the spread of sampled Gaussian data (std 0.5, exact denoiser, default schedule) is within 5 % of the
#: truth, with some reserve; measured: ddpm -1.4, ddim -3.5, pndm +1, heun +3.6, dpmpp +2.5, unipc +1.9, flow -2.9 %.
DEFAULT_STEPS: dict[str, int] = {"ddpm": 1000, "ddim": 75, "pndm": 20, "heun": 18, "dpmpp": 20, "unipc": 20, "flow": 50}


def default_steps(sampler: str, num_train_timesteps: int) -> int:
    """The sampler's tested number of steps; `ddpm` never has more than the process."""
    return min(DEFAULT_STEPS[sampler], num_train_timesteps) if sampler == "ddpm" else DEFAULT_STEPS[sampler]


class Generate(Section):
    sampler: Sampler = "dpmpp"
    num_inference_steps: PositiveInt | None = Field(
        None, description="Steps; the sampler's tested default when left out."
    )
    guidance_scale: Annotated[float, Field(ge=0.0)] = Field(
        1.0, description="1 is plain conditional sampling (one network pass per step)."
    )
    batch_size: PositiveInt = Field(
        16, description="Fixed: it changes the last bits, so it belongs to the recipe; short batches are padded."
    )
    shard_size: PositiveInt = Field(250, description="Subjects per job.")
    decode_batch_size: PositiveInt | None = Field(
        None,
        description="Images decoded at once, which bounds memory; divides `batch_size`, and is all of a batch when left out. Changes the last bits.",
    )
    decode_slab: PositiveInt | None = Field(
        None,
        description="Where one image is too large to be decoded at once: planes of a slab that layers are computed in. The same but for rounding, slower.",
    )

    @model_validator(mode="after")
    def _decoding_divides(self) -> Self:
        if self.decode_batch_size and self.batch_size % self.decode_batch_size:
            raise ValueError(
                f"decode_batch_size must divide batch_size={self.batch_size}, found {self.decode_batch_size}"
            )
        return self


class EmbedderOptimiser(Optimiser):
    steps: PositiveInt = 300
    batch_size: PositiveInt = 64
    learning_rate: PositiveFloat = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 20


class Embedder(Section):
    """The learned copy detector (SimCLR)."""

    temperature: PositiveFloat = Field(
        0.1, description="Of the NT-Xent loss; smaller attends to the nearest strangers."
    )
    optimiser: EmbedderOptimiser = EmbedderOptimiser()


class Privacy(Section):
    """What may be released: every synthetic image is compared with every training scan."""

    enforce: Literal["stop", "report"] = Field(
        "stop", description="`stop`: a verdict of FAIL ends the run before the release; `report`: it is only told."
    )
    level: Annotated[float, Field(gt=0.0, lt=0.5)] = Field(
        0.05, description="Share of unseen real subjects that the filter may take for copies; fixes the thresholds."
    )
    subgroup: Name | None = Field(
        None,
        description="Categorical covariate whose levels get thresholds of their own where they have enough subjects.",
    )
    max_attempts: PositiveInt = Field(5, description="Draws per planned subject before it is given up as failed.")
    max_failed_share: Fraction = Field(
        0.05, description="Gate: share of planned subjects that were given up as failed."
    )
    # The nearest two of the demo's 1,000 scans have 0.977, of 185 IXI brains at 4 mm 0.980; a scan and itself with 3 % noise have 0.997.
    duplicate_correlation: Annotated[float, Field(gt=0.5, lt=1.0)] = Field(
        0.99,
        description="Correlation of all voxels from which two synthetic images count as one; coarse images of many subjects need more.",
    )
    embedder: Embedder = Embedder()
    bootstrap: Annotated[int, Field(ge=100)] = 500
    max_excess_copies: Fraction = Field(
        0.05, description="Gate: copies before the filter beyond those that unseen real scans would be taken for."
    )
    max_membership_auc: Annotated[float, Field(ge=0.5, le=1.0)] = Field(
        0.6, description="Gate: AUC of every membership attack on the released cohort."
    )
    max_nearer_to_training: Annotated[float, Field(ge=0.5, le=1.0)] = Field(
        0.6, description="Gate: share of released images nearer to the training set than to as many unseen scans."
    )
    max_table_risk: Fraction = Field(
        0.1,
        description="Gate: success of singling out and attribute inference on the covariate table beyond that on subjects who were not trained on.",
    )
    min_recall: Fraction = Field(0.95, description="Gate: share of planted copies that the detectors must find.")


class Distill(Section):
    """A second model, trained only on synthetic images that the filter accepted, makes the released cohort (Fernandez et al. 2023)."""

    subjects: Annotated[int, Field(ge=0)] = Field(
        0, description="Synthetic subjects of the first model that the second learns from; 0: no second model."
    )
    validation_share: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.1, description="Of the accepted ones: those that the second training is validated on."
    )


class FeatureNetwork(Section):
    """A network of the user's own, whose features realism and diversity are measured on; nothing is downloaded."""

    name: Name = Field(description="Of the feature space in metrics.json and in the report.")
    weights: str = Field(
        description="A file on this machine: TorchScript, or safetensors of a MONAI ResNet. TorchScript is code: take it from whom you trust."
    )
    architecture: Literal["torchscript", "resnet10", "resnet18", "resnet34", "resnet50"] = "torchscript"
    channels: PositiveInt = Field(1, description="Input channels; the grey image is repeated in each.")
    zscore: bool = Field(
        False,
        description="Give the network images with mean 0 and standard deviation 1 (MedicalNet) rather than in [0, 1].",
    )


class Evaluate(Section):
    seed: str | None = Field(
        None,
        min_length=1,
        description="Root of the random numbers of evaluation: resamples, pairs, folds, permutations. The study's `seed` when left out.",
    )
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    sweep_steps: Annotated[int, Field(ge=3)] = Field(5, description="Images per counterfactual sweep in the report.")
    max_images: Annotated[int, Field(ge=20, le=5000)] = Field(
        500,
        description="Synthetic, training and held-out images at most, of each, that realism and diversity are measured on.",
    )
    realism_bootstrap: Annotated[int, Field(ge=100)] = Field(
        200, description="Resamples behind the intervals of Frechet, KID and Wasserstein distances."
    )
    permutations: Annotated[int, Field(ge=100)] = Field(
        1000, description="Of the test behind KID; the smallest p-value is 1 / (permutations + 1)."
    )
    ssim_pairs: PositiveInt = Field(
        100, description="Pairs of images whose similarity is averaged, of synthetic and of real images."
    )
    neighbours: PositiveInt = Field(
        5, description="Nearest neighbours that span the manifolds of precision, recall, density and coverage."
    )
    features: list[FeatureNetwork] = Field(
        [], description="Feature spaces beside the built-in ones: networks whose weights you have."
    )

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        names = ["random", "embedder", "radiomics", *(network.name for network in self.features)]
        if len(set(names)) != len(names):
            raise ValueError(
                f"features: names must be distinct and none of random, embedder, radiomics; found {names[3:]}"
            )
        return self


class Structure(Section):
    """A structure in a label map."""

    labels: list[PositiveInt] = Field([], description="Labels that belong to it.")
    all_but: list[PositiveInt] = Field(
        [], description="Instead: labels that do not belong to it, while all others above 0 do."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if bool(self.labels) == bool(self.all_but):
            raise ValueError("a structure needs either `labels` or `all_but`, and not both")
        return self


class SegmenterOptimiser(Optimiser):
    steps: PositiveInt = 400
    batch_size: PositiveInt = 4
    learning_rate: PositiveFloat = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.98


class Segmentation(Section):
    """Label maps of real scans, from which a segmenter learns to measure volumes in synthetic ones: a second instrument beside the predictors."""

    labels: str = Field(
        min_length=1,
        description="Path of a scan's label map, with {subject_id}, {session_id}, {scan_id} in it; same world space as the scan.",
    )
    structures: dict[Name, Structure] = Field(
        min_length=1, description="Structures by the covariate, in mL, that is their volume."
    )
    channels: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt, PositiveInt] = Field(
        (16, 32, 64, 64, 64), description="Features of the U-Net at half, quarter, ... of the resolution."
    )
    optimiser: SegmenterOptimiser = SegmenterOptimiser()

    @model_validator(mode="after")
    def _batch_has_statistics(self) -> Self:
        if self.optimiser.batch_size < 2:
            raise ValueError("optimiser.batch_size must be at least 2 for batch normalisation, found 1")
        return self


class SamplerStudy(Section):
    """Quality against steps and seconds, for the target `sampler_study`."""

    samplers: list[Sampler] | None = Field(
        None,
        min_length=1,
        description="Those compared; by default all that can sample the model but `ddpm`, which takes hundreds of steps.",
    )
    num_inference_steps: list[PositiveInt] = Field([4, 8, 16], min_length=1, description="Steps of each sampler.")
    guidance_scales: list[Annotated[float, Field(ge=0.0)]] = Field(
        [1.0, 1.5], min_length=1, description="Guidance scales of each sampler."
    )
    images: Annotated[int, Field(ge=20)] = Field(
        48, description="Synthetic images per sampler, steps and scale: the first planned subjects, the same for all."
    )


# --------------------------------------------------------------------------------------------- augmentation


class Arm(Section):
    """One training set of the augmentation study; every arm takes the same number of gradient steps."""

    name: Name
    real: Fraction = Field(
        1.0,
        description="Share of the real training subjects, by a stable hash: smaller shares are parts of larger ones.",
    )
    synthetic: Annotated[float, Field(ge=0.0, le=100.0)] = Field(
        0.0,
        description="Images added per real one of the same class (with `real: 0`, per training scan; with `rare_only`, per scan that a class lacks).",
    )
    source: Literal["filtered", "generated", "reconstruction"] = Field(
        "filtered",
        description="What is added: accepted images, candidates before the filter, or the arm's own real scans through the autoencoder (a control).",
    )
    rare_only: bool = Field(
        False, description="Add only to classes rarer than the largest; `synthetic: 1` fills the whole gap."
    )
    balance: Literal["none", "weights", "oversample"] = Field(
        "none", description="Rare classes weigh more in the loss, or are drawn more often."
    )
    classical: bool = Field(
        False, description="Change every training image at random: mirrored, moved, re-contrasted, noised, cropped."
    )
    mixup: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="Alpha of mixup (Zhang et al. 2018); 0 leaves it out."
    )
    test: Literal["real", "synthetic"] = Field(
        "real", description="`synthetic`: train on real, test on synthetic images."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.real == 0 and self.synthetic == 0:
            raise ValueError(f"arm {self.name} has nothing to learn from: `real` or `synthetic` must be above 0")
        if self.rare_only and not (self.real and self.synthetic):
            raise ValueError(
                f"arm {self.name}: rare_only adds synthetic images to real ones; both `real` and `synthetic` must be above 0"
            )
        if self.source == "reconstruction" and (self.synthetic > 1 or self.rare_only):
            raise ValueError(
                f"arm {self.name}: a scan has one reconstruction, so `synthetic` is at most 1 and `rare_only` is not possible"
            )
        if self.test == "synthetic" and self.synthetic:
            raise ValueError(
                f"arm {self.name} is tested on synthetic images and must not learn from them: set `synthetic: 0`"
            )
        return self

    @property
    def drawn(self) -> bool:
        """Whether the arm learns from images that a generator drew, so that each generator seed makes another training set of it."""
        return self.synthetic > 0 and self.source != "reconstruction"

    @property
    def plain(self) -> bool:
        """Whether the arm is real scans and nothing else: what others are compared with."""
        return not (self.synthetic or self.classical or self.mixup) and self.balance == "none" and self.test == "real"


class Primary(Section):
    """The one question that the verdict answers, declared before anything is trained."""

    reference: Name = Field("real", description="Arm without synthetic images.")
    arms: list[Name] = Field(
        ["real_synthetic"],
        min_length=1,
        description="Arm compared with it; of several, the one that does best on the validation subjects.",
    )


class Shift(Section):
    """A group that is kept out of the classifier's training and tested on its own."""

    covariate: Name = Field(description="Categorical covariate, for example site.")
    levels: list[str] = Field(min_length=1, description="Its levels that are kept out.")


class ClassifierOptimiser(Optimiser):
    steps: PositiveInt = 1000
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 2e-3
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.98
    validate_every: PositiveInt = 100


class Classifier(Section):
    """MONAI ResNet that learns the target from images alone; the same settings in every arm."""

    longest_side: PositiveInt = Field(64, description="Images are reduced by block means until no side is longer.")
    channels: list[PositiveInt] = Field(
        [16, 32, 64, 128], min_length=4, max_length=4, description="Feature channels of the four stages."
    )
    blocks: list[PositiveInt] = Field(
        [1, 1, 1, 1], min_length=4, max_length=4, description="Residual blocks per stage ([2, 2, 2, 2] is ResNet-18)."
    )
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    optimiser: ClassifierOptimiser = ClassifierOptimiser()

    @model_validator(mode="after")
    def _batch_has_statistics(self) -> Self:
        if self.optimiser.batch_size < 4:
            raise ValueError(
                f"optimiser.batch_size must be at least 4 for batch normalisation, found {self.optimiser.batch_size}"
            )
        return self


class Augment(Section):
    """Downstream study: does training with synthetic images make a better classifier? Off without a target."""

    target: Name | None = Field(None, description="Categorical covariate to be told from the image.")
    groups: list[Alphanumeric] = Field(
        [], description="Groups of the plan that arms may use; all `copula` and `table` groups by default."
    )
    arms: list[Arm] = Field(
        description="Training sets that are compared.",
        default=[
            Arm(name="real"),
            Arm(name="real_synthetic", synthetic=1),
            Arm(name="synthetic_only", real=0, synthetic=1),
            Arm(name="quarter", real=0.25),
            Arm(name="quarter_synthetic", real=0.25, synthetic=1),
        ],
        min_length=2,
    )
    primary: Primary = Primary()
    margin: Annotated[float, Field(gt=0.0, le=0.5)] = Field(
        0.035, description="Loss of AUC that would be tolerated (non-inferiority; Packhäuser 2022)."
    )
    subgroup: Name | None = Field(
        None, description="Categorical covariate by whose levels figures are also given: worst group and gap."
    )
    shift: Shift | None = Field(None, description="A group that is kept out of training and tested on its own.")
    seeds: Annotated[int, Field(ge=2, le=100)] = Field(
        5, description="Classifiers per arm: initial weights and order of batches. Below 5, intervals are very wide."
    )
    generator_seeds: Annotated[int, Field(ge=1, le=20)] = Field(
        1,
        description="Cohorts that arms with synthetic images are made of: the released one, and others of the same requests with other noise, of just the "
        "subjects that arms need. Every classifier seed is run with each of them.",
    )
    retrain: bool = Field(
        False,
        description="Whether every further generator seed trains a diffusion model of its own, which costs as much as the first. Else all draw from one.",
    )
    jobs: PositiveInt = Field(1, description="Jobs that the arms are spread over.")
    bootstrap: Annotated[int, Field(ge=200)] = Field(2000, description="Resamples of subjects and seeds.")
    classifier: Classifier = Classifier()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        arms = {arm.name: arm for arm in self.arms}
        if len(arms) != len(self.arms):
            raise ValueError(f"names of arms must be distinct, found {[arm.name for arm in self.arms]}")
        for name in (self.primary.reference, *self.primary.arms):
            if name not in arms:
                raise ValueError(f"primary names the arm {name}, which is not among the arms {sorted(arms)}")
            if arms[name].test != "real":
                raise ValueError(
                    f"primary names the arm {name}, which is tested on synthetic images; figures on other images are not comparable"
                )
        if self.primary.reference in self.primary.arms:
            raise ValueError(f"primary compares the arm {self.primary.reference} with itself")
        if arms[self.primary.reference].synthetic:
            raise ValueError(
                f"primary.reference {self.primary.reference} has synthetic images; it must be an arm without"
            )
        if self.retrain and self.generator_seeds == 1:
            raise ValueError("retrain: the one generator seed is the released model; set generator_seeds to 2 or more")
        return self

    @property
    def sources(self) -> set[str]:
        """What arms add to real scans."""
        return {arm.source for arm in self.arms if arm.synthetic}


class Card(Section):
    """The half of the release's README that only its publisher can write; what stays empty is shown there as a blank."""

    intended_use: str = Field("", description="What the cohort is meant for.")
    not_for: str = Field("", description="What it must not be used for.")
    ethics: str = Field("", description="Consent and approvals behind the source data.")
    limitations: str = Field("", description="Known biases and shortfalls that the figures do not show.")
    contact: str = Field("", description="Whom to ask.")


class Release(Section):
    name: str = Field("Synthetic cohort", description="Name in dataset_description.json.")
    authors: list[str] = []
    licence: str = Field("CC0", description="Licence of the synthetic images.")
    suffix: Literal["T1w", "T2w", "PDw", "FLAIR", "T2starw", "inplaneT1", "inplaneT2"] = Field(
        "T1w", description="BIDS suffix of 3D images: their contrast."
    )
    skull_stripped: bool = Field(
        True, description="Whether the images that the model learnt from show the brain only (BIDS SkullStripped)."
    )
    acknowledgements: str = Field("", description="Acknowledgement that the source data ask for.")
    signing_key: str | None = Field(
        None, description="Path of a private key that `keygen` made; the release is then signed. Never published."
    )
    url: str = Field("", description="Address at which the release will be found.")
    date: str = Field(
        "",
        pattern=r"^(\d{4}-\d{2}-\d{2})?$",
        description="Day of publication, YYYY-MM-DD; by default the day on which the last image was made.",
    )
    shard_size: PositiveInt = Field(
        1000,
        description="Subjects per dataset: if more are planned, the release is several datasets, each complete by itself, of at most so many subjects.",
    )
    card: Card = Card()
    exports: list[Literal["webdataset"]] = Field(
        [], description="Copies for machine learning, beside the release: `webdataset` writes tar shards and a table."
    )
    models: bool = Field(
        False,
        description="Whether the weights are packed for publication, too. They can give away more of the training scans than images do.",
    )


class Compute(Section):
    """What the machine is asked for; docs/gpu.md says what each key does."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: PositiveInt = Field(1, description="GPUs (or processes) per training job.")
    precision: Literal["auto", "32-true", "bf16-mixed"] = Field(
        "auto", description="Around the networks only; `auto` takes bf16 where the hardware has it."
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile with static shapes, minutes once per job. `auto`: in trainings on a GPU; `true`: also where images are encoded and "
        "generated, worth it above some thousand images; `false`: nowhere. Changes the last bits.",
    )
    cuda_graphs: bool = Field(
        False,
        description="With `compile: true`, on a GPU: generation replays recorded CUDA graphs; for small images, which leave a GPU waiting.",
    )
    autotune: bool = Field(
        False,
        description="In trainings on a GPU, cuDNN times its convolutions and takes the fastest; a repeated training may then differ in the last bits.",
    )

    @model_validator(mode="after")
    def _graphs_are_compiled(self) -> Self:
        if self.cuda_graphs and self.compile is not True:
            raise ValueError("cuda_graphs needs compile: true")
        return self


#: A folder in a bucket.
S3 = r"^s3://[a-z0-9][a-z0-9.-]+(/[^/]+)+$"


class Storage(Section):
    """What stays on disk."""

    temporary: list[Literal["latents", "generated", "filtered"]] = Field(
        [],
        description="Shards that are deleted when the last job that reads them has ended. A later change that needs them makes them again.",
    )
    protect: bool = Field(
        True,
        description="Finished weights and the root of a sealed release become read-only, and a run that would replace them is refused before it starts.",
    )
    cohort: Annotated[str, Field(pattern=S3)] | None = Field(
        None, description="Fetched into `cohort.root` before it is read: `s3://bucket/folder`."
    )
    publish: Annotated[str, Field(pattern=S3)] | None = Field(
        None, description="Where `snakemake publish` puts the sealed release: `s3://bucket/folder`."
    )


# ------------------------------------------------------------------------------------------------- study


class Study(Section):
    """A whole study, as written in one YAML file."""

    study: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")] = Field(description="Names the results folder.")
    title: str = ""
    results: str = "results"
    seed: str = Field(
        "meddiff", min_length=1, description="Root of every random number; any text. Publish it with the cohort."
    )
    cohort: CohortSource
    covariates: Covariates = Field(min_length=1)
    splits: Splits = Splits()
    preprocess: Preprocess = Preprocess()
    autoencoder: Autoencoder = Autoencoder()
    augmentation: Augmentation = Augmentation()
    latents: Latents = Latents()
    diffusion: Diffusion = Diffusion()
    plan: list[PlanGroup] = Field(min_length=1)
    generate: Generate = Generate()
    privacy: Privacy = Privacy()
    distill: Distill = Distill()
    evaluate: Evaluate = Evaluate()
    segmentation: Segmentation | None = Field(None, description="Label maps of the cohort, where it has them.")
    sampler_study: SamplerStudy = SamplerStudy()
    augment: Augment = Augment()
    release: Release = Release()
    compute: Compute = Compute()
    storage: Storage = Storage()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.storage.cohort and not isinstance(self.cohort, BidsSource):
            raise ValueError(
                "storage.cohort: only a BIDS cohort is fetched, into cohort.root; set cohort.source: bids, or leave storage.cohort out"
            )
        factor = self.autoencoder.downsampling * 2 ** (len(self.diffusion.channels) - 1)
        wrong = [n for n in self.preprocess.shape if n % factor]
        if wrong:
            raise ValueError(
                f"preprocess.shape {list(self.preprocess.shape)} must be divisible by {factor} "
                f"(autoencoder {self.autoencoder.downsampling} x diffusion {factor // self.autoencoder.downsampling}); change the shape or use fewer levels"
            )
        taken = sorted(set(self.covariates) & RESERVED_COLUMNS)
        if taken:
            raise ValueError(
                f"covariates {taken} have names of columns that the tables already have; call them something else and set `column`"
            )
        names = [g.name for g in self.plan]
        if len(set(names)) != len(names):
            raise ValueError(f"plan: group names must be distinct, found {names}")
        for group in self.plan:
            for field in ("where", "grid", "base"):
                for name, value in getattr(group, field).items():
                    self._check_request(
                        f"plan.{group.name}.{field}.{name}", name, value if isinstance(value, list) else [value]
                    )
        self._check_labels()
        self._check_segmentation()
        self._check_sampler("generate.sampler", self.generate.sampler)
        for sampler in self.sampler_study.samplers or []:
            self._check_sampler("sampler_study.samplers", sampler)
        return self

    def _check_sampler(self, where: str, sampler: Sampler) -> None:
        if sampler == "flow" and self.diffusion.prediction_type != "flow":
            raise ValueError(f"{where}: flow needs diffusion.prediction_type: flow")
        if self.diffusion.prediction_type == "flow" and sampler not in ("flow", "dpmpp", "unipc"):
            raise ValueError(
                f"{where}: diffusion.prediction_type: flow can be sampled by flow, dpmpp or unipc, not {sampler}"
            )

    def _check_segmentation(self) -> None:
        if self.segmentation is None:
            return
        if self.spatial_dims != 3:
            raise ValueError("segmentation: volumes need 3D images; leave the section out")
        for name in self.segmentation.structures:
            covariate = self.covariates.get(name)
            if not isinstance(covariate, ContinuousCovariate) or covariate.unit != "mL":
                raise ValueError(
                    f"segmentation.structures: {name} is no covariate with unit mL; name each structure as the covariate that is its volume"
                )

    def _check_labels(self) -> None:
        named = {
            "augment.target": self.augment.target,
            "augment.subgroup": self.augment.subgroup,
            "privacy.subgroup": self.privacy.subgroup,
        }
        if self.augment.shift:
            named["augment.shift.covariate"] = self.augment.shift.covariate
        for where, name in named.items():
            if name is None:
                continue
            covariate = self.covariates.get(name)
            if covariate is None:
                raise ValueError(f"{where}: {name} is no declared covariate; declared are {sorted(self.covariates)}")
            if not isinstance(covariate, CategoricalCovariate):
                raise ValueError(
                    f"{where}: {name} is a number, and a label is needed; declare a categorical covariate, for example its terciles"
                )
        if self.augment.shift:
            if self.augment.shift.covariate == self.augment.target:
                raise ValueError(
                    "augment.shift.covariate: keeping levels of the target out of training leaves nothing to learn"
                )
            covariate = self.covariates[self.augment.shift.covariate]
            levels = set(covariate.levels) if isinstance(covariate, CategoricalCovariate) else set()
            if not set(self.augment.shift.levels) < levels:
                raise ValueError(
                    f"augment.shift.levels must be some, not all, of {sorted(levels)}, found {self.augment.shift.levels}"
                )
        unknown = sorted(set(self.augment.groups) - {group.name for group in self.plan})
        if unknown:
            raise ValueError(
                f"augment.groups: the plan has no group {unknown[0]}; it has {sorted(group.name for group in self.plan)}"
            )

    def _check_request(self, where: str, name: str, values: list[Scalar]) -> None:
        covariate = self.covariates.get(name)
        if covariate is None:
            raise ValueError(f"{where}: no such covariate; declared are {sorted(self.covariates)}")
        for value in values:
            if isinstance(covariate, CategoricalCovariate):
                if str(value) not in covariate.levels:
                    raise ValueError(f"{where}: {value!r} is not one of {covariate.levels}")
            elif not isinstance(value, (int, float)) or not covariate.range[0] <= value <= covariate.range[1]:
                raise ValueError(
                    f"{where}: {value!r} is outside the declared range {list(covariate.range)} {covariate.unit}"
                )

    @property
    def spatial_dims(self) -> int:
        return len(self.preprocess.shape)


#: Columns of the manifest and the plan; no covariate can have their names.
RESERVED_COLUMNS = frozenset(
    [
        "scan_id",
        "subject_id",
        "session_id",
        "path",
        "sha256",
        "content_sha256",
        "split",
        "sample_id",
        "group",
        "index",
        "attempt",
        "cohort_root",
        "noise_index",
        "seed_key",
        "shard",
    ]
)

#: What a release says of itself.
_DESCRIBED = tuple(
    f"release.{name}" for name in Release.model_fields if name not in ("signing_key", "exports", "models")
)

#: What each stage may read, and therefore what makes it run again when it changes: sections, or one key of a section.
STAGES: dict[str, tuple[str, ...]] = {
    "simulate": ("seed", "cohort"),
    "cohort": ("seed", "cohort", "covariates", "splits"),
    "preprocess": ("preprocess",),
    "quality": ("preprocess",),
    "autoencoder": ("seed", "augmentation", "autoencoder", "compute"),
    "latents": ("seed", "augmentation", "latents", "compute"),
    "scale": ("covariates", "latents"),
    "diffusion": ("seed", "covariates", "diffusion", "compute"),
    "embedder": ("seed", "privacy.embedder"),
    "calibrate": ("seed", "privacy.level", "privacy.subgroup"),
    "plan": ("seed", "covariates", "plan", "generate.shard_size"),
    "generate": ("generate", "compute"),
    "filter": ("generate", "compute", "privacy.subgroup", "privacy.max_attempts"),
    "privacy": ("seed", "covariates", "privacy"),
    "gate": ("privacy.enforce",),
    "neighbours": ("study", "title", "cohort", "covariates"),
    "distill": ("seed", "covariates", "distill"),
    "images": ("study", "release.suffix", "release.shard_size", "plan", "preprocess"),
    "release": ("study", "title", "cohort", "covariates", *_DESCRIBED, "preprocess", "generate", "distill.subjects"),
    "segmenter": ("seed", "segmentation", "preprocess", "compute"),
    "evaluate": ("seed", "covariates", "plan", "evaluate", "preprocess"),
    "sampler_study": (
        "seed",
        "covariates",
        "plan",
        "generate",
        "evaluate.bootstrap",
        "evaluate.realism_bootstrap",
        "evaluate.permutations",
        "sampler_study",
        "compute",
    ),
    "showcase": ("seed", "covariates", "generate", "evaluate.sweep_steps", "compute"),
    "augment_design": ("seed", "covariates", "plan", "augment"),
    "augment_plan": ("seed", "covariates", "augment"),
    "augment_data": ("seed", "covariates", "augment", "compute"),
    "augment": ("seed", "augment", "compute"),
    "augment_test": ("seed", "covariates", "augment"),
    "report": ("study", "title", "cohort", "covariates", "preprocess"),
    # The release holds the whole study but for what is done with it afterwards, so that asking for a copy does not seal it again.
    "ledger": (
        *(name for name in Study.model_fields if name not in ("release", "storage")),
        *_DESCRIBED,
        "release.signing_key",
    ),
    "export": ("study", "release.name", "release.licence"),
    "export_index": ("study", "release.name", "release.licence"),
    "export_models": ("study", "release.name"),
}

#: Keys whose values are paths on the user's machine; `without_paths` blanks them in everything that is published.
PATH_KEYS = {
    ("results",),
    ("cohort", "root"),
    ("cohort", "table"),
    ("preprocess", "brain_mask"),
    ("autoencoder", "perceptual", "weights"),
    ("plan", "table"),
    ("release", "signing_key"),
    ("evaluate", "features", "weights"),
    ("segmentation", "labels"),
}


def without_paths(content: dict[str, Any]) -> dict[str, Any]:
    """A study, or the part of it that a stage may read, as it is published: paths of the user's machine are "(path)"."""

    def blank(value: Any, keys: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {key: blank(item, (*keys, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [blank(item, keys) for item in value]
        return "(path)" if keys in PATH_KEYS and value is not None else value

    return {key: blank(value, (key,)) for key, value in content.items()}


def part_of(content: dict[str, Any], sections: Sequence[str]) -> dict[str, Any]:
    """Some sections, or single keys of sections ("privacy.level"), of a study."""
    part: dict[str, Any] = {}
    for name in sections:
        section, _, key = name.partition(".")
        if key:
            part.setdefault(section, {})[key] = content[section][key]
        else:
            part[section] = content[section]
    return part


def load_study(path: Path) -> Study:
    """Read and validate a study.

    Raises
    ------
    UserError
        The file is missing, is no YAML mapping, or breaks a rule; every problem is listed with its key.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such study file. Give a YAML file, for example config/config.yaml.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory, expected a YAML file. Name the study file itself.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({error.reason}). A study is a YAML file in UTF-8.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    return parse_study(raw, str(path))


def parse_study(raw: Any, origin: str) -> Study:
    """Validate an already parsed study; `origin` names it in error messages."""
    if not isinstance(raw, dict):
        raise UserError(f"{origin}: expected a mapping of sections, found {type(raw).__name__}. See config/README.md.")
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        raise UserError(_explain(error, origin)) from None


def _explain(error: ValidationError, origin: str) -> str:
    tags = {"continuous", "categorical", "simulated", "bids", "table"}
    lines = [f"{origin}: {error.error_count()} problem(s) in the study:"]
    for problem in error.errors(include_url=False):
        where = ".".join(
            str(part)
            for i, part in enumerate(problem["loc"])
            if not (i and str(part) in tags) and not re.match(r"(tuple|function)\b", str(part))
        )
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            known = difflib.get_close_matches(
                str(problem["loc"][-1]), {key for _, model in _sections() for key in model.model_fields}, 1
            )
            message = f"unknown key. {f'Did you mean `{known[0]}`? ' if known else ''}config/keys.md lists all keys"
        elif problem["type"] in ("union_tag_not_found", "union_tag_invalid"):
            message = "set `source` to bids, table or simulated"
        found = problem.get("input")
        shown = (
            f" (found {found!r})"
            if problem["type"] != "missing" and isinstance(found, (str, int, float, bool, type(None)))
            else ""
        )
        lines.append(f"  {where or 'study'}: {message}{shown}")
    return "\n".join(lines)


def freeze(study: Study, stage: str | None, folder: Path) -> Path:
    """Write what `stage` may read (the whole study for None) to a content-addressed file and return its path.

    The file never changes after it is written, so a job that starts hours later reads what was frozen at the
    start, whatever happened to the YAML meanwhile.
    """
    everything = study.model_dump(mode="json")
    content = everything if stage is None else part_of(everything, STAGES[stage])
    text = canonical_json(content)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = Path(folder) / f"{stage or 'study'}-{digest}.json"
    if not path.exists():
        write_atomic(path, (text + "\n").encode())
    return path


def load_stage(path: Path, stage: str) -> Study:
    """Read a file that `freeze` wrote for `stage`; reading what the stage did not declare raises AttributeError."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such frozen config. Make one with: python -m meddiff_steps freeze STUDY.yaml"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(
            f"{path}: not a frozen config ({error}). Make one with: python -m meddiff_steps freeze STUDY.yaml"
        ) from None
    declared = [name.partition(".")[::2] for name in STAGES[stage]]
    missing = [section for section, key in declared if section not in raw or (key and key not in raw[section])]
    if missing:
        raise UserError(f"{path}: no section {missing}, which stage `{stage}` reads. Freeze it from the study again.")
    placeholder: dict[str, Any] = {
        "study": "placeholder",
        "cohort": {"source": "simulated"},
        "covariates": {"x": {"unit": "", "range": [0, 1]}},
        "plan": [{"name": "x", "subjects": 1}],
    }
    values = {}
    for section, key in declared:
        values[section] = getattr(_Unchecked.model_validate(placeholder | {section: raw[section]}), section)
        if key:
            _keep_only(values[section], {other for name, other in declared if name == section})
    view = Study.model_construct(**values)
    _keep_only(view, set(values))
    return view


def _keep_only(section: BaseModel, names: set[str]) -> None:
    for name in set(type(section).model_fields) - names:
        section.__dict__.pop(name, None)


class _Unchecked(Study):
    """A study without the rules that relate its sections: one section at a time is read back through it."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        return self


def json_schema() -> str:
    """The JSON Schema of a study file, for editors."""
    return json.dumps(Study.model_json_schema(), indent=2, sort_keys=True) + "\n"


def key_reference() -> str:
    """Every key of a study as Markdown tables: type, default and meaning."""
    lines = [
        "# Keys of a study",
        "",
        "Generated from `meddiff_steps/config.py` by `python -m meddiff_steps schema`; a test compares.",
        "",
    ]
    for title, model in _sections():
        lines += [
            f"## `{title}`",
            "",
            " ".join((model.__doc__ or "").split()),
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for name, field in model.model_fields.items():
            if field.is_required():
                default = "required"
            elif isinstance(field.default, BaseModel):
                default = f"see `{name}`"
            else:
                default = f"`{json.dumps(field.default, default=lambda section: section.model_dump(mode='json', exclude_defaults=True))}`"
            kind = _type_name(field.annotation).replace("|", "\\|")
            lines.append(f"| `{name}` | {kind} | {default} | {(field.description or '').replace('|', chr(92) + '|')} |")
        lines.append("")
    return "\n".join(lines)


def _sections() -> list[tuple[str, type[BaseModel]]]:
    listed: list[tuple[str, type[BaseModel]]] = [("study", Study)]
    listed += [
        ("cohort (source: simulated)", SimulatedSource),
        ("cohort (source: bids)", BidsSource),
        ("cohort (source: table)", TableSource),
    ]
    listed += [("covariates.NAME (a number)", ContinuousCovariate), ("covariates.NAME (a label)", CategoricalCovariate)]
    for name, field in Study.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            listed += _nested(name, field.annotation)
    return [*listed, ("plan (a list of groups)", PlanGroup), ("augment.arms (a list)", Arm), ("augment.shift", Shift)]


def _nested(name: str, model: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    found = [(name, model)]
    for key, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _nested(f"{name}.{key}", field.annotation)
    return found


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):
        return {
            "str": "text",
            "int": "whole number",
            "float": "number",
            "bool": "true or false",
            "NoneType": "null",
        }.get(annotation.__name__, annotation.__name__)
    origin = getattr(annotation, "__origin__", None)
    arguments: tuple[Any, ...] = getattr(annotation, "__args__", ())
    if origin is Literal:
        return " | ".join(f"`{value}`" for value in arguments)
    if origin is Annotated or (origin is not None and hasattr(annotation, "__metadata__")):
        return _type_name(origin if origin is not Annotated else arguments[0])
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if origin is tuple:
        return "[" + ", ".join(_type_name(a) for a in arguments) + "]"
    if origin is dict:
        return f"mapping to {_type_name(arguments[1])}"
    return " | ".join(dict.fromkeys(_type_name(a) for a in arguments)) if arguments else str(annotation)
