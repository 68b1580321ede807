"""A whole study: its sections, and what must hold between them."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import Field, ValidationInfo, model_validator

from meddiff_steps.config.autoencoder import Autoencoder
from meddiff_steps.config.base import LocalPath, Scalar, Section, Text
from meddiff_steps.config.cohort import BidsSource, CohortSource, Splits
from meddiff_steps.config.compute import Compute
from meddiff_steps.config.cost import Cost
from meddiff_steps.config.counterfactual import Counterfactual
from meddiff_steps.config.covariates import CategoricalCovariate, ContinuousCovariate, Covariates, level_text
from meddiff_steps.config.decoder import Decoder
from meddiff_steps.config.diffusion import Diffusion
from meddiff_steps.config.downstream import Downstream
from meddiff_steps.config.evaluate import Evaluate
from meddiff_steps.config.few_step import FewStep
from meddiff_steps.config.generate import Generate
from meddiff_steps.config.latents import Latents
from meddiff_steps.config.lineup import Lineup
from meddiff_steps.config.plan import PlanGroup
from meddiff_steps.config.preprocess import Preprocess
from meddiff_steps.config.privacy import Privacy
from meddiff_steps.config.release import Release
from meddiff_steps.config.sampler_study import SamplerStudy
from meddiff_steps.config.second_model import SecondModel
from meddiff_steps.config.segmentation import Segmentation
from meddiff_steps.config.storage import Storage
from meddiff_steps.config.variants import Variants
from meddiff_steps.core.registries import is_of_students, samplers_of

#: Context of a validation that reads one section back: what relates it to others was checked when the study was read.
ONE_SECTION = {"relations": False}


class Study(Section):
    """A whole study, as written in one YAML file."""

    study: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")] = Field(description="Names the results folder.")
    title: Text = Field("", description="What the study is about, in a few words, for the report and the README.")
    results: LocalPath = Field(
        "results",
        description="Folder that the study's own folder lies in; relative paths start at the working directory.",
    )
    seed: str = Field(
        "meddiff", min_length=1, description="Root of every random number; any text. Publish it with the cohort."
    )
    cohort: CohortSource = Field(description="Where real scans come from, by its key `source`.")
    covariates: Covariates = Field(min_length=1, description="What images are conditioned on, by name.")
    splits: Splits = Field(Splits(), description="Which subjects are kept for what.")
    preprocess: Preprocess = Field(Preprocess(), description="From any scan to one grid and one scale.")
    autoencoder: Autoencoder = Field(Autoencoder(), description="The first stage, from images to latents and back.")
    decoder: Decoder = Field(Decoder(), description="What draws the detail that latents leave open.")
    variants: Variants = Field(Variants(), description="Changed copies of training scans.")
    latents: Latents = Field(Latents(), description="Encoded scans.")
    diffusion: Diffusion = Field(Diffusion(), description="The model that draws latents.")
    few_step: FewStep = Field(FewStep(), description="A student that draws in a few steps. Off by default.")
    plan: list[PlanGroup] = Field(min_length=1, description="Which synthetic subjects are made, in groups.")
    generate: Generate = Field(Generate(), description="How images are drawn.")
    privacy: Privacy = Field(Privacy(), description="What may be released.")
    second_model: SecondModel = Field(SecondModel(), description="A model that never saw a real scan. Off by default.")
    evaluate: Evaluate = Field(Evaluate(), description="What is measured on synthetic images.")
    segmentation: Segmentation | None = Field(None, description="Label maps of the cohort, where it has them.")
    sampler_study: SamplerStudy = Field(SamplerStudy(), description="Which sampler, how many steps, how much guidance.")
    lineup: Lineup = Field(Lineup(), description="Real and synthetic images for people to tell apart.")
    downstream: Downstream = Field(
        Downstream(), description="Does a classifier gain from synthetic images? Off by default."
    )
    counterfactual: Counterfactual = Field(
        Counterfactual(), description="Real scans with another value of a covariate. Off by default."
    )
    release: Release = Field(Release(), description="The synthetic cohort as a BIDS dataset.")
    compute: Compute = Field(Compute(), description="What the machine is asked for.")
    storage: Storage = Field(Storage(), description="What stays on disk, and where it goes.")
    cost: Cost = Field(Cost(), description="What `plan-cost` reckons with.")

    @model_validator(mode="before")
    @classmethod
    def _values_as_declared(cls, content: Any) -> Any:
        return values_as_declared(content) if isinstance(content, Mapping) else content

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Self:
        if info.context == ONE_SECTION:
            return self
        problems = [problem for relation in RELATIONS for problem in relation(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def spatial_dims(self) -> int:
        """2 or 3."""
        return len(self.preprocess.shape)

    @property
    def student_draws(self) -> bool:
        """Whether the cohort is drawn by a student (section `few_step`)."""
        return is_of_students(self.generate.sampler)

    def drawn_by_teacher(self) -> Self:
        """The study whose images the diffusion model draws itself."""
        return self._drawn_with(Generate().sampler) if self.student_draws else self

    def drawn_by_student(self) -> Self:
        """The study whose images its student draws; itself where there is none, or where it is so."""
        return self if self.student_draws or not self.few_step.method else self._drawn_with(self.few_step.method)

    def _drawn_with(self, sampler: str) -> Self:
        changes = {"sampler": sampler, "num_inference_steps": None}
        return self.model_copy(update={"generate": self.generate.model_copy(update=changes)})


def values_as_declared(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """A study's content in which values that are asked for are numbers or text as their covariates are declared.

    What a file or `--config` gives as text (`1e3`, `01`) can be either.
    """
    declared = content.get("covariates")
    if not isinstance(declared, Mapping):
        return content

    def typed(name: Any, value: Any) -> Any:
        if isinstance(value, list):
            return [typed(name, one) for one in value]
        covariate = declared.get(name)
        if isinstance(covariate, CategoricalCovariate) or (isinstance(covariate, Mapping) and "levels" in covariate):
            return level_text(value)
        try:
            return float(value) if covariate is not None and isinstance(value, str) else value
        except ValueError:
            return value

    def group(given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        asked = {key: given[key] for key in ("where", "grid", "base") if isinstance(given.get(key), Mapping)}
        return {**given, **{key: {name: typed(name, value) for name, value in asked[key].items()} for key in asked}}

    plan, moved = content.get("plan"), content.get("counterfactual")
    changed: dict[str, Any] = {}
    if isinstance(plan, list):
        changed["plan"] = [group(given) for given in plan]
    if isinstance(moved, Mapping) and "values" in moved:
        changed["counterfactual"] = {**moved, "values": typed(moved.get("covariate"), moved["values"])}
    return {**content, **changed}


# --------------------------------------------------------------------------- relations between sections
#
# Each says what is wrong, with its key.  None relies on another: all problems of a study are told at once.

#: Columns of the manifest, the plan and the released table; no covariate can have their names.
RESERVED_COLUMNS = frozenset(
    "scan_id subject_id session_id path sha256 content_sha256 split "
    "sample_id group index attempt cohort_root noise_index seed_key shard participant_id image".split()
)


def _fetched_cohort(study: Study) -> Iterator[str]:
    if study.storage.cohort and not isinstance(study.cohort, BidsSource):
        yield (
            "storage.cohort: only a BIDS cohort is fetched, into cohort.root; set cohort.source: bids, or leave "
            "storage.cohort out"
        )


def _shape_divides(study: Study) -> Iterator[str]:
    # Only networks that halve the latents need more of them than one stage does.
    halvings = len(study.diffusion.channels) - 1 if study.diffusion.network != "resnet" else 0
    first, second = study.autoencoder.downsampling, 2**halvings
    if any(n % (first * second) for n in study.preprocess.shape):
        yield (
            f"preprocess.shape {list(study.preprocess.shape)} must be divisible by {first * second} "
            f"(autoencoder {first} x diffusion {second}); change the shape or use fewer levels"
        )


# ............................................................................................ covariates


def _covariate_names(study: Study) -> Iterator[str]:
    taken = sorted(set(study.covariates) & RESERVED_COLUMNS)
    if taken:
        yield (
            f"covariates {taken} have names of columns that the tables already have; call them something else and set "
            "`column`"
        )


def _not_a_value(study: Study, name: str, values: Sequence[Scalar]) -> Iterator[str]:
    """What is wrong with values that a covariate is asked to have."""
    covariate = study.covariates.get(name)
    if covariate is None:
        near = difflib.get_close_matches(name, study.covariates, 1)
        meant = f" Did you mean `{near[0]}`?" if near else ""
        yield f"no such covariate; declared are {sorted(study.covariates)}.{meant}"
        return
    for value in values:
        if isinstance(covariate, CategoricalCovariate):
            if str(value) not in covariate.levels:
                yield f"{value!r} is not one of {covariate.levels}"
        elif not isinstance(value, (int, float)) or not covariate.range[0] <= value <= covariate.range[1]:
            yield f"{value!r} is outside the declared range {list(covariate.range)} {covariate.unit}"


def _not_a_label(study: Study, name: str) -> Iterator[str]:
    """What is wrong with a covariate that is to be categorical."""
    covariate = study.covariates.get(name)
    if covariate is None:
        yield f"{name} is no declared covariate; declared are {sorted(study.covariates)}"
    elif not isinstance(covariate, CategoricalCovariate):
        yield f"{name} is a number, and a label is needed; declare a categorical covariate, for example its terciles"


def _labels(study: Study) -> Iterator[str]:
    named = {
        "privacy.subgroup": study.privacy.subgroup,
        "downstream.target": study.downstream.target,
        "downstream.subgroup": study.downstream.subgroup,
        "downstream.shift.covariate": study.downstream.shift.covariate if study.downstream.shift else None,
    }
    for where, name in named.items():
        yield from (f"{where}: {problem}" for problem in (_not_a_label(study, name) if name is not None else ()))


def _structures(study: Study) -> Iterator[str]:
    if study.segmentation is None:
        return
    if study.spatial_dims != 3:
        yield "segmentation: volumes need 3D images; leave the section out"
    for name in study.segmentation.structures:
        covariate = study.covariates.get(name)
        if not isinstance(covariate, ContinuousCovariate) or covariate.unit != "mL":
            yield (
                f"segmentation.structures: {name} is no covariate with unit mL; name each structure as the covariate "
                "that is its volume"
            )


def _volumes(study: Study) -> Iterator[str]:
    registration = study.preprocess.registration
    if study.segmentation is not None and registration is not None and registration.transform == "affine":
        yield (
            "segmentation: its volumes are compared with covariates in mL, and preprocess.registration.transform: "
            "affine gives all heads one size; take rigid, or leave the section out"
        )


def _counterfactual(study: Study) -> Iterator[str]:
    wanted = study.counterfactual
    if wanted.covariate is not None:
        where = "values" if wanted.covariate in study.covariates else "covariate"
        for problem in _not_a_value(study, wanted.covariate, wanted.values):
            yield f"counterfactual.{where}: {problem}"


# .................................................................................................. plan


def _group_names(study: Study) -> Iterator[str]:
    names = [group.name for group in study.plan]
    if len(set(names)) != len(names):
        yield f"plan: group names must be distinct, found {names}"


def _requests(study: Study) -> Iterator[str]:
    for group in study.plan:
        for field in ("where", "grid", "base"):
            for name, value in getattr(group, field).items():
                for problem in _not_a_value(study, name, value if isinstance(value, list) else [value]):
                    yield f"plan.{group.name}.{field}.{name}: {problem}"


# .............................................................................................. samplers


def _samplers(study: Study) -> Iterator[str]:
    kind = study.diffusion.prediction_type
    able = samplers_of(kind)
    named = [("sampler_study.samplers", sampler) for sampler in study.sampler_study.samplers or []]
    if not study.student_draws:
        named.append(("generate.sampler", study.generate.sampler))
    for where, sampler in named:
        if sampler not in able:
            yield (
                f"{where}: {sampler} cannot sample a model with diffusion.prediction_type: {kind}; take one of"
                f" {', '.join(able)}, or another prediction_type"
            )


def _guide(study: Study) -> Iterator[str]:
    if study.generate.guidance == "autoguidance" and not study.diffusion.guide_share:
        yield (
            "generate.guidance: autoguidance needs the weights of an early part of the training; set"
            " diffusion.guide_share (0.2, say), or take classifier_free"
        )


def _student(study: Study) -> Iterator[str]:
    student, generate = study.few_step, study.generate
    if student.method is not None and study.second_model.subjects:
        yield (
            "few_step.method: a second model has no student; leave few_step.method out, or set second_model.subjects: 0"
        )
    if not study.student_draws:
        return
    if student.method != generate.sampler:
        yield (
            f"generate.sampler: {generate.sampler} draws from a student, and few_step.method is {student.method}; set"
            f" few_step.method: {generate.sampler}, or take another sampler"
        )
    steps = generate.num_inference_steps
    if generate.sampler == "progressive" and steps not in (None, student.num_inference_steps):
        yield (
            f"generate.num_inference_steps: the student is for few_step.num_inference_steps: "
            f"{student.num_inference_steps}, found {steps}; set both to one number"
        )
    if generate.sampler == "consistency" and steps is not None and student.teacher_steps % steps:
        yield (
            f"generate.num_inference_steps: the student knows the levels of few_step.teacher_steps: "
            f"{student.teacher_steps}, of which every n-th is taken; {steps} does not divide it"
        )
    if study.downstream.target is not None and study.downstream.retrain:
        yield (
            "downstream.retrain: further models are trained and have no student; set it to false, or take a"
            " generate.sampler that draws from the diffusion model itself"
        )


def _decoder(study: Study) -> Iterator[str]:
    odd = [n for n in study.preprocess.shape if n % 2]
    if study.decoder.network is not None and odd:
        yield f"decoder: draws in blocks of two voxels, but preprocess.shape has {odd}; take even numbers"


# ............................................................................................ downstream


def _shifted_levels(study: Study) -> Iterator[str]:
    shift = study.downstream.shift
    if shift is None:
        return
    if shift.covariate == study.downstream.target:
        yield "downstream.shift.covariate: keeping levels of the target out of training leaves nothing to learn"
    covariate = study.covariates.get(shift.covariate)
    if isinstance(covariate, CategoricalCovariate) and not set(shift.levels) < set(covariate.levels):
        yield f"downstream.shift.levels must be some, not all, of {sorted(covariate.levels)}, found {shift.levels}"


def _groups_of_arms(study: Study) -> Iterator[str]:
    known = {group.name for group in study.plan}
    for name in sorted(set(study.downstream.groups) - known):
        yield f"downstream.groups: the plan has no group {name}; it has {sorted(known)}"


RELATIONS: tuple[Callable[[Study], Iterator[str]], ...] = (
    _fetched_cohort,
    _shape_divides,
    _covariate_names,
    _labels,
    _structures,
    _volumes,
    _counterfactual,
    _group_names,
    _requests,
    _samplers,
    _guide,
    _student,
    _decoder,
    _shifted_levels,
    _groups_of_arms,
)
