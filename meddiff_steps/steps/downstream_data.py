"""Step `downstream_data`: what the classifiers may learn from and be chosen on, reduced in size; no test scan is among
it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import pyarrow as pa
import typer
from tqdm import tqdm

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.config import Compute, load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path, read_json
from meddiff_steps.downstream.design import OPEN_SPLITS, check, levels_of, real_samples, synthetic_samples
from meddiff_steps.downstream.images import factor, read_reduced, reduce
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.steps import options

log = logging.getLogger(__name__)

#: Scans that go through the autoencoder at once.
RECONSTRUCT_BATCH = 8


def run(
    config: options.Config,
    design: Annotated[Path, typer.Option(help="augmentation/design.json")],
    manifest: options.Manifest,
    images: options.Images,
    plan: options.Plan,
    filtered: options.Filtered,
    samples: Annotated[Path, typer.Option(help="table of the images to write (Parquet)")],
    out: Annotated[Path, typer.Option(help="reduced images to write (Arrow); private")],
    generated: Annotated[
        list[Path] | None,
        typer.Option(help="generated shard, where arms use images before the filter; repeat for all of them"),
    ] = None,
    autoencoder: options.Autoencoder | None = None,
    more_filtered: Annotated[
        list[Path] | None,
        typer.Option(help="filtered shard of generator seed 1, then those of 2, and so on, as many of each"),
    ] = None,
    more_generated: Annotated[
        list[Path] | None, typer.Option(help="generated shard of generator seed 1, then those of 2, and so on")
    ] = None,
    threads: options.Threads = 1,
) -> None:
    """Gather the images of the train and val splits and the synthetic ones, and check that every arm can be made of
    them.
    """
    study = load_stage(config, "downstream_data")
    downstream, levels, side = (
        study.downstream,
        levels_of(study.downstream, study.covariates),
        study.downstream.classifier.longest_side,
    )
    groups = read_json(design)["groups"]
    planned = pd.read_parquet(plan)
    real = Shards(images)
    if "generated" in downstream.sources and not generated:
        raise UserError(
            "an arm uses images before the filter, and none were given. Name the generated shards with --generated."
        )
    # By kind and generator seed: the shards, and their column of ids.
    sources = {("real", 0): (real, "scan_id"), ("filtered", 0): (Shards(filtered), "sample_id")}
    if generated:
        sources["generated", 0] = (Shards(generated), "sample_id")
    for kind, more in (("filtered", more_filtered), ("generated", more_generated)):
        if kind in downstream.sources:
            sources |= {
                (kind, i + 1): (Shards(part), "sample_id")
                for i, part in enumerate(_by_seed(more or [], downstream.generator_seeds - 1, kind))
            }
    tables = [real_samples(read_manifest(manifest, study.covariates), downstream, levels, study.seed)]
    tables += [
        synthetic_samples(planned, downstream, groups, levels, study.seed, *which)
        for which in sources
        if which[0] != "real"
    ]
    table = pd.concat(
        [_with_images(part, *some) for part, some in zip(tables, sources.values(), strict=True) if len(part)],
        ignore_index=True,
    )
    if "reconstruction" in downstream.sources:
        train = table[(table["kind"] == "real") & (table["split"] == "train")]
        table = pd.concat([table, train.assign(kind="reconstruction")], ignore_index=True)
    check(downstream, levels, table, len(planned))

    shape = real.shape("image")
    small = tuple(max(1, n // factor(shape[1:], side)) for n in shape[1:])
    with ShardWriter(
        out, {"image_id": pa.string(), "kind": pa.string(), "image": TensorColumn("float16", (shape[0], *small))}
    ) as writer:
        for (kind, generator), (shards, key) in sources.items():
            part = table[(table["kind"] == kind) & (table["generator"] == generator)]
            for chosen, batch in read_reduced(shards, part["row"].to_numpy(), side, f"reducing {kind} images", key):
                for position, image in zip(chosen, batch, strict=True):
                    writer.append(image_id=part["image_id"].iloc[position], kind=kind, image=image)
        if "reconstruction" in downstream.sources:
            if autoencoder is None:
                raise UserError("an arm uses reconstructions, and no autoencoder was given. Name --autoencoder.")
            part = table[table["kind"] == "reconstruction"]
            copies = _reconstructed(real, part["row"].to_numpy(), autoencoder, study.compute, threads)
            for name, image in zip(part["image_id"], copies, strict=True):
                writer.append(image_id=name, kind="reconstruction", image=reduce(image[None], side)[0])
    with atomic_path(samples) as path:
        table.drop(columns="row").to_parquet(path, index=False)
    for split in OPEN_SPLITS:
        log.info("%s: %s", split, table.loc[table["split"] == split, "kind"].value_counts().to_dict())


def _by_seed(shards: list[Path], seeds: int, kind: str) -> list[list[Path]]:
    """Shards of each further generator seed."""
    if bool(shards) != bool(seeds) or (seeds and len(shards) % seeds):
        raise UserError(
            f"downstream.generator_seeds asks for {seeds} further seeds, and {len(shards)} of their {kind} shards were"
            " given. Name as many of each."
        )
    count = len(shards) // seeds if seeds else 0
    return [shards[i * count : (i + 1) * count] for i in range(seeds)]


def _with_images(table: pd.DataFrame, shards: Shards, key: str) -> pd.DataFrame:
    """Rows of `table` that have an image, with its row in the shards."""
    ids = shards.column(key)
    return table.merge(
        pd.DataFrame({"image_id": ids, "row": range(len(ids))}), on="image_id", how="inner", validate="one_to_one"
    )


def _reconstructed(
    shards: Shards, rows: np.ndarray, autoencoder: Path, compute: Compute, threads: int
) -> Iterator[np.ndarray]:
    """Scans after encoding and decoding, one at a time."""
    # torch is imported only where an arm needs it: without, the step takes seconds less.
    import torch

    from meddiff_steps.compute.device import make_fabric
    from meddiff_steps.models.first_stage.base import reconstruct
    from meddiff_steps.models.trained import load_first_stage

    fabric = make_fabric(compute, threads)
    model, _ = load_first_stage(autoencoder)
    fabric.to_device(model)
    for start in tqdm(range(0, len(rows), RECONSTRUCT_BATCH), desc="reconstructing", mininterval=5, file=sys.stderr):
        with torch.no_grad():
            batch = fabric.to_device(torch.from_numpy(shards.tensors("image", rows[start : start + RECONSTRUCT_BATCH])))
            yield from reconstruct(model, batch).cpu().numpy()
