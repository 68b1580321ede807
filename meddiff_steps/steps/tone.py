from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.cohort.manifest import read_manifest, rows_by_split
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import load_stage
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.masks import MaskModel
from meddiff_steps.models.trained import TrainedModel, save_tone
from meddiff_steps.steps import options
from meddiff_steps.synthesis.generate import CohortGenerator
from meddiff_steps.synthesis.grey_levels import fit_tone

log = logging.getLogger(__name__)


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    autoencoder: options.Autoencoder,
    diffusion: options.Diffusion,
    out: Annotated[Path, typer.Option(help="folder diffusion/, to write the grey levels into")],
    decoder: options.Decoder = None,
    masks: options.Masks = None,
    threads: options.Threads = 1,
) -> None:
    """Fit the grey levels of generated images, on images of training covariates beside the training scans."""
    study = load_stage(config, "tone")
    shards = Shards(images)
    table = read_manifest(manifest)
    # Of a second model these are the synthetic images that it learns from, which are named by their sample id.
    ids = shards.image_ids()
    rows = rows_by_split(table, ids)["train"]
    fabric = make_fabric(study.compute, threads)
    model = TrainedModel.load(autoencoder, diffusion, fabric, study.compute, decoder=decoder, toned=False)
    mask_model = MaskModel.where_there_is(masks, fabric, study.compute)
    scans = table.set_index("scan_id").loc[[ids[row] for row in rows]].reset_index()
    tone, facts = fit_tone(CohortGenerator(model, study.generate, mask_model), scans, shards, rows, study.seed)
    save_tone(tone, out, facts | {"model": model.digests})
    log.info("grey levels: %.4f from those of scans, %.4f with the curve", facts["distance"], facts["distance_toned"])
