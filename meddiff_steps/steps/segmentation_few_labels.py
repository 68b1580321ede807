"""Step `segmentation_few_labels`: a network that marks a structure, learnt from the labels of few subjects."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from meddiff_steps.cohort.manifest import read_manifest, rows_by_split
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.folders import NETWORK
from meddiff_steps.imaging.pairs import Pairs
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.steps import options
from meddiff_steps.training.checkpoints import state_key
from meddiff_steps.training.image_to_image import Network, labelled_subjects, rows_to_train_on, train


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    network: Annotated[
        str,
        typer.Option(help="pretraining: denoises scans, sees no label; scratch_N, pretrained_N: of N subjects, or all"),
    ],
    out: Annotated[Path, typer.Option(help="folder to write: weights, card, training curve")],
    state: options.State,
    base: Annotated[Path | None, typer.Option(help="folder of `pretraining`, for pretrained_N")] = None,
    threads: options.Threads = 1,
) -> None:
    """Pretrain a network as a denoising diffusion of all training scans, or train one on the labels of few subjects."""
    study = load_stage(config, "segmentation_few_labels")
    settings, key = study.segmentation_ensemble, "segmentation_ensemble"
    way, _, number = network.partition("_")
    if network != "pretraining" and (way not in ("scratch", "pretrained") or not (number.isdigit() or number == "all")):
        raise UserError(f"--network {network}: expected pretraining, scratch_N or pretrained_N, with a number or all.")
    if (base is not None) != (way == "pretrained"):
        raise UserError(f"--network {network}: {'no' if base is None else 'a'} --base; pretrained_N needs it alone.")
    shards, table = Shards(images), read_manifest(manifest)
    scans = shards.column("scan_id")
    rows = rows_to_train_on(rows_by_split(table, scans), key)
    pairs, root = Pairs.of(shards, settings.source, settings.target, rows[0], key), f"{study.seed}/segmentation"
    if way == "pretraining":
        if not settings.pretraining_steps:
            raise UserError(f"--network pretraining: {key}.pretraining_steps is 0. Say how many.")
        trained = Network(way, "diffusion", pairs.of_sources(), out, steps=settings.pretraining_steps)
    else:
        subject = dict(zip(table["scan_id"], table["subject_id"], strict=True))
        count = None if number == "all" else int(number)
        chosen = labelled_subjects((subject[scans[row]] for row in rows[0]), count, root, f"{key}.labelled")
        labelled = np.array([row for row in rows[0] if subject[scans[row]] in set(chosen)])
        Pairs.of(shards, settings.source, settings.target, labelled, f"{key}.labelled ({number})")  # are there any?
        more: dict[str, Any] = {"labelled": labelled, "base": base, "facts": {"labelled_subjects": len(chosen)}}
        # Named without the way: both look at the same batches
        trained = Network(f"labels_{number}", "regression", pairs, out, **more)
    given = [base / name for name in NETWORK] if base else []
    found = state / f"{state_key('segmentation_few_labels', config, [manifest, *images, *given])}-{network}"
    fabric = make_fabric(study.compute, threads, study.compute.devices)
    train([trained], settings, study.variants, study.compute, rows, root, fabric, found)
