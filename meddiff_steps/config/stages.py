"""What each stage may read of a study, and the frozen files that it reads it from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rfc8785
from pydantic import BaseModel

from meddiff_steps import __version__
from meddiff_steps.config.base import TEXT, Keys, marked, replaced
from meddiff_steps.config.downstream import Downstream
from meddiff_steps.config.init_from import ARCHITECTURE
from meddiff_steps.config.preprocess import Preprocess
from meddiff_steps.config.registration import PairRegistration
from meddiff_steps.config.release import Card, Release
from meddiff_steps.config.renamed import STAGES_0_1, before_renaming
from meddiff_steps.config.study import ONE_SECTION, Study
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import write_atomic
from meddiff_steps.core.registries import default_steps, is_of_students


def _keys(section: str, model: type[BaseModel], *left_out: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in model.model_fields if name not in left_out)


def _named(section: str, *keys: str) -> tuple[str, ...]:
    return tuple(f"{section}.{key}" for key in keys)


def _trained(section: str) -> tuple[str, ...]:
    """What the training of an application's networks reads of its section."""
    network = ("block", "network", "channels", "num_res_blocks", "levels", "patch", "coordinates")
    return _named(section, "source", "target", *network, "optimiser")


_UNITS = ("covariates.*.unit",)
#: What pages call covariates.
_NAMED = (*_UNITS, "covariates.*.description")
#: What a release says of itself.
_DESCRIBED = (
    *_keys("release", Release, "signing_key", "exports", "models", "models_licence", "membership_limit"),
    *_keys("release.card", Card),
)
#: What says which networks a study has, not how they are trained.
_ARCHITECTURE = tuple(f"{section}.{key}" for section, keys in ARCHITECTURE.items() for key in keys)
#: What only the user can say of the weights that were given.
_GIVEN = ("init_from.source", "init_from.licence")
#: How scans become images; with how many of them the study goes on is for `quality` to judge.
_PREPROCESSING = _keys("preprocess", Preprocess, "max_failed_share")
_GRID = ("preprocess.shape", "preprocess.spacing_mm")
#: Over how many jobs the trainings are spread is nothing to the steps around them, and neither is what is drawn of test
#: scans afterwards.
_DESIGN = _keys("downstream", Downstream, "jobs", "neighbours")
#: What is done with a finished release: asking for a copy, for counterfactuals of scans, or for a blind test does not
#: seal it again, nor does what was reckoned before.
_AFTERWARDS = (
    *("release", "storage", "cost", "lineup", "segmentation_study"),
    *("counterfactual", "inpainting", "reconstruction", "normative", "anomaly"),
    *("registration", "shape_completion", "segmentation_ensemble", "translation", "harmonisation"),
)

#: What is told of scans that a model completes.
_RESTORED = ("compute", "evaluate.bootstrap", *_GRID, "release.suffix", "release.skull_stripped")

#: What each stage may read, and therefore what makes it run again when it changes.
#:
#: "privacy": a section, without its texts.  "privacy.level": one key of a section.  "covariates.*.unit": a text, which
#: a stage is given only if it is named.
STAGES: dict[str, tuple[str, ...]] = {
    "simulate": ("seed", "cohort"),
    "cohort": ("seed", "cohort", "covariates", "text.column", "splits"),
    "text": ("seed", *(f"text.{key}" for key in ("column", "encoder", "max_tokens", "width", "min_subjects"))),
    "preprocess": _PREPROCESSING,
    "scan_pages": ("study", "cohort", *_GRID, "preprocess.registration"),
    "quality": ("preprocess.max_failed_share", "release.skull_stripped"),
    "init_weights": ("init_from", "covariates", *_ARCHITECTURE, "diffusion.rare", "preprocess.shape"),
    "masks": ("pairs",),
    "autoencoder": ("seed", "variants", "autoencoder", "compute"),
    "decoder": ("seed", "variants", "decoder", "compute"),
    "latents": ("seed", "variants", "latents", "compute"),
    "scale": ("covariates", "compute"),
    "diffusion": ("seed", "covariates", "text.dropout", "text.token_dropout", "diffusion", "compute"),
    "few_step": (
        *("seed", "few_step", "compute"),
        *(f"generate.{key}" for key in ("guidance", "guidance_scale", "guidance_interval")),
    ),
    "tone": ("seed", "covariates", "generate", "compute"),
    "embedder": ("seed", "privacy.embedder", *_GRID),
    "calibrate": ("seed", "privacy.level", "privacy.detectors", "privacy.subgroup", "variants.flip", *_GRID, "compute"),
    "plan": (
        *("seed", "covariates", "plan", "generate.shard_size"),
        *(f"text.{key}" for key in ("column", "encoder", "min_subjects", "shared_words")),
    ),
    "generate": ("generate", "compute"),
    "filter": ("generate", "compute", "privacy.detectors", "privacy.subgroup", "privacy.max_attempts"),
    "privacy": ("seed", "covariates", "privacy", "diffusion.rare", "compute"),
    "gate": ("privacy.enforce",),
    "neighbours": ("study", "title", "cohort", "covariates", *_NAMED),
    "second_model": ("seed", "covariates", "second_model"),
    "images": ("study", "covariates", "pairs", "release.suffix", "release.shard_size", "plan", *_GRID),
    "describe": (
        *("study", "title", "seed", "cohort", "covariates", *_UNITS, "covariates.*.description"),
        *("segmentation", "pairs", *_DESCRIBED, *_GRID, "generate", "second_model.subjects", *_GIVEN),
    ),
    "predictors": ("covariates",),
    "segmenter": ("seed", "segmentation", "variants.flip", *_GRID, "compute"),
    "evaluate": ("seed", "covariates", *_UNITS, "plan", "evaluate", *_GRID, "preprocess.foreground"),
    "text_fidelity": (
        *("seed", "generate", "compute", "evaluate.bootstrap"),
        *(f"text.{key}" for key in ("min_subjects", "findings", "draws")),
    ),
    "sampler_study": (
        *("seed", "covariates", *_UNITS, "plan", "generate", "sampler_study", "compute"),
        *(f"evaluate.{key}" for key in ("bootstrap", "realism_bootstrap", "permutations")),
        *(f"evaluate.{key}" for key in ("neighbours", "metrics", "spaces")),
    ),
    "lineup": ("study", "title", "seed", "cohort", "covariates", "plan", "lineup"),
    "showcase": ("seed", "covariates", *_UNITS, "generate", "evaluate.sweep_steps", "compute"),
    "counterfactual": (
        *("seed", "covariates", *_UNITS, "counterfactual", "compute", "evaluate.bootstrap"),
        *("release.suffix", "release.skull_stripped"),
    ),
    "inpainting": (*("seed", "covariates", *_UNITS, "inpainting", "preprocess.colour"), *_RESTORED),
    "normative": (*("seed", "covariates", *_UNITS, "normative"), *_RESTORED),
    "reconstruction": (*("seed", "covariates", "reconstruction"), *_RESTORED),
    "anomaly": ("seed", "covariates", "anomaly", *_RESTORED),
    "registration_train": (
        *("seed", "compute"),
        *_keys("registration", PairRegistration, "pairs", "labels", "structures", "shares", "oracle_mm"),
    ),
    "registration": ("seed", "registration", *_RESTORED),
    "shape_completion_train": (
        *("seed", "compute"),
        *(f"shape_completion.{key}" for key in ("test_every", "known", "drawn", "channels", "blocks", "optimiser")),
    ),
    "shape_completion": ("seed", "shape_completion", "compute", "evaluate.bootstrap"),
    "segmentation_model": ("seed", "variants", *_trained("segmentation_ensemble"), "compute"),
    "segmentation_few_labels": (
        *("seed", "variants", *_trained("segmentation_ensemble"), "compute"),
        "segmentation_ensemble.pretraining_steps",
    ),
    "segmentation": (
        *("seed", "segmentation_ensemble", "compute", "evaluate.bootstrap", *_GRID),
        *("preprocess.depth", "release.suffix"),
    ),
    "translation_model": (
        *("seed", "variants", *_trained("translation"), "translation.missing", "compute"),
        *("translation.lesion", "translation.cycle", "anomaly.healthy", "translation.volume_steps"),
    ),
    "translation_unpaired": ("seed", "variants", *_named("translation", "source", "target", "unpaired"), "compute"),
    "translation": (*("seed", "translation"), "compute", "evaluate.bootstrap", "release.suffix"),
    "harmonisation_model": (
        *("seed", "variants", *_named("harmonisation", "covariate", "to", "others", "channel", "unpaired")),
        "compute",
    ),
    "harmonisation": (
        *("seed", "covariates", *_UNITS, "harmonisation", "compute"),
        *("evaluate.bootstrap", "release.suffix"),
    ),
    "downstream_design": ("seed", "covariates", "plan", "variants.flip", *_DESIGN),
    "downstream_plan": ("seed", "covariates", *_DESIGN),
    "downstream_data": ("seed", "covariates", *_DESIGN, "compute"),
    "downstream_train": ("seed", "variants.flip", *_DESIGN, "downstream.jobs", *_GRID, "compute"),
    "downstream_test": ("seed", "covariates", "variants.flip", *_DESIGN),
    "downstream_neighbours": ("seed", "covariates", *_DESIGN, "downstream.neighbours", "compute"),
    "segmentation_study": ("seed", "segmentation_study", "pairs", *_GRID, "compute"),
    "report": ("study", "title", "cohort", "covariates", "pairs", *_NAMED, "preprocess", *_GIVEN),
    "ledger": (
        *(name for name in Study.model_fields if name not in _AFTERWARDS),
        *(*_UNITS, "covariates.*.description", *_DESCRIBED, "release.signing_key", *_GIVEN),
    ),
    "export": ("study", "release.name", "release.licence"),
    "export_index": ("study", "release.name", "release.licence"),
    "export_models": (
        *("study", "release.name", "release.authors", "release.models_licence", "release.membership_limit"),
        *(
            "privacy.enforce",
            "preprocess.spacing_mm",
            "generate",
            "diffusion.prediction_type",
            "diffusion.zero_terminal_snr",
            "text.column",
            *_GIVEN,
        ),
    ),
}


def stages_of(version: str) -> Mapping[str, tuple[str, ...]]:
    """What the steps of a version of this package read, by their names of then: to check records of old runs."""
    if before_renaming(version):
        return STAGES_0_1
    return STAGES


#: Texts within sections, which only stages that name them are given.
TEXT_KEYS = frozenset(keys for keys in marked(Study, TEXT) if len(keys) > 1)


def part_of(content: Mapping[str, Any], sections: Sequence[str], version: str = __version__) -> dict[str, Any]:
    """What a stage may read of a study's content.

    Parameters
    ----------
    content
        A study as JSON, with the names of keys that `version` had.
    sections
        Entries of STAGES.  Texts that none of them names are "".
    version
        The version whose stage it is: until 0.1, stages were given all texts of their sections.

    Raises
    ------
    KeyError
        The content lacks a section or key.
    """
    part: dict[str, Any] = {}
    named = [tuple(entry.split(".")) for entry in sections]
    for section, *keys in named:
        if not keys:
            part[section] = content[section]
        elif len(keys) == 1 and content[section] is None:  # an optional section that the study leaves out
            part[section] = None
        elif len(keys) == 1:
            part.setdefault(section, {})[keys[0]] = content[section][keys[0]]
    return part if before_renaming(version) else replaced(part, TEXT_KEYS - set(named), "")


#: Sections whose steps are gone several times, and fewer of them.
_SHARES = {"inpainting": 3}


def resolved(content: dict[str, Any]) -> dict[str, Any]:
    """A study's content with what it leaves to the program: numbers of steps.

    A new default thus reruns the studies that left it open, and a release says how its images were really made.
    """
    diffusion = content["diffusion"]

    def usual(sampler: str) -> int:
        if is_of_students(sampler):
            return int(content["few_step"]["num_inference_steps"])
        return default_steps(sampler, diffusion["num_train_timesteps"])

    inverted = "flow" if diffusion["prediction_type"] == "flow" else "ddim"
    samplers = {"generate": content["generate"]["sampler"], "counterfactual": inverted}
    samplers |= {"inpainting": inverted, "reconstruction": inverted, "normative": inverted}
    filled = {
        section: content[section] | {"num_inference_steps": usual(sampler) // _SHARES.get(section, 1)}
        for section, sampler in samplers.items()
        if section in content and content[section]["num_inference_steps"] is None
    }
    return content | filled


def freeze(study: Study, stage: str | None, folder: Path) -> Path:
    """Write what `stage` may read (the whole study for None) to a content-addressed file and return its path.

    The file never changes after it is written, so a job that starts hours later reads what was frozen at the
    start, whatever happened to the YAML meanwhile.
    """
    everything = resolved(study.model_dump(mode="json"))
    content = everything if stage is None else part_of(everything, STAGES[stage])
    text = rfc8785.dumps(content)
    digest = hashlib.sha256(text).hexdigest()[:16]
    path = Path(folder) / f"{stage or 'study'}-{digest}.json"
    if not path.exists():
        write_atomic(path, text + b"\n")
    return path


_PLACEHOLDER: dict[str, Any] = {
    "study": "placeholder",
    "cohort": {"source": "simulated"},
    "covariates": {"x": {"unit": "", "range": [0, 1]}},
    "plan": [{"name": "x", "subjects": 1}],
}


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
    named = [tuple(entry.split(".")) for entry in STAGES[stage]]
    missing = [
        keys[0]
        for keys in named
        if keys[0] not in raw or (len(keys) == 2 and raw[keys[0]] is not None and keys[1] not in raw[keys[0]])
    ]
    if missing:
        raise UserError(f"{path}: no section {missing}, which stage `{stage}` reads. Freeze it from the study again.")
    values = {}
    for section in dict.fromkeys(keys[0] for keys in named):
        read = Study.model_validate(_PLACEHOLDER | {section: raw[section]}, context=ONE_SECTION)
        values[section] = getattr(read, section)
        if (section,) not in named and values[section] is not None:
            _keep_only(values[section], {keys[1] for keys in named if keys[0] == section})
        _hide_texts(values[section], (section,), set(named))
    view = Study.model_construct(**values)
    _keep_only(view, set(values))
    return view


def _keep_only(section: BaseModel, names: set[str]) -> None:
    for name in set(type(section).model_fields) - names:
        section.__dict__.pop(name, None)


def _hide_texts(value: Any, where: Keys, named: set[Keys]) -> None:
    """Take out the texts below a section that are not among the named ones."""
    if isinstance(value, dict):
        for item in value.values():
            _hide_texts(item, (*where, "*"), named)
    elif isinstance(value, list):
        for item in value:
            _hide_texts(item, where, named)
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            keys = (*where, name)
            if keys in TEXT_KEYS and keys not in named:
                value.__dict__.pop(name, None)
            else:
                _hide_texts(value.__dict__.get(name), keys, named)
