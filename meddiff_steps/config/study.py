"""A whole study: its sections, and what must hold between them."""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import Field, ValidationInfo, model_validator

from meddiff_steps.config.anomaly import Anomaly
from meddiff_steps.config.autoencoder import Autoencoder
from meddiff_steps.config.base import LocalPath, Scalar, Section, Text
from meddiff_steps.config.cohort import BidsSource, CohortSource, Splits
from meddiff_steps.config.compute import Compute
from meddiff_steps.config.cost import Cost
from meddiff_steps.config.counterfactual import Counterfactual
from meddiff_steps.config.covariates import CategoricalCovariate, ContinuousCovariate, Covariates, level_text
from meddiff_steps.config.decoder import Decoder
from meddiff_steps.config.diffusion import Diffusion, Maisi
from meddiff_steps.config.downstream import Downstream
from meddiff_steps.config.evaluate import Evaluate
from meddiff_steps.config.few_step import FewStep
from meddiff_steps.config.generate import Generate
from meddiff_steps.config.image_to_image import DrawingNetwork, Harmonisation, SegmentationEnsemble, Translation
from meddiff_steps.config.init_from import InitFrom
from meddiff_steps.config.inpainting import Inpainting
from meddiff_steps.config.latents import Latents
from meddiff_steps.config.lineup import Lineup
from meddiff_steps.config.normative import Normative
from meddiff_steps.config.pairs import Pairs, SegmentationStudy
from meddiff_steps.config.plan import PlanGroup, placeholders
from meddiff_steps.config.preprocess import Preprocess
from meddiff_steps.config.privacy import Privacy
from meddiff_steps.config.reconstruction import Reconstruction
from meddiff_steps.config.registration import PairRegistration
from meddiff_steps.config.release import SUFFIXES, Release
from meddiff_steps.config.sampler_study import SamplerStudy
from meddiff_steps.config.second_model import SecondModel
from meddiff_steps.config.segmentation import Segmentation
from meddiff_steps.config.shape_completion import ShapeCompletion
from meddiff_steps.config.storage import Storage
from meddiff_steps.config.text import FreeText
from meddiff_steps.config.variants import Variants
from meddiff_steps.core.registries import ANOMALY_MAPS, DENOISERS, is_of_students, samplers_of

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
    text: FreeText = Field(FreeText(), description="What reports and other notes say of scans. Off by default.")
    splits: Splits = Field(Splits(), description="Which subjects are kept for what.")
    preprocess: Preprocess = Field(Preprocess(), description="From any scan to one grid and one scale.")
    init_from: InitFrom | None = Field(None, description="Trained weights to start from. Off by default.")
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
    pairs: Pairs | None = Field(
        None, description="Label maps that are generated, too, each with its image. Off by default."
    )
    segmentation_study: SegmentationStudy = Field(
        SegmentationStudy(), description="Does a segmenter gain from synthetic pairs? Needs `pairs`."
    )
    sampler_study: SamplerStudy = Field(SamplerStudy(), description="Which sampler, how many steps, how much guidance.")
    lineup: Lineup = Field(Lineup(), description="Real and synthetic images for people to tell apart.")
    downstream: Downstream = Field(
        Downstream(), description="Does a classifier gain from synthetic images? Off by default."
    )
    counterfactual: Counterfactual = Field(
        Counterfactual(), description="Real scans with another value of a covariate. Off by default."
    )
    inpainting: Inpainting = Field(
        Inpainting(), description="Parts of real scans, or lesions, drawn anew by the model. Off by default."
    )
    reconstruction: Reconstruction = Field(
        Reconstruction(), description="Scans from incomplete measurements, by the model. Off by default."
    )
    normative: Normative = Field(
        Normative(), description="How far real scans are from a reference population. Off by default."
    )
    anomaly: Anomaly = Field(Anomaly(), description="Maps of what is unusual in scans, by the model. Off by default.")
    registration: PairRegistration = Field(
        PairRegistration(), description="Scans of several people brought onto each other. Off by default."
    )
    shape_completion: ShapeCompletion = Field(
        ShapeCompletion(), description="What is missing of shapes, drawn as points. Off by default."
    )
    segmentation_ensemble: SegmentationEnsemble = Field(
        SegmentationEnsemble(), description="A structure of real scans, marked by several draws. Off by default."
    )
    translation: Translation = Field(
        Translation(), description="Another contrast of real scans, drawn from those there are. Off by default."
    )
    harmonisation: Harmonisation = Field(
        Harmonisation(), description="Images of some sites, as another site shows them. Off by default."
    )
    release: Release = Field(Release(), description="The synthetic cohort as a BIDS dataset.")
    compute: Compute = Field(Compute(), description="What the machine is asked for.")
    storage: Storage = Field(Storage(), description="What stays on disk, and where it goes.")
    cost: Cost = Field(Cost(), description="What `plan-cost` reckons with.")

    @model_validator(mode="before")
    @classmethod
    def _values_as_declared(cls, content: Any) -> Any:
        return values_as_declared(with_suffix(content)) if isinstance(content, Mapping) else content

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
    def structures(self) -> tuple[str, ...]:
        """Structures of released label maps, in the order of their numbers from 1; none without label maps."""
        source = self.segmentation or self.pairs
        return tuple(source.structures) if source else ()

    @property
    def student_draws(self) -> bool:
        """Whether the cohort is drawn by a student (section `few_step`)."""
        return is_of_students(self.generate.sampler)

    @property
    def unlike_monai(self) -> str | None:
        """Why the models that are released cannot be run by MONAI alone; None where they can."""
        if self.student_draws:
            return "a student draws by a sampler that MONAI does not have"
        if self.diffusion.zero_terminal_snr and self.diffusion.prediction_type != "flow":
            return "MONAI's schedulers have no diffusion.zero_terminal_snr"
        if self.text.column is not None:
            return "MONAI has no encoder of texts"
        return None

    def drawn_by_teacher(self) -> Self:
        """The study whose images the diffusion model draws itself."""
        return self._drawn_with(Generate().sampler) if self.student_draws else self

    def drawn_by_student(self) -> Self:
        """The study whose images its student draws; itself where there is none, or where it is so."""
        return self if self.student_draws or not self.few_step.method else self._drawn_with(self.few_step.method)

    def _drawn_with(self, sampler: str) -> Self:
        changes = {"sampler": sampler, "num_inference_steps": None}
        return self.model_copy(update={"generate": self.generate.model_copy(update=changes)})


def with_suffix(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """A study's content in which images that are released have the suffix of the scans, if it says no other."""
    source, release = content.get("cohort"), content.get("release", {})
    if not isinstance(source, Mapping) or not isinstance(release, Mapping) or "suffix" in release:
        return content
    suffix = source.get("suffix")
    return {**content, "release": {**release, "suffix": suffix}} if suffix in SUFFIXES else content


def other_contrast(study: Study) -> Iterator[str]:
    """What is wrong with a release that calls its images other than its scans are called.

    No relation: a release that was made so can be read and audited.
    """
    if not isinstance(study.cohort, BidsSource) or study.spatial_dims != 3:
        return
    scans, images = study.cohort.suffix, study.release.suffix
    if scans in SUFFIXES and images != scans:
        yield (
            f"release.suffix: {images}, but scans are {scans} (cohort.suffix), and images show what scans do; leave it "
            "out, or correct cohort.suffix"
        )
    elif scans not in SUFFIXES and "suffix" not in study.release.model_fields_set:
        yield (
            f"release.suffix: is needed, as cohort.suffix is {scans!r}, which no released image can have; name what "
            f"the scans show, one of {', '.join(SUFFIXES)}"
        )


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
    "scan_id subject_id session_id path sha256 content_sha256 split spelling "
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
    told = {f"{name}_{end}" for name in study.covariates for end in ("measured", "segmented")}
    taken = sorted(set(study.covariates) & (RESERVED_COLUMNS | told))
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


def _pairs(study: Study) -> Iterator[str]:
    pairs = study.pairs
    if pairs is None:
        return
    channel = study.preprocess.channels.get(pairs.channel)
    if channel is None:
        known = sorted(study.preprocess.channels) or "none"
        yield f"pairs.channel: preprocess.channels has no {pairs.channel}, but {known}; say there where label maps lie"
    elif channel.kind == "contrast":
        yield f"pairs.channel: preprocess.channels.{pairs.channel} holds a contrast; take one of kind labels or mask"
    elif not channel.required:
        yield f"pairs.channel: preprocess.channels.{pairs.channel} must be required: true; a scan alone is no pair"
    for name in pairs.structures:
        covariate = study.covariates.get(name)
        if covariate is not None and getattr(covariate, "unit", None) != "mL":
            yield f"pairs.structures: {name} is a covariate that is no volume in mL; call one of both something else"
    if study.spatial_dims != 3:
        yield "pairs: label maps are released as volumes and need 3D images; leave the section out"
    most = 2 ** len(study.segmentation_study.channels)
    if any(n % most for n in study.preprocess.shape):
        yield (
            f"segmentation_study.channels: {len(study.segmentation_study.channels)} levels need a preprocess.shape that"
            f" is divisible by {most}, found {list(study.preprocess.shape)}; take fewer levels"
        )
    if study.segmentation is not None:
        yield "segmentation: released label maps are those of `pairs`; leave one of both sections out"
    network = study.diffusion.network
    if "maps" not in DENOISERS.entry(network)["conditions"]:
        yield f"pairs: diffusion.network: {network} cannot be told a label map; take resnet or unet"
    others = {
        "text.column": study.text.column is not None,
        "init_from": study.init_from is not None,
        "few_step.method": study.few_step.method is not None,
        "second_model.subjects": study.second_model.subjects,
        "downstream.generator_seeds": study.downstream.target is not None and study.downstream.generator_seeds > 1,
        "release.models": study.release.models,
    }
    for key in [key for key, value in others.items() if value]:
        yield f"{key}: does not know label maps yet; leave it out, or pairs"


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


def _reference(study: Study) -> Iterator[str]:
    for name, level in study.normative.reference.items():
        if isinstance(study.covariates.get(name), ContinuousCovariate):
            yield f"normative.reference.{name}: is a number; a reference is made of levels of categorical covariates"
            continue
        for problem in _not_a_value(study, name, [level]):
            yield f"normative.reference.{name}: {problem}"


def _matched(study: Study) -> Iterator[str]:
    for name in study.normative.matched:
        if name not in study.covariates:
            yield f"normative.matched: {name} is no covariate; declared are {sorted(study.covariates)}"


def _registration(study: Study) -> Iterator[str]:
    wanted, shape = study.registration, study.preprocess.shape
    part = wanted.reduce * 2 ** len(wanted.channels)
    if wanted.pairs and (len(shape) != 3 or any(n % part for n in shape)):
        yield (
            f"registration.pairs: {wanted.pairs}, but sides of {'x'.join(map(str, shape))} voxels are not those of"
            f" volumes, or no multiples of {part}: registration.reduce is {wanted.reduce}, and"
            f" {len(wanted.channels)} registration.channels halve them so often; change preprocess.shape, or one of"
            " both"
        )
    if wanted.pairs and study.preprocess.channels:
        yield "registration.pairs: scans of one channel are registered; leave preprocess.channels out"


def _hole(study: Study) -> Iterator[str]:
    box, shape = study.inpainting.hole.box, study.preprocess.shape
    if box and len(box) != len(shape):
        yield f"inpainting.hole.box: {len(box)} axes, expected {len(shape)}, as preprocess.shape has"
    elif any(high > n for (_, high), n in zip(box, shape, strict=False)):
        yield f"inpainting.hole.box: {[list(b) for b in box]} reaches beyond preprocess.shape {list(shape)}"
    elif box and all(high - low == n for (low, high), n in zip(box, shape, strict=True)):
        yield "inpainting.hole.box: hides everything; leave some voxels known"
    for section in ("inpainting", "reconstruction", "normative"):
        if getattr(study, section).lesions.masks is not None and study.preprocess.registration is None:
            yield (
                f"{section}.lesions.masks: lie in a template's space, and scans are not registered; set"
                " preprocess.registration"
            )


def _anomaly(study: Study) -> Iterator[str]:
    wanted = study.anomaly
    for name, value in wanted.healthy.items():
        for problem in _not_a_value(study, name, [value]):
            yield f"anomaly.healthy.{name}: {problem}"
    for name in wanted.methods:
        if "one value of anomaly.healthy" in ANOMALY_MAPS.entry(name)["needs"] and len(wanted.healthy) != 1:
            yield (
                f"anomaly.methods: {name} moves scans to a healthy value of one covariate, and anomaly.healthy has"
                f" {len(wanted.healthy)}; name one, or leave the method out"
            )
    if wanted.need("translation.cycle") and not (study.translation.wanted and study.translation.cycle):
        contrasts = [name for name, channel in study.preprocess.channels.items() if channel.kind == "contrast"]
        yield (
            "anomaly.methods: modality_cycles needs scans of two contrasts, and translation between them; the study has"
            f" image and {', '.join(contrasts) or 'no other'}. Declare another one under preprocess.channels, and set"
            " translation: {target: [its name], cycle: true}; or leave the method out"
        )
    if wanted.lesions.masks is not None and study.preprocess.registration is None:
        yield (
            "anomaly.lesions.masks: lie in a template's space, and scans are not registered; set"
            " preprocess.registration"
        )


def _compared_with(study: Study) -> Iterator[str]:
    wanted = study.segmentation_ensemble
    if wanted.pretraining_steps and not wanted.labelled:
        yield (
            "segmentation_ensemble.pretraining_steps: is compared with training from scratch on few labels; name"
            " numbers of subjects in `labelled`"
        )
    if wanted.beside and wanted.patch is None:
        yield f"segmentation_ensemble.beside: {', '.join(wanted.beside)} is compared with patches; set `patch`"


def _drawn_from_images(study: Study) -> Iterator[str]:
    known = ["image", *study.preprocess.channels]
    for section in ("segmentation_ensemble", "translation"):
        shape: tuple[int, ...] = study.preprocess.shape
        wanted = getattr(study, section)
        if not wanted.wanted:
            continue
        lesion = getattr(wanted, "lesion", None)
        for key, names in (
            ("source", wanted.source),
            ("target", wanted.target),
            ("lesion", [lesion] if lesion else []),
        ):
            for name in names:
                if name not in known:
                    yield (
                        f"{section}.{key}: {name} is no channel of the study, which has {', '.join(known)}; declare it"
                        " under preprocess.channels"
                    )
        if getattr(wanted, "cycle", False):
            yield from _cycle(study)
        if getattr(wanted, "unpaired", None) is not None:
            yield from _does_not_fit(shape, f"{section}.unpaired", wanted.unpaired)
        if getattr(wanted, "volume_steps", 0):
            if len(shape) == 2:
                yield f"{section}.volume_steps: needs a 3D preprocess.shape, found {list(shape)}; leave it out"
            shape = shape[:2]
        yield from _does_not_fit(shape, section, wanted)


def _does_not_fit(shape: tuple[int, ...], section: str, wanted: DrawingNetwork) -> Iterator[str]:
    if any(n % wanted.block for n in shape):
        yield f"{section}.block: {wanted.block} does not divide preprocess.shape {list(shape)}; take 1 or 2"
    halvings = 2 ** (len(wanted.channels) - 1) * wanted.block
    smallest = halvings if wanted.network == "unet" else wanted.block
    patch = getattr(wanted, "patch", None)
    if patch and (len(patch) != len(shape) or any(p % smallest or p > n for p, n in zip(patch, shape, strict=False))):
        yield (
            f"{section}.patch: {patch}, expected {len(shape)} multiples of {smallest}, none larger than in"
            f" preprocess.shape {list(shape)}"
        )
    if wanted.network == "unet" and any(n % halvings for n in shape):
        yield (
            f"{section}.channels: {len(wanted.channels)} levels of blocks of {wanted.block} need a preprocess.shape"
            f" of multiples of {halvings}, found {list(shape)}; take fewer"
        )


def _harmonisation(study: Study) -> Iterator[str]:
    wanted = study.harmonisation
    if wanted.covariate is None:
        return
    site = study.covariates.get(wanted.covariate)
    if not isinstance(site, CategoricalCovariate):
        listed = ", ".join(study.covariates)
        said = "is a number, expected a label" if site else f"no such covariate; the study has {listed}"
        yield f"harmonisation.covariate: {wanted.covariate}: {said}"
        return
    for key, levels in (("to", [wanted.to]), ("others", wanted.others)):
        for level in levels:
            if level not in site.levels:
                yield f"harmonisation.{key}: {level!r} is not one of {', '.join(site.levels)}"
    for name in wanted.kept:
        if name not in study.covariates or name == wanted.covariate:
            listed = ", ".join(study.covariates)
            yield f"harmonisation.kept: {name} is no other covariate of the study, which has {listed}"
    kind = study.preprocess.channels.get(wanted.channel)
    if wanted.channel != "image" and (kind is None or kind.kind != "contrast"):
        yield f"harmonisation.channel: {wanted.channel} is no contrast; give image, or one of preprocess.channels"
    yield from _does_not_fit(study.preprocess.shape, "harmonisation.unpaired", wanted.unpaired)


def _cycle(study: Study) -> Iterator[str]:
    wanted = study.translation
    if wanted.source != ["image"]:
        yield f"translation.cycle: goes from the scan and back to it; set source: [image], found {wanted.source}"
    if wanted.lesion is not None:
        yield "translation.lesion: cycle: true learns from healthy scans, which have none; leave one of them out"
    for name in wanted.target:
        channel = study.preprocess.channels.get(name)
        if channel is not None and (channel.kind != "contrast" or not channel.required):
            yield f"translation.cycle: preprocess.channels.{name} must be of kind: contrast, and required: true"


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


def _texts(study: Study) -> Iterator[str]:
    asking = [group.name for group in study.plan if group.texts]
    if study.text.column is None:
        if asking:
            yield (
                f"plan.{asking[0]}.texts: the model learns no texts; set text.column to the column that holds them, or"
                " leave `texts` out"
            )
        return
    if "text" in study.covariates:
        yield "covariates.text: has the name of the column of texts; call it something else and set `column`"
    if "tokens" not in DENOISERS.entry(study.diffusion.network)["conditions"]:
        yield f"text.column: diffusion.network: {study.diffusion.network} cannot attend to texts; take resnet or unet"
    for group in study.plan:
        for name in sorted({name for text in group.texts for name in placeholders(text)} - set(study.covariates)):
            yield f"plan.{group.name}.texts: {{{name}}} is no covariate; declared are {sorted(study.covariates)}"
    others = {
        "few_step.method": study.few_step.method,
        "second_model.subjects": study.second_model.subjects,
        "downstream.retrain": study.downstream.target is not None and study.downstream.retrain,
        "init_from.models: diffusion": study.init_from is not None and "diffusion" in study.init_from.models,
    }
    for key in [key for key, value in others.items() if value]:
        yield f"{key}: trains a model without texts; leave it out, or text.column"


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


def _control_branch(study: Study) -> Iterator[str]:
    wanted, devices = study.diffusion, study.compute.devices
    branch = wanted.network == "conditioned" and wanted.conditioning.maps == "controlnet" and study.pairs is not None
    if branch and devices > 1:  # a process waits for gradients of all weights that it began with
        yield (
            f"compute.devices: {devices} processes cannot train diffusion.conditioning.maps: controlnet, which freezes"
            " weights on the way; set devices: 1, or take maps: concatenation or spade"
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


def _levels_of_student(study: Study) -> Iterator[str]:
    """The levels of a student's teacher are equal steps of the angle arctan(sigma / alpha), each at a timestep of its
    own.
    """
    student, process = study.few_step, study.diffusion
    if student.method is None or process.prediction_type == "flow":
        return
    from meddiff_steps.core.schedules import alphas_cumprod  # which needs numpy: few studies have a student

    table = alphas_cumprod(process)
    least, most = (math.atan(math.sqrt(1.0 / power - 1.0)) / (math.pi / 2) for power in (table[0], table[-1]))

    def fits(levels: int) -> bool:
        return 1.0 - 1.0 / levels < most and 2.0 / levels > least

    if not fits(student.teacher_steps):
        fewer = [student.num_inference_steps * 2**k for k in range(6, 0, -1)]
        found = next((f"take {levels}, or " for levels in fewer if levels < student.teacher_steps and fits(levels)), "")
        yield (
            f"few_step.teacher_steps: some of {student.teacher_steps} levels lie beyond the least or the most noise of"
            f" diffusion.schedule: {process.schedule} with num_train_timesteps: {process.num_train_timesteps}, and are"
            f" one; {found}let the schedule begin with less noise and end with more, as its defaults do"
        )


def _decoder(study: Study) -> Iterator[str]:
    odd = [n for n in study.preprocess.shape if n % 2]
    if study.decoder.network is not None and odd:
        yield f"decoder: draws in blocks of two voxels, but preprocess.shape has {odd}; take even numbers"


# ........................................................................................... given weights


def _given_weights(study: Study) -> Iterator[str]:
    base = study.init_from
    if base is None:
        return
    if len(set(base.models)) != len(base.models):
        yield f"init_from.models: each at most once, found {base.models}"
    files = [name for name in ("autoencoder", "diffusion") if getattr(base, name) is not None]
    missing = [name for name in base.models if name not in files]
    if base.path is None and missing:
        yield f"init_from: no weights are named for {missing}; set path, or the files of autoencoder and diffusion"


def _untrained(study: Study) -> Iterator[str]:
    given = study.init_from.models if study.init_from else []
    drawing = ["decoder"] if study.decoder.network is not None else []
    for name in ("autoencoder", *drawing, "diffusion"):
        if getattr(study, name).optimiser.steps == 0 and name not in given:
            yield (
                f"{name}.optimiser.steps: 0 leaves the network untrained; train it, or give weights: {name} in"
                " init_from.models"
            )
    if "decoder" in given and not drawing:
        yield "init_from.models: decoder is given, but decoder.network is null; leave one of them out"
    if study.autoencoder.trains == "decoder" and "autoencoder" not in given:
        yield "autoencoder.trains: decoder keeps the encoder as it is, which is untrained; give its weights: init_from"
    if study.diffusion.trains == "adapters" and "diffusion" not in given:
        yield (
            "diffusion.trains: adapters change weights that are given; give them (diffusion in init_from.models), or"
            " set trains: all"
        )
    for name in ("autoencoder", "diffusion"):
        if getattr(study, name).towards_base and name not in given:
            yield f"{name}.towards_base: there is no base to pull to; give its weights: {name} in init_from.models"
    if "diffusion" in given:
        kept = study.autoencoder.optimiser.steps == 0 or study.autoencoder.trains == "decoder"
        if "autoencoder" not in given or not kept:
            yield (
                "init_from.models: a given diffusion network knows the latents of its own autoencoder alone; give that,"
                " too, and keep its latents (autoencoder.optimiser.steps: 0, or autoencoder.trains: decoder)"
            )
    if study.init_from and (study.second_model.subjects or (study.downstream.target and study.downstream.retrain)):
        yield (
            "init_from: a second model and further generator seeds (downstream.retrain) are trained from fresh weights;"
            " leave them out"
        )


def _rare(study: Study) -> Iterator[str]:
    rare = study.diffusion.rare
    if rare is None:
        return
    covariate = study.covariates.get(rare.covariate)
    if not isinstance(covariate, CategoricalCovariate):
        known = [name for name, each in study.covariates.items() if isinstance(each, CategoricalCovariate)]
        yield f"diffusion.rare.covariate: {rare.covariate} is no categorical covariate; these are: {known or 'none'}"
        return
    if rare.level not in covariate.levels:
        yield f"diffusion.rare.level: covariates.{rare.covariate} has {covariate.levels}, not {rare.level}; add it last"
    if rare.like is not None and (rare.like not in covariate.levels or rare.like == rare.level):
        others = [level for level in covariate.levels if level != rare.level]
        yield f"diffusion.rare.like: expected one of {others}, found {rare.like}"
    if study.init_from is None or "diffusion" not in study.init_from.models:
        yield (
            "diffusion.rare: a handful of scans teach a network that knows all else; give one (diffusion in"
            " init_from.models)"
        )
    if study.text.column is not None:
        yield "diffusion.rare: is not made for texts, which say by themselves what is rare; leave one of them out"


def _published(study: Study) -> Iterator[str]:
    if study.diffusion.network != "published":
        return
    told = study.diffusion.published
    for place, given in enumerate(told.inputs):
        where = f"diffusion.published.inputs, number {place + 1}"
        if given.covariate is None:
            continue
        covariate = study.covariates.get(given.covariate)
        if covariate is None:
            yield f"{where}: no such covariate {given.covariate}; declared are {sorted(study.covariates)}"
        elif isinstance(covariate, CategoricalCovariate):
            if len(given.levels or ()) != len(covariate.levels):
                yield f"{where}: `levels` must have a number for each of {covariate.levels}, found {given.levels}"
        elif given.range is None:
            yield f"{where}: {given.covariate} is continuous; give `range`, the values that are 0 and 1"
    named = [given.covariate for given in told.inputs if given.covariate is not None]
    if len(set(named)) != len(named):
        yield f"diffusion.published.inputs: each covariate at most once, found {named}"
    if study.few_step.method is not None:
        yield "few_step.method: students are of the networks `resnet` and `unet`; leave it out"
    if told.maisi is not None:
        yield from _maisi(study, told.maisi)


def _maisi(study: Study, told: Maisi) -> Iterator[str]:
    if study.diffusion.published.inputs:
        yield "diffusion.published: MAISI networks are told no covariates; leave `inputs` out"
    voxel = study.preprocess.voxel_mm
    if told.spacing_mm is not None and voxel is not None and told.spacing_mm != voxel:
        yield (
            f"diffusion.published.maisi.spacing_mm: {list(told.spacing_mm)}, but voxels are {list(voxel)} mm"
            " (preprocess.spacing_mm); give the same, axis by axis"
        )
    if told.num_class_embeds and told.class_label == 0:
        yield (
            "diffusion.published.maisi.class_label: 0 is images of unknown modality; give the number of your scans'"
            " modality (in NV-Generate, of configs/modality_mapping.json)"
        )
    if study.generate.guidance == "classifier_free" and study.generate.guidance_scale != 1.0:
        yield (
            f"generate.guidance_scale: {study.generate.guidance_scale:g} moves away from the prediction without"
            " covariates, of which a MAISI network is told none; set 1"
        )


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
    stress = study.downstream.stress
    learnt = study.downstream.groups or [g.name for g in study.plan if g.covariates in ("copula", "table")]
    for name in stress.groups:
        if name not in known:
            yield f"downstream.stress.groups: the plan has no group {name}; it has {sorted(known)}"
        elif name in learnt:
            yield (
                f"downstream.stress.groups: arms learn from the group {name}; test on another one, or name the groups"
                " that they learn from in downstream.groups"
            )
    for name in stress.along:
        if name not in study.covariates or name == study.downstream.target:
            yield (
                f"downstream.stress.along: {name} is no covariate beside the target; there are"
                f" {sorted(set(study.covariates) - {study.downstream.target})}"
            )


RELATIONS: tuple[Callable[[Study], Iterator[str]], ...] = (
    _fetched_cohort,
    _shape_divides,
    _covariate_names,
    _labels,
    _structures,
    _pairs,
    _volumes,
    _counterfactual,
    _reference,
    _matched,
    _hole,
    _anomaly,
    _registration,
    _drawn_from_images,
    _compared_with,
    _harmonisation,
    _group_names,
    _requests,
    _texts,
    _samplers,
    _guide,
    _control_branch,
    _student,
    _levels_of_student,
    _decoder,
    _given_weights,
    _untrained,
    _rare,
    _published,
    _shifted_levels,
    _groups_of_arms,
)
