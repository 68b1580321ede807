"""Step `init_weights`: given weights become networks of our own, to start trainings from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.cohort.base import check_held_out
from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.folders import manifest_of_base
from meddiff_steps.models.pretrained.convert import Sections, convert
from meddiff_steps.steps import options

log = logging.getLogger(__name__)


def run(
    config: options.Config,
    manifest: options.Manifest,
    out: Annotated[Path, typer.Option(help="folder to write: a folder per network, with weights and card")],
    given: Annotated[
        list[Path] | None,
        typer.Option(help="file that is read; repeat for all. For the record alone: init_from says where they are."),
    ] = None,
) -> None:
    """Convert the weights that init_from names to safetensors, checked against the study's networks.

    Of a pickle nothing but tensors is read.  Where the given weights lie in a study's results, their training subjects
    must not be held out here.
    """
    study = load_stage(config, "init_weights")
    if study.init_from is None:
        raise UserError(f"{config}: this study has no section init_from, so there are no weights to convert.")
    untold = set(study.covariates) - {each.covariate for each in study.diffusion.published.inputs}
    if study.diffusion.network == "published" and untold:
        log.warning("the diffusion network is not told %s: images will not follow it", ", ".join(sorted(untold)))
    learnt = manifest_of_base(study.init_from.path)
    if learnt is not None:
        check_held_out(read_manifest(manifest), read_manifest(learnt), learnt)
    else:
        log.warning(
            "nothing here says whom the given weights learnt from: calibration and test subjects among them shift"
            " privacy thresholds, floors and gates towards PASS (docs/pretrained.md)"
        )
    sections = Sections.of_study(study)
    for model, digest in convert(study.init_from, sections, out).items():
        log.info("%s: weights %s", out / model, digest[:16])
