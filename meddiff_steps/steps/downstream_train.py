"""Step `downstream_train`: train the classifiers of some arms, with all seeds."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from safetensors.torch import save_file

from meddiff_steps.compute.device import resolve
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path, read_json
from meddiff_steps.downstream.classifier import Task, Trained, train_all
from meddiff_steps.downstream.design import OPEN_SPLITS, compose, recipes
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.steps import options

log = logging.getLogger(__name__)


def run(
    config: options.Config,
    design: Annotated[Path, typer.Option(help="augmentation/design.json")],
    samples: Annotated[Path, typer.Option(help="augmentation/samples.parquet")],
    images: Annotated[Path, typer.Option(help="augmentation/images.arrow")],
    job: Annotated[int, typer.Option(help="which part of the arms, from 0 to downstream.jobs - 1")],
    weights: Annotated[Path, typer.Option(help="weights to write (safetensors), by recipe, seed and layer")],
    validation: Annotated[Path, typer.Option(help="scores on the val split to write (Parquet)")],
    threads: options.Threads = 1,
) -> None:
    """Train every classifier of this job for the same number of steps; its inputs hold no test scan."""
    study = load_stage(config, "downstream_train")
    downstream, levels = study.downstream, read_json(design)["levels"]
    table, shards = pd.read_parquet(samples), Shards([images])
    closed = sorted(set(table["split"]) - set(OPEN_SPLITS))
    if closed or [*zip(shards.column("image_id"), shards.column("kind"), strict=True)] != [
        *zip(table["image_id"], table["kind"], strict=True)
    ]:
        found = f"it holds scans of the split {closed[0]}" if closed else f"its rows are not those of {images}"
        raise UserError(
            f"{samples}: {found}. Classifiers learn from {' and '.join(OPEN_SPLITS)} alone; run `downstream_data`"
            " again."
        )
    level = table["level"].to_numpy()
    tasks = []
    for name, (arm, generator) in list(recipes(downstream).items())[job :: downstream.jobs]:
        rows = compose(arm, table, len(levels), generator).rows
        tasks += [Task(name, number, arm, rows, level[rows]) for number in range(downstream.seeds)]
    held = np.flatnonzero((table["split"] == "val").to_numpy())
    device = resolve(study.compute)[0]
    trained = train_all(
        tasks,
        downstream.classifier,
        shards.shape("image"),
        len(levels),
        lambda rows: shards.tensors("image", rows),
        (held, level[held]),
        study.preprocess.voxel_mm,
        study.variants.flip,
        study.seed,
        device,
        threads,
    )
    with atomic_path(weights) as path:
        save_file(
            {f"{t.task.recipe}/{t.task.number}/{name}": value for t in trained for name, value in t.state.items()}, path
        )
    scores = (
        pd.concat([_scores(t, table.iloc[held]["subject_id"].nunique()) for t in trained], ignore_index=True)
        if trained
        else pd.DataFrame()
    )
    with atomic_path(validation) as path:
        scores.to_parquet(path, index=False)
    for which, part in scores[scores["kept"]].groupby("recipe", sort=False) if trained else ():
        log.info(
            "recipe %s: validation AUC %.3f, log loss %.3f (mean of %d seeds)",
            which,
            part["auc"].mean(),
            part["log_loss"].mean(),
            len(part),
        )


def _scores(trained: Trained, subjects: int) -> pd.DataFrame:
    curve = trained.curve
    return curve.assign(
        recipe=trained.task.recipe, seed=trained.task.number, kept=curve["step"] == trained.kept_step, subjects=subjects
    )
