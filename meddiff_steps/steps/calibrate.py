"""Step `calibrate`: the training set as the copy detectors see it, their thresholds and their controls.  All of it
private.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from safetensors.numpy import save_file

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path, write_json
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.imaging.signed_distances import LABELS
from meddiff_steps.privacy.label_maps import RealLabelMaps, vectors
from meddiff_steps.privacy.reference import ReferenceFiles, build_reference, calibration_card
from meddiff_steps.steps import options

log = logging.getLogger(__name__)


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    autoencoder: options.Autoencoder,
    scale: options.Scale,
    embedder: options.Embedder,
    reference: Annotated[Path, typer.Option(help="directions of the training scans to write (safetensors)")],
    reference_scans: Annotated[Path, typer.Option(help="training scans as they are compared, to write (Arrow)")],
    out: Annotated[Path, typer.Option(help="thresholds and controls to write (JSON)")],
    latents: Annotated[
        list[Path] | None, typer.Option(help="latent shard; repeat for all of them. Left out, scans are encoded again")
    ] = None,
    label_maps: options.LabelMaps = None,
    threads: options.Threads = 1,
) -> None:
    """Measure how near unseen real subjects come to the training set, and whether planted copies would be found."""
    study = load_stage(config, "calibrate")
    fabric = make_fabric(study.compute, threads)
    shards, names = Shards(images), study.privacy.detectors
    scans = read_manifest(manifest).set_index("scan_id").loc[shards.column("scan_id")].reset_index()
    table = pd.DataFrame({"row": np.arange(len(scans)), "subject_id": scans["subject_id"], "split": scans["split"]})
    files = ReferenceFiles(reference_scans, autoencoder, scale, embedder)
    training = table.loc[table["split"] == "train", "row"].to_numpy()
    if len(training) == 0:
        raise UserError(
            f"{manifest}: no preprocessed scan is in the train split, so there is nothing to compare with. Check splits"
            " and preprocessed/qc.parquet."
        )
    known = _known(latents, scans["scan_id"].iloc[training].tolist()) if latents else None
    tensors = build_reference(files, shards, training, names, known, fabric)
    maps = None
    if label_maps:
        maps = RealLabelMaps.of(Shards(label_maps), scans["scan_id"].tolist())
        tensors[LABELS] = vectors(maps[training], maps.structures)
    with atomic_path(reference) as path:
        save_file(tensors, path)
    subgroup = study.privacy.subgroup
    groups = (
        scans.groupby("subject_id")[subgroup].first().astype(str)
        if subgroup
        else pd.Series("all", index=scans["subject_id"].unique())
    )
    level, flip, spacing = study.privacy.level, study.variants.flip, study.preprocess.voxel_mm
    card = calibration_card(
        files, shards, tensors, table, groups, level, study.seed, names, flip, fabric, maps, spacing
    )
    write_json(out, card)
    if card["status"] != "CALIBRATED":
        log.warning(
            "NOT_CALIBRATED: %d calibration subjects, %d needed for privacy.level %g",
            card["subjects"],
            card["needed"],
            card["level"],
        )


def _known(paths: list[Path], ids: Sequence[str]) -> Callable[[], Iterator[np.ndarray]]:
    """Gives the latents that were kept of scans as they are, in the order of `ids`."""
    shards = Shards(paths)
    rows = zip(shards.column("scan_id"), shards.column("variant"), strict=True)
    place = {scan: row for row, (scan, variant) in enumerate(rows) if variant == 0}
    missing = [scan for scan in ids if scan not in place]
    if missing:
        raise UserError(
            f"{shards.origin}: no latents of {missing[0]}, and of {len(missing)} training scans in all. Give all shards"
            " that the step `latents` wrote of these images, or none, and scans are encoded again."
        )
    return lambda: (shards.tensor("mean", place[scan]) for scan in ids)
