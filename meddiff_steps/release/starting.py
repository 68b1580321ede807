"""A study that starts from trained models, for its user to change, and a few images of them to look at first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import CategoricalCovariate, Compute, Generate
from meddiff_steps.config.base import per_axis
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json, write_atomic
from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.imaging.encoding import Grid, encode
from meddiff_steps.models.pretrained.study import sections_of
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.release.models import CONFIG
from meddiff_steps.release.preview import picture
from meddiff_steps.release.shipping import METADATA
from meddiff_steps.synthesis.generate import CohortGenerator

#: Further training of the diffusion network: where to start from, for some dozens of scans; not tuned.
FURTHER = {"trains": "all", "optimiser": {"steps": 500, "batch_size": 4, "learning_rate": 1e-3}}
#: Root of the noise of example subjects: the same ones of every copy of the models.
EXAMPLES = "examples"
HEAD = """\
# A study that starts from the models in {folder}/ (their README.md says what they are, LICENSE under which terms).
# Change the lines marked with <--, then: meddiff check {file}; meddiff run {file} --cores 4. Keys: config/keys.md.
study: {name}
title: Brains like those of my cohort     # <--
seed: {name}

cohort:
  # <-- Your own, instead of the stand-in below:
  # source: bids
  # root: /data/mycohort
  # suffix: T1w
  # A stand-in, so that this runs as it is: simulated brains
  source: simulated
  subjects: 200
  shape: [{cells}]
  spacing_mm: {spacing}

splits: {{train: 0.6, val: 0.05, calibration: 0.15, test: 0.2}}

# Covariates below are those that the models were told: your participants.tsv needs a column for each (`column:` names
# it, where it is called otherwise). Where it lacks one, delete the covariate here and leave diffusion out of
# `init_from.models`: its network is then trained from nothing, so give it thousands of steps.                    <--
"""
TAIL = """
plan:                               # <-- who is to be made
  - {{name: syn, subjects: 100}}

# <-- With scans of real people write `enforce: stop`: nothing is released where a privacy test fails. Few subjects
# calibrate the filter here; a study of 400 and more keeps the level, too, at its default (docs/privacy.md).
privacy: {{level: 0.2, enforce: report}}

release:
  name: Synthetic brains that started from {base}     # <--
  authors: [Jane Doe]               # <--
  licence: {licence}     # <-- what the terms of your cohort and of these models allow
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
        The release does not say how its images were preprocessed.
    """
    made = _study_of(models)
    said = yaml.safe_load(sections_of(models))
    licence = _metadata(models).get("license", "")
    said["init_from"] |= {"path": str(place), "source": place.name, "licence": licence}
    said["covariates"] = {
        name: {key: value for key, value in each.items() if key != "column"}
        for name, each in made["covariates"].items()
    }
    said["preprocess"] |= {key: made["preprocess"][key] for key in ("spacing_mm", "registration", "center")}
    said["variants"] = made["variants"]
    said["diffusion"] |= FURTHER
    said["generate"] = {key: made["generate"][key] for key in ("sampler", "guidance_scale")}
    spacing = per_axis(made["preprocess"]["spacing_mm"])[0]
    cells = ", ".join(str(n + 4) for n in said["preprocess"]["shape"])
    head = HEAD.format(folder=place, file=file, name=name, cells=cells, spacing=f"{spacing:g}")
    middle = yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
    return head + middle + TAIL.format(base=place.name, licence=(licence or "CC0").partition(";")[0])


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
