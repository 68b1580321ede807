"""What each stage may read of a study, and the frozen files that it reads it from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from meddiff_steps import __version__
from meddiff_steps.config.base import TEXT, Keys, marked, replaced
from meddiff_steps.config.downstream import Downstream
from meddiff_steps.config.preprocess import Preprocess
from meddiff_steps.config.release import Card, Release
from meddiff_steps.config.renamed import STAGES_0_1, before_renaming
from meddiff_steps.config.study import ONE_SECTION, Study
from meddiff_steps.core.canonical import canonical_json
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import write_atomic
from meddiff_steps.core.registries import default_steps, is_of_students


def _keys(section: str, model: type[BaseModel], *left_out: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in model.model_fields if name not in left_out)


_UNITS = ("covariates.*.unit",)
#: What a release says of itself.
_DESCRIBED = (*_keys("release", Release, "signing_key", "exports", "models"), *_keys("release.card", Card))
#: How scans become images; with how many of them the study goes on is for `quality` to judge.
_PREPROCESSING = _keys("preprocess", Preprocess, "max_failed_share")
_GRID = ("preprocess.shape", "preprocess.spacing_mm")
#: Over how many jobs the trainings are spread is nothing to the steps around them.
_DESIGN = _keys("downstream", Downstream, "jobs")
#: What is done with a finished release: asking for a copy, for counterfactuals of scans, or for a blind test does not
#: seal it again, nor does what was reckoned before.
_AFTERWARDS = ("release", "storage", "counterfactual", "lineup", "cost")

#: What each stage may read, and therefore what makes it run again when it changes.
#:
#: "privacy": a section, without its texts.  "privacy.level": one key of a section.  "covariates.*.unit": a text, which
#: a stage is given only if it is named.
STAGES: dict[str, tuple[str, ...]] = {
    "simulate": ("seed", "cohort"),
    "cohort": ("seed", "cohort", "covariates", "splits"),
    "preprocess": _PREPROCESSING,
    "scan_pages": ("study", "cohort", *_GRID, "preprocess.registration"),
    "quality": ("preprocess.max_failed_share", "release.skull_stripped"),
    "autoencoder": ("seed", "variants", "autoencoder", "compute"),
    "decoder": ("seed", "variants", "decoder", "compute"),
    "latents": ("seed", "variants", "latents", "compute"),
    "scale": ("covariates", "compute"),
    "diffusion": ("seed", "covariates", "diffusion", "compute"),
    "few_step": (
        *("seed", "few_step", "compute"),
        *(f"generate.{key}" for key in ("guidance", "guidance_scale", "guidance_interval")),
    ),
    "tone": ("seed", "covariates", "generate", "compute"),
    "embedder": ("seed", "privacy.embedder"),
    "calibrate": ("seed", "privacy.level", "privacy.detectors", "privacy.subgroup", "variants.flip", "compute"),
    "plan": ("seed", "covariates", "plan", "generate.shard_size"),
    "generate": ("generate", "compute"),
    "filter": ("generate", "compute", "privacy.detectors", "privacy.subgroup", "privacy.max_attempts"),
    "privacy": ("seed", "covariates", "privacy", "compute"),
    "gate": ("privacy.enforce",),
    "neighbours": ("study", "title", "cohort", "covariates", *_UNITS),
    "second_model": ("seed", "covariates", "second_model"),
    "images": ("study", "release.suffix", "release.shard_size", "plan", *_GRID),
    "describe": (
        *("study", "title", "cohort", "covariates", *_UNITS, "covariates.*.description"),
        *(*_DESCRIBED, *_GRID, "generate", "second_model.subjects"),
    ),
    "segmenter": ("seed", "segmentation", *_GRID, "compute"),
    "evaluate": ("seed", "covariates", *_UNITS, "plan", "evaluate", *_GRID, "preprocess.foreground"),
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
    "downstream_design": ("seed", "covariates", "plan", *_DESIGN),
    "downstream_plan": ("seed", "covariates", *_DESIGN),
    "downstream_data": ("seed", "covariates", *_DESIGN, "compute"),
    "downstream_train": ("seed", "downstream", "compute"),
    "downstream_test": ("seed", "covariates", *_DESIGN),
    "report": ("study", "title", "cohort", "covariates", *_UNITS, "preprocess"),
    "ledger": (
        *(name for name in Study.model_fields if name not in _AFTERWARDS),
        *(*_UNITS, "covariates.*.description", *_DESCRIBED, "release.signing_key"),
    ),
    "export": ("study", "release.name", "release.licence"),
    "export_index": ("study", "release.name", "release.licence"),
    "export_models": ("study", "release.name"),
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
        elif len(keys) == 1:
            part.setdefault(section, {})[keys[0]] = content[section][keys[0]]
    return part if before_renaming(version) else replaced(part, TEXT_KEYS - set(named), "")


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
    filled = {
        section: content[section] | {"num_inference_steps": usual(sampler)}
        for section, sampler in samplers.items()
        if content[section]["num_inference_steps"] is None
    }
    return content | filled


def freeze(study: Study, stage: str | None, folder: Path) -> Path:
    """Write what `stage` may read (the whole study for None) to a content-addressed file and return its path.

    The file never changes after it is written, so a job that starts hours later reads what was frozen at the
    start, whatever happened to the YAML meanwhile.
    """
    everything = resolved(study.model_dump(mode="json"))
    content = everything if stage is None else part_of(everything, STAGES[stage])
    text = canonical_json(content)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = Path(folder) / f"{stage or 'study'}-{digest}.json"
    if not path.exists():
        write_atomic(path, (text + "\n").encode())
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
    missing = [keys[0] for keys in named if keys[0] not in raw or (len(keys) == 2 and keys[1] not in raw[keys[0]])]
    if missing:
        raise UserError(f"{path}: no section {missing}, which stage `{stage}` reads. Freeze it from the study again.")
    values = {}
    for section in dict.fromkeys(keys[0] for keys in named):
        read = Study.model_validate(_PLACEHOLDER | {section: raw[section]}, context=ONE_SECTION)
        values[section] = getattr(read, section)
        if (section,) not in named:
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
