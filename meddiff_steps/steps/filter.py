"""Step `filter`: which generated images of one shard may be released, and new ones in place of those that may not."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import pyarrow as pa
import typer
from safetensors.numpy import load_file

from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import load_stage
from meddiff_steps.core.files import atomic_path, read_json
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn, in_background
from meddiff_steps.imaging.signed_distances import LABELS
from meddiff_steps.models.masks import MaskModel
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.privacy.calibration import thresholds_of
from meddiff_steps.privacy.duplicates import block_means
from meddiff_steps.privacy.filter import fill
from meddiff_steps.privacy.label_maps import LabelMapDetector
from meddiff_steps.privacy.reference import ReferenceFiles, load_detectors
from meddiff_steps.steps import options
from meddiff_steps.synthesis.generate import CohortGenerator


def run(
    config: options.Config,
    plan: options.Plan,
    shard: options.Shard,
    generated: Annotated[Path, typer.Option(help="its generated images (Arrow)")],
    autoencoder: options.Autoencoder,
    diffusion: options.Diffusion,
    scale: options.Scale,
    embedder: options.Embedder,
    reference: options.Reference,
    reference_scans: options.ReferenceScans,
    calibration: options.Calibration,
    out: Annotated[Path, typer.Option(help="accepted images to write (Arrow)")],
    decisions: Annotated[Path, typer.Option(help="decision on every candidate to write (Parquet); private")],
    decoder: options.Decoder = None,
    masks: options.Masks = None,
    threads: options.Threads = 1,
) -> None:
    """Compare every image with all training scans, and draw again what is too near, with the same covariates."""
    study = load_stage(config, "filter")
    fabric = make_fabric(study.compute, threads)
    subjects = pd.read_parquet(plan, filters=[("shard", "==", shard)])
    subgroup = study.privacy.subgroup
    groups = dict(
        zip(subjects["sample_id"], subjects[subgroup].astype(str) if subgroup else ["all"] * len(subjects), strict=True)
    )
    limits = read_json(calibration)
    files = ReferenceFiles(reference_scans, autoencoder, scale, embedder)
    known = load_file(reference)
    detectors = load_detectors(files, known, limits["detectors"], limits["mirrors"], fabric)
    of_labels = LabelMapDetector(known[LABELS], limits["structures"], limits["mirrors"]) if LABELS in known else None
    drawn = Shards([generated])
    paired = LABELS in drawn.schema.names
    first = (
        (name, drawn.tensors("image", [row])[0], drawn.tensor(LABELS, row) if paired else None)
        for row, name in enumerate(drawn.column("sample_id"))
    )

    @cache
    def generator() -> CohortGenerator:
        """The trained model, which is loaded when the first image is rejected."""
        return CohortGenerator(
            TrainedModel.load(autoencoder, diffusion, fabric, study.compute, decoder=decoder),
            study.generate,
            MaskModel.where_there_is(masks, fabric, study.compute),
        )

    rows = []
    with (
        ShardWriter(out, columns(drawn.shape("image"), paired)) as writer,
        in_background(partial(_write, writer)) as write,
    ):
        for candidate in fill(
            subjects,
            first,
            lambda again: generator().pairs(again, f"shard {shard}, again"),
            groups,
            detectors,
            thresholds_of(limits),
            study.privacy.max_attempts,
            of_labels,
        ):
            rows.append(candidate.row())
            if candidate.decision == "accepted":
                more = {LABELS: candidate.labels} if paired else {}
                write(sample_id=candidate.sample_id, attempt=candidate.attempt, image=candidate.image, **more)
    with atomic_path(decisions) as path:
        pd.DataFrame(rows).to_parquet(path, index=False)


def columns(shape: tuple[int, ...], paired: bool = False) -> dict[str, pa.DataType | TensorColumn]:
    """Of a shard of accepted images of `shape`, (1, *spatial), alone or `paired` with their label maps."""
    means = block_means(np.zeros((1, *shape), np.float32)).shape[1:]
    return {
        "sample_id": pa.string(),
        "attempt": pa.int64(),
        "image": TensorColumn("float16", shape),
        "block_means": TensorColumn("float32", means),
        **({LABELS: TensorColumn("uint8", shape[1:])} if paired else {}),
    }


def _write(writer: ShardWriter, sample_id: str, attempt: int, image: np.ndarray, **more: np.ndarray) -> None:
    """Keep an image, and what near duplicates are looked for by, so that nobody reads all images once more for that."""
    kept = image.astype(np.float16)
    means = block_means(kept.astype(np.float32)[None])[0]
    writer.append(sample_id=sample_id, attempt=attempt, image=kept, block_means=means, **more)
