"""Section `downstream`: does a classifier gain from synthetic images?"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from meddiff_steps.config.base import Alphanumeric, Fraction, Name, Optimiser, PositiveInt, Section, Weight


class Arm(Section):
    """One training set of the study; every arm takes the same number of gradient steps."""

    name: Name = Field(description="Of the arm, in `primary`, tables and figures.")
    real: Fraction = Field(
        1.0,
        description="Share of the real training subjects, by a stable hash: smaller shares are parts of larger ones.",
    )
    synthetic: Annotated[float, Field(ge=0.0, le=100.0)] = Field(
        0.0,
        description="Images added per real one of the same class (with `real: 0`, per training scan; with "
        "`rare_only`, per scan that a class lacks).",
    )
    source: Literal["filtered", "generated", "reconstruction"] = Field(
        "filtered",
        description="What is added: accepted images, candidates before the filter, or the arm's own real scans "
        "through the autoencoder (a control).",
    )
    rare_only: bool = Field(
        False, description="Add only to classes rarer than the largest; `synthetic: 1` fills the whole gap."
    )
    balance: Literal["none", "weights", "oversample"] = Field(
        "none", description="Rare classes weigh more in the loss, or are drawn more often."
    )
    classical: bool = Field(
        False,
        description="Change every training image at random: mirrored (with `variants.flip`), moved, re-contrasted, "
        "noised, cropped.",
    )
    mixup: Weight = Field(0.0, description="Alpha of mixup (Zhang et al. 2018); 0 leaves it out.")
    test: Literal["real", "synthetic"] = Field(
        "real", description="`synthetic`: train on real, test on synthetic images."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.real == 0 and self.synthetic == 0:
            raise ValueError(f"arm {self.name} has nothing to learn from: `real` or `synthetic` must be above 0")
        if self.rare_only and not (self.real and self.synthetic):
            raise ValueError(
                f"arm {self.name}: rare_only adds synthetic images to real ones; both `real` and `synthetic` must be "
                "above 0"
            )
        if self.source == "reconstruction" and (self.synthetic > 1 or self.rare_only):
            raise ValueError(
                f"arm {self.name}: a scan has one reconstruction, so `synthetic` is at most 1 and `rare_only` is not "
                "possible"
            )
        if self.test == "synthetic" and self.synthetic:
            raise ValueError(
                f"arm {self.name} is tested on synthetic images and must not learn from them: set `synthetic: 0`"
            )
        return self

    @property
    def drawn(self) -> bool:
        """Whether it learns from images that a generator drew: each generator seed makes another training set of it."""
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


class Stress(Section):
    """Classifiers tested along covariates, on synthetic images that were planned for it. Off without `groups`."""

    groups: list[Alphanumeric] = Field(
        [],
        description="Groups of the plan that arms do not learn from, for example a `grid` over the target and another "
        "covariate.",
    )
    along: list[Name] = Field([], description="Covariates whose strata are compared; all but the target when left out.")
    bins: Annotated[int, Field(ge=2)] = Field(
        4, description="Strata of a number, with as many planned images each; one per value where these are fewer."
    )


class Neighbours(Section):
    """Classifiers that see a test scan also as its neighbours, drawn anew by the model, and average. Off without
    `count`."""

    count: Annotated[int, Field(ge=0)] = Field(
        0, description="Neighbours of every test scan, which are drawn without its covariates and report."
    )
    depth: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.2,
        description="How far a scan is noised before it is drawn anew, as a share of the noise process. Larger varies "
        "more, and loses what tells the target.",
    )
    num_inference_steps: PositiveInt | None = Field(
        None, description="Steps of a whole process; the default of `ddim` or `flow` when left out."
    )


class ClassifierOptimiser(Optimiser):
    """Training of every classifier."""

    steps: Annotated[
        int, Field(ge=1, description="Gradient steps, the same in every arm. The best validated weights are kept.")
    ] = 1000
    batch_size: Annotated[
        int, Field(ge=1, description="Images per gradient step, at least 4 for batch normalisation. Bounds memory.")
    ] = 32
    learning_rate: Annotated[
        float, Field(gt=0.0, description="Largest step size of AdamW. Lower it where the loss jumps.")
    ] = 2e-3
    ema_decay: Annotated[
        float,
        Field(
            ge=0.0, lt=1.0, description="Decay per step of the averaged weights that are tested; about 1 - 5 / `steps`."
        ),
    ] = 0.98
    validate_every: Annotated[
        int,
        Field(
            ge=1,
            description="Steps between looks at the validation subjects, whose best decides which weights are kept.",
        ),
    ] = 100


class Classifier(Section):
    """MONAI ResNet that learns the target from images alone; the same settings in every arm."""

    longest_side: PositiveInt = Field(
        64, description="Voxels or pixels; images are reduced by block means until no side is longer."
    )
    channels: list[PositiveInt] = Field(
        [16, 32, 64, 128], min_length=4, max_length=4, description="Feature channels of the four stages."
    )
    blocks: list[PositiveInt] = Field(
        [1, 1, 1, 1],
        min_length=4,
        max_length=4,
        description="Residual blocks per stage ([2, 2, 2, 2] is ResNet-18).",
    )
    weight_decay: Weight = Field(
        0.01, description="Of AdamW: pull of all weights towards 0. Raise it against overfitting."
    )
    optimiser: ClassifierOptimiser = Field(ClassifierOptimiser(), description="Training of every classifier.")

    @model_validator(mode="after")
    def _batch_has_statistics(self) -> Self:
        if self.optimiser.batch_size < 4:
            raise ValueError(
                f"optimiser.batch_size must be at least 4 for batch normalisation, found {self.optimiser.batch_size}"
            )
        return self


class Downstream(Section):
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
    primary: Primary = Field(Primary(), description="The comparison that the verdict is about.")
    margin: Annotated[float, Field(gt=0.0, le=0.5)] = Field(
        0.035, description="Loss of AUC that would be tolerated (non-inferiority; Packhäuser 2022)."
    )
    subgroup: Name | None = Field(
        None, description="Categorical covariate by whose levels figures are also given: worst group and gap."
    )
    shift: Shift | None = Field(None, description="A group that is kept out of training and tested on its own.")
    stress: Stress = Field(Stress(), description="A test along covariates, on synthetic images.")
    neighbours: Neighbours = Field(Neighbours(), description="Test-time augmentation by the model.")
    seeds: Annotated[int, Field(ge=2, le=100)] = Field(
        5,
        description="Classifiers per arm: initial weights and order of batches. Below 5, intervals are very wide.",
    )
    generator_seeds: Annotated[int, Field(ge=1, le=20)] = Field(
        1,
        description="Cohorts that arms with synthetic images are made of: the released one, and others of the same "
        "requests with other noise, of just the subjects that arms need. Every classifier seed is run with each of "
        "them.",
    )
    retrain: bool = Field(
        False,
        description="Whether every further generator seed trains a diffusion model of its own, which costs as much "
        "as the first. Else all draw from one.",
    )
    jobs: PositiveInt = Field(1, description="Jobs that the arms are spread over.")
    bootstrap: Annotated[int, Field(ge=200)] = Field(2000, description="Resamples of subjects and seeds.")
    classifier: Classifier = Field(Classifier(), description="The network that every arm trains.")

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
                    f"primary names the arm {name}, which is tested on synthetic images; figures on other images are "
                    "not comparable"
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
