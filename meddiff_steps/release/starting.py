"""A study that starts from trained models, for its user to change, and a few images of them to look at first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import CategoricalCovariate, Compute, Generate, Preprocess
from meddiff_steps.config.base import per_axis
from meddiff_steps.config.publishing import BLANK
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json, write_atomic
from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.core.registries import is_of_students
from meddiff_steps.imaging.encoding import Grid, encode
from meddiff_steps.models.pretrained.study import sections_of
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.release.models import CONFIG, NOT_STATED
from meddiff_steps.release.preview import picture
from meddiff_steps.release.shipping import METADATA
from meddiff_steps.synthesis.generate import CohortGenerator

#: Further training of the diffusion network: where to start from, for some dozens of scans; not tuned.
FURTHER = {"trains": "all", "optimiser": {"steps": 500, "batch_size": 4, "learning_rate": 1e-3}}
#: Root of the noise of example subjects: the same ones of every copy of the models.
EXAMPLES = "examples"
#: Of `preprocess`, what is for each study to say; no model that is released learnt from `channels`.
NOT_TAKEN = frozenset({"shape", "exclude", "shards", "max_failed_share", "channels"})
#: What simulated brains do not have, so that they cannot stand in for scans.
NOT_SIMULATED = frozenset({"foreground", "window", "colour", "depth", "brain_mask"})
#: What a path becomes that only the user can give.
TO_FILL_IN = {"brain_mask": "PATH/{subject_id}_mask.nii.gz", "template": "PATH/template.nii.gz"}
HEAD = """\
# A study that starts from the models in {folder}/ (their README.md says what they are, LICENSE under which terms).
# Change the lines marked with <--, then: meddiff check {file}; meddiff run {file} --cores 4. Keys: config/keys.md.
study: {name}
title: Brains like those of my cohort     # <--
seed: {name}

cohort:
{cohort}
splits: {{train: 0.6, val: 0.05, calibration: 0.15, test: 0.2}}

# Covariates below are those that the models were told: your participants.tsv needs a column for each (`column:` names
# it, where it is called otherwise). Where it lacks one, delete the covariate here and leave diffusion out of
# `init_from.models`: its network is then trained from nothing, so give it thousands of steps.                    <--
"""
STAND_IN = """\
  # <-- Your own, instead of the stand-in below:
  # source: bids
  # root: /data/mycohort
  # suffix: T1w
  # A stand-in, so that this runs as it is: simulated brains
  source: simulated
  subjects: 200
  shape: [{cells}]
  spacing_mm: {spacing:g}
"""
VOLUMES = """\
  # <-- Your own; simulated brains are not what these models know
  source: bids
  root: /data/mycohort
  suffix: T1w     # <-- as your images are named
"""
PICTURES = """\
  # <-- Your own: a table with a row per image (path, subject_id, covariates)
  source: table
  table: /data/mycohort/images.csv
"""
TAIL = """
plan:                               # <-- who is to be made
  - {{name: syn, subjects: 100}}

# <-- With scans of real people write `enforce: stop`: nothing is released where a privacy test fails. Few subjects
# calibrate the filter here; a study of 400 and more keeps the level, too, at its default (docs/privacy.md).
privacy: {{level: 0.2, enforce: report}}

release:
  name: Synthetic brains that started from {base}     # <--
  authors: []                       # <-- for example [Jane Doe]
  licence: {licence}     # <-- {terms}
"""


def study_text(models: Path, place: Path, file: str, name: str) -> str:
    """The study as YAML.

    Parameters
    ----------
    models
        Folder of a model release.
    place
        Where the study is to find them.
    file, name
        Of the study.

    Raises
    ------
    UserError
        The release does not say how its images were preprocessed, or no training goes on from its models.
    """
    made = _study_of(models)
    _refuse(models, made)
    said = yaml.safe_load(sections_of(models))
    licence = " ".join(_metadata(models).get("license", "").split())
    licence = "" if licence == NOT_STATED else licence
    said["init_from"] |= {"path": str(place), "source": place.name, "licence": licence}
    said["covariates"] = {
        name: {key: value for key, value in each.items() if key != "column"}
        for name, each in made["covariates"].items()
    }
    said["preprocess"] |= _preprocess(made["preprocess"])
    said["variants"] = made["variants"]
    said["diffusion"] |= FURTHER
    said["generate"] = {key: made["generate"][key] for key in ("sampler", "guidance_scale")}
    head = HEAD.format(folder=place, file=file, name=name, cohort=_cohort(said["preprocess"]))
    middle = yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
    if "PATH/" in middle:
        middle = middle.replace(
            "\npreprocess:", "\n# <-- PATH: where yours lie; these models learnt with such.\npreprocess:"
        )
    terms = "what the terms of your cohort and of these models allow"
    if not licence:
        terms = f"NOT STATED by these models: ask who made them, and write {terms}"
    written = yaml.safe_dump(licence or "to be decided", allow_unicode=True, width=100_000).splitlines()[0]
    return head + middle + TAIL.format(base=place.name, licence=written, terms=terms)


def _refuse(models: Path, made: Mapping[str, Any]) -> None:
    """Models that no training goes on from."""
    sampler, text = made["generate"]["sampler"], made.get("text") or {}
    remedy = "or write a study by hand (meddiff init), with init_from.models: [autoencoder]"
    if is_of_students(sampler):
        raise UserError(
            f"{models / CONFIG}: generate.sampler is {sampler}, so its diffusion network is a student of few steps,"
            " whose training cannot be continued. Give models whose diffusion network draws itself (a study without"
            f" few_step), {remedy}."
        )
    if text.get("column") is not None:
        raise UserError(
            f"{models / CONFIG}: text.column is {text['column']}, so its diffusion network is told texts, and no"
            f" training goes on from that. Give models that covariates alone ask, {remedy}."
        )


def _preprocess(made: Mapping[str, Any]) -> dict[str, Any]:
    """How the images were made that models know, where it is not the default; paths are to be filled in."""
    usual = Preprocess().model_dump(mode="json")
    differs = [key for key in usual if key not in NOT_TAKEN and key in made and made[key] != usual[key]]

    def filled(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {below: filled(below, one) for below, one in value.items()}
        return TO_FILL_IN[key] if value == BLANK else value

    return {"spacing_mm": made["spacing_mm"]} | {key: filled(key, made[key]) for key in differs}


def _cohort(preprocess: Mapping[str, Any]) -> str:
    """Lines that say where scans come from: simulated brains, where these can stand in for them."""
    if preprocess["spacing_mm"] is None:
        return PICTURES
    if NOT_SIMULATED & preprocess.keys() or "PATH/" in str(preprocess):
        return VOLUMES
    sizes = per_axis(preprocess["spacing_mm"])
    finest = min(sizes)
    cells = [round(n * size / finest) + 4 for n, size in zip(preprocess["shape"], sizes, strict=True)]
    return STAND_IN.format(cells=", ".join(map(str, cells)), spacing=finest)


def examples(models: Path, count: int, out: Path) -> Path:
    """Draw subjects, ages and the like spread about those that the models learnt from; the picture of them.

    Writes `sub-NUMBER_T1w.nii.gz` (or .png), `participants.tsv` with what was asked for, and `preview.png`.

    Parameters
    ----------
    models
        Folder of a model release.
    count
        Of subjects; subject i is the same whatever the count.
    out
        Folder.
    """
    made = _study_of(models)
    model = TrainedModel.of_study(
        models, make_fabric(Compute(device="cpu", precision="32-true"), torch.get_num_threads())
    )
    requests = spread(model.encoding, count)
    settings = Generate.model_validate(made["generate"] | {"batch_size": 1})
    root, suffix = EXAMPLES, made["release"]["suffix"]
    planned = requests.assign(
        sample_id=[f"sub-{i + 1:05d}" for i in range(count)],
        index=range(count),
        noise_index=range(count),
        cohort_root=root,
        attempt=0,
        seed_key=[seed_key(root, i, 0, "noise") for i in range(count)],
    )
    spacing = made["preprocess"]["spacing_mm"] if model.spatial_dims == 3 else None
    grid, names = Grid(model.image_shape[1:], spacing), []
    for sample_id, image in CohortGenerator(model, settings).images(planned, "examples"):
        names.append(f"{sample_id}_{suffix}.{'nii.gz' if model.spatial_dims == 3 else 'png'}")
        write_atomic(out / names[-1], encode(image[0], grid, sample_id, root)[0])
    table = requests.assign(participant_id=planned["sample_id"]).set_index("participant_id")
    write_atomic(out / "participants.tsv", table.to_csv(sep="\t", na_rep="n/a").encode())
    write_atomic(out / "preview.png", picture(out, names, grid, root))
    return out / "preview.png"


def spread(encoding: CovariateEncoding, count: int) -> pd.DataFrame:
    """Covariates of example subjects, (count, covariates): numbers within 1.2 deviations of those that were learnt
    from, levels in turn.
    """
    found: dict[str, Any] = {}
    for place, (name, covariate) in enumerate(encoding.covariates.items()):
        turn = np.arange(count)
        if isinstance(covariate, CategoricalCovariate):
            levels = encoding.levels[name]
            found[name] = [levels[i % len(levels)] for i in turn]
            continue
        # The golden ratio: any number of subjects is spread evenly, and no two covariates alike.
        share = ((turn + 0.5) * 0.6180339887 * (place + 1)) % 1.0
        values = encoding.means[name] + encoding.stds[name] * 2.4 * (share - 0.5)
        found[name] = np.round(np.clip(values, *covariate.range), 1)
    return pd.DataFrame(found)


def _study_of(models: Path) -> dict[str, Any]:
    """The study that made models, as they were packed with it."""
    if not (models / CONFIG).is_file():
        raise UserError(f"{models / CONFIG}: not there, and says how images are preprocessed. Give a model release.")
    made: dict[str, Any] = read_json(models / CONFIG)
    return made


def _metadata(models: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(models / METADATA) if (models / METADATA).is_file() else {}
    return found
