"""Step `shape_completion_train`: the diffusion of points that completes shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.applications.shape_completion import split
from meddiff_steps.compute.device import make_fabric, resolve
from meddiff_steps.config import load_stage
from meddiff_steps.core.files import atomic_path
from meddiff_steps.imaging.points import read_shapes
from meddiff_steps.models.weights import save_model
from meddiff_steps.steps import options
from meddiff_steps.training.checkpoints import state_key
from meddiff_steps.training.loop import fit
from meddiff_steps.training.tasks.shape_completion import ShapeTask


def run(
    config: options.Config,
    points: options.Points,
    out: Annotated[Path, typer.Option(help="folder to write: weights, card, training curve")],
    state: options.State,
    threads: options.Threads = 1,
) -> None:
    """Train the diffusion of points on whole shapes, resuming after a kill."""
    study = load_stage(config, "shape_completion_train")
    settings = study.shape_completion
    shapes = read_shapes(points)
    train, val, _ = split(len(shapes), settings.test_every, points)
    fabric = make_fabric(study.compute, threads)
    task = ShapeTask(settings, shapes, train, val, study.seed, fabric)
    folder = state / state_key("shape_completion_train", config, [points])
    curve = fit(task, settings.optimiser, fabric, folder, "shape_completion_train")
    with atomic_path(out / "history.parquet") as path:
        curve.to_parquet(path, index=False)
    facts = {
        "settings": settings.model_dump(mode="json", exclude={"points"}),
        "precision": resolve(study.compute)[1],
        "shapes": {"train": len(train), "val": len(val)},
    }
    save_model(task.modules["average"], out, facts)
