"""Step `filter`: which generated images of one shard may be released, and new ones in place of those that may not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import pyarrow as pa
import typer
from safetensors.numpy import load_file

from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import load_stage
from meddiff_steps.core.files import atomic_path, read_json
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.models.trained import LatentDiffusion, load_autoencoder
from meddiff_steps.privacy.calibration import thresholds_of
from meddiff_steps.privacy.filter import fill
from meddiff_steps.privacy.reference import ReferenceFiles, load_detectors
from meddiff_steps.synthesis.generate import CohortGenerator


def run(
    config: Annotated[Path, typer.Option(help="frozen config of stage `filter`")],
    plan: Annotated[Path, typer.Option(help="plan.parquet")],
    shard: Annotated[int, typer.Option(help="number of the shard")],
    generated: Annotated[Path, typer.Option(help="its generated images (Arrow)")],
    images: Annotated[list[Path], typer.Option(help="preprocessed shard; repeat for all of them")],
    autoencoder: Annotated[Path, typer.Option(help="autoencoder/model.safetensors")],
    autoencoder_card: Annotated[Path, typer.Option(help="autoencoder/card.json")],
    diffusion: Annotated[Path, typer.Option(help="diffusion/model.safetensors")],
    diffusion_card: Annotated[Path, typer.Option(help="diffusion/card.json")],
    scale: Annotated[Path, typer.Option(help="latents/scale.safetensors")],
    embedder: Annotated[Path, typer.Option(help="privacy/embedder.safetensors")],
    embedder_card: Annotated[Path, typer.Option(help="privacy/embedder.json")],
    reference: Annotated[Path, typer.Option(help="privacy/reference.safetensors")],
    calibration: Annotated[Path, typer.Option(help="privacy/calibration.json")],
    out: Annotated[Path, typer.Option(help="accepted images to write (Arrow)")],
    decisions: Annotated[Path, typer.Option(help="decision on every candidate to write (Parquet); private")],
    threads: Annotated[int, typer.Option(help="CPU threads; changes the last bits of CPU results")] = 1,
) -> None:
    """Compare every image with all training scans, and draw again what is too near, with the same covariates."""
    study = load_stage(config, "filter")
    fabric = make_fabric(study.compute, threads)
    subjects = pd.read_parquet(plan, filters=[("shard", "==", shard)])
    subgroup = study.privacy.subgroup
    groups = dict(
        zip(subjects["sample_id"], subjects[subgroup].astype(str) if subgroup else ["all"] * len(subjects), strict=True)
    )
    detectors = load_detectors(
        ReferenceFiles(images, autoencoder, autoencoder_card, scale, embedder, embedder_card), load_file(reference)
    )
    first_stage, card = load_autoencoder(autoencoder, autoencoder_card)
    generator = CohortGenerator(
        LatentDiffusion.load(diffusion, diffusion_card), first_stage, study.generate, fabric, study.compute
    )
    drawn = Shards([generated])
    first = ((name, drawn.tensor("image", row)) for row, name in enumerate(drawn.column("sample_id")))
    rows = []
    columns = {
        "sample_id": pa.string(),
        "attempt": pa.int64(),
        "image": TensorColumn("float16", tuple(card["image_shape"])),
    }
    with ShardWriter(out, columns) as writer:
        for candidate in fill(
            subjects,
            first,
            lambda again: generator.images(again, f"shard {shard}, again"),
            groups,
            detectors,
            thresholds_of(read_json(calibration)),
            study.privacy.max_attempts,
        ):
            rows.append(candidate.row())
            if candidate.decision == "accepted":
                writer.append(sample_id=candidate.sample_id, attempt=candidate.attempt, image=candidate.image)
    with atomic_path(decisions) as path:
        pd.DataFrame(rows).to_parquet(path, index=False)
