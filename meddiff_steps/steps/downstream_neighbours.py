"""Step `downstream_neighbours`: the classifiers of the downstream study on test scans and their neighbours, averaged.

The test split was opened before: the scans are those of `augmentation/predictions.parquet`, and nothing is chosen.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer

from meddiff_steps import config as configuration
from meddiff_steps.applications.neighbours import neighbours
from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import load_stage
from meddiff_steps.core.files import read_json, write_json
from meddiff_steps.downstream.classifier import Reader
from meddiff_steps.downstream.design import levels_of
from meddiff_steps.downstream.images import reduce
from meddiff_steps.downstream.results import with_neighbours
from meddiff_steps.downstream.scoring import load_classifiers, score
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.steps import options

log = logging.getLogger(__name__)


def run(
    config: options.Config,
    weights: Annotated[list[Path], typer.Option(help="weights of one job; repeat for all of them")],
    reduced: Annotated[Path, typer.Option(help="augmentation/images.arrow, which classifiers learnt from")],
    predictions: Annotated[Path, typer.Option(help="augmentation/predictions.parquet")],
    opened: Annotated[Path, typer.Option(help="augmentation/test-opened.json")],
    manifest: options.Manifest,
    images: options.Images,
    autoencoder: options.Autoencoder,
    diffusion: options.Diffusion,
    out: Annotated[Path, typer.Option(help="figures to write (JSON)")],
    threads: options.Threads = 1,
) -> None:
    """Draw neighbours of every test scan, average what classifiers say of them and of the scan, and say what it
    gains.
    """
    study = load_stage(config, "downstream_neighbours")
    downstream, levels = study.downstream, levels_of(study.downstream, study.covariates)
    torch.set_num_threads(threads)
    real = Shards(images)
    ids = real.column("scan_id")
    scans = read_manifest(manifest, study.covariates).merge(
        pd.DataFrame({"scan_id": ids, "row": range(len(ids))}), on="scan_id"
    )
    alone = pd.read_parquet(predictions)
    alone = alone[alone["set"] == "test"]
    facts = alone.drop_duplicates("image_id")[["image_id", "subject_id", "level", "subgroup"]].assign(set="neighbours")
    scans = scans.set_index("scan_id").loc[facts["image_id"]].reset_index()
    classifiers = load_classifiers(weights, downstream.classifier, Shards([reduced]).shape("image"), len(levels))
    model = TrainedModel.load(autoencoder, diffusion, make_fabric(study.compute, threads), study.compute, toned=False)
    nearby = score(
        classifiers,
        [arm for arm in downstream.arms if arm.test == "real"],
        downstream,
        facts,
        scans["row"].to_numpy(dtype=int),
        _reader(study, real, scans, model),
        levels,
        1 + downstream.neighbours.count,
    )
    both = pd.concat([alone, nearby], ignore_index=True)
    found = {
        **downstream.neighbours.model_dump(mode="json"),
        "opened": read_json(opened)["frozen_sha256"],
        "arms": with_neighbours(both, downstream, levels, study.seed),
    }
    write_json(out, found)
    log.info("%s: %d scans with %d neighbours each", out, len(scans), downstream.neighbours.count)


def _reader(study: configuration.Study, shards: Shards, scans: pd.DataFrame, model: TrainedModel) -> Reader:
    """Reads scans by their rows, each followed by its neighbours, reduced."""
    settings, side = study.downstream.neighbours, study.downstream.classifier.longest_side
    scan_ids = scans.set_index("row")["scan_id"]
    # Classifiers see images alone.  What neighbours were told (the target, its traces in other covariates, a report)
    # they would show.
    nothing = pd.DataFrame([dict.fromkeys(study.covariates)])

    def read(chosen: np.ndarray) -> np.ndarray:
        views = []
        for row in chosen:
            image, name = shards.tensors("image", np.array([row])), scan_ids[row]
            drawn = neighbours(
                model,
                image[0],
                nothing,
                f"{study.seed}/neighbours/{name}",
                samples=settings.count,
                depth=settings.depth,
                num_inference_steps=settings.num_inference_steps,
            )
            views += [reduce(image, side), reduce(drawn, side)]
        return np.concatenate(views)

    return read
