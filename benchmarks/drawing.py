"""Synthetic subjects for the covariates of held-out scans, and their images: the same of every arm of a comparison."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa

from meddiff_steps import config
from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.imaging.shards import ShardWriter, TensorColumn
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.synthesis.generate import CohortGenerator


def planned(scans: pd.DataFrame, seed: str, name: str = "syn", stream: str = "noise") -> pd.DataFrame:
    """A plan with a subject for each of some scans (a row of covariates each), and noise that every arm gets."""
    count = len(scans)
    return scans.reset_index(drop=True).assign(
        sample_id=[f"{name}-{i:04d}" for i in range(count)],
        index=range(count),
        noise_index=range(count),
        cohort_root=seed,
        attempt=0,
        seed_key=[seed_key(seed, i, 0, stream) for i in range(count)],
    )


def draw(model: TrainedModel, settings: config.Generate, plan: pd.DataFrame, path: Path) -> None:
    """Write the images of a plan."""
    columns = {"sample_id": pa.string(), "image": TensorColumn("float16", model.image_shape)}
    with ShardWriter(path, columns) as writer:
        for name, image in CohortGenerator(model, settings).images(plan, path.parent.name):
            writer.append(sample_id=name, image=image)
