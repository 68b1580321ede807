"""Step `text_fidelity`: images drawn of held-out texts, with and without these, and judged beside the scans."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.cohort.texts import COLUMN
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import write_json
from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.evaluation.text import KINDS, Images, finding_levels, finding_table, text_figures
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.instruments.image_text import fit_scorer
from meddiff_steps.instruments.predictors import fit_predictors
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.steps import options
from meddiff_steps.synthesis.generate import CohortGenerator

log = logging.getLogger(__name__)

#: Training pairs that instruments learn from at most: the cost of the dual solution grows with their cube.
MOST_PAIRS = 2_000
#: Held-out scans that are drawn again at most.
MOST_SCANS = 500


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    autoencoder: options.Autoencoder,
    diffusion: options.Diffusion,
    out: Annotated[Path, typer.Option(help="evaluation/text.json to write")],
    decoder: options.Decoder = None,
    threads: options.Threads = 1,
) -> None:
    """Measure whether images show what texts say.

    Texts of held-out people are asked for here alone; the images are judged and thrown away.
    """
    study = load_stage(config, "text_fidelity")
    shards = Shards(images)
    table = read_manifest(manifest).set_index("scan_id").loc[shards.image_ids()].reset_index()
    having = table[COLUMN].notna()
    training = np.flatnonzero(having & (table["split"] == "train"))[:MOST_PAIRS]
    held_out = np.flatnonzero(having & table["split"].isin(["val", "calibration", "test"]))[:MOST_SCANS]
    if len(set(table["subject_id"].iloc[held_out])) < 3:
        raise UserError(
            "text: fewer than 3 held-out subjects have a text, so nothing can be measured. Raise splits.test, or add"
            " texts."
        )
    known, asked = table.iloc[training].reset_index(drop=True), table.iloc[held_out].reset_index(drop=True)
    pairs = shards.tensors("image", training)
    subjects = known["subject_id"].tolist()
    scorer = fit_scorer(pairs, known[COLUMN].tolist(), subjects, study.text.min_subjects)
    findings, predictors = study.text.findings, None
    if findings:
        named = finding_table(known[COLUMN].tolist(), findings)
        predictors = fit_predictors([pairs], named, subjects, finding_levels(findings))
    fabric = make_fabric(study.compute, threads)
    model = TrainedModel.load(autoencoder, diffusion, fabric, study.compute, decoder=decoder)
    generator = CohortGenerator(model, study.generate)
    plan = _plan(asked, study.text.draws, study.seed)
    rows = np.repeat(np.arange(len(asked)), study.text.draws)
    kinds = {
        KINDS[0]: Images(shards.tensors("image", held_out), np.arange(len(asked))),
        KINDS[1]: Images(_drawn(generator, plan), rows),
        KINDS[2]: Images(_drawn(generator, plan.assign(**{COLUMN: None})), rows),
    }
    figures = text_figures(kinds, asked, scorer, predictors, findings, study.evaluate.bootstrap, study.seed)
    facts = {
        "held_out": {"scans": len(asked), "subjects": int(asked["subject_id"].nunique()), "draws": study.text.draws},
        "scorer": {"subjects": scorer.subjects, "words": len(scorer.features.places), "penalty": scorer.penalty},
        "splits": ["val", "calibration", "test"],
        "model": model.digests,
    }
    write_json(out, figures | facts)
    log.info("right text above wrong ones: %s", {kind: figures["retrieval"][kind]["value"] for kind in KINDS})


def _plan(scans: pd.DataFrame, draws: int, seed: str) -> pd.DataFrame:
    """Each scan's covariates and text, to be drawn several times."""
    repeated = scans.iloc[np.repeat(np.arange(len(scans)), draws)].reset_index(drop=True)
    root, index = f"{seed}/text_fidelity", np.arange(len(repeated))
    return repeated.assign(
        sample_id=[f"text{i:06d}" for i in index],
        index=index,
        noise_index=index,
        attempt=0,
        cohort_root=root,
        seed_key=[seed_key(root, int(i), 0, "noise") for i in index],
    )


def _drawn(generator: CohortGenerator, plan: pd.DataFrame) -> np.ndarray:
    """The images of a plan, in its order."""
    places = {name: place for place, name in enumerate(plan["sample_id"])}
    made = np.empty((len(plan), *generator.model.image_shape), np.float32)
    for name, image in generator.images(plan, "texts"):
        made[places[name]] = image
    return made
