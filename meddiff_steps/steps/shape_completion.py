"""Step `shape_completion`: what is missing of shapes, as points and as masks."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from meddiff_steps.applications import derivative
from meddiff_steps.applications.shape_completion import complete, most_typical, split
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import load_stage
from meddiff_steps.core.files import atomic_path, write_atomic, write_json
from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation import shapes as judging
from meddiff_steps.imaging.points import grid_around, mask_of, patch_like, patch_of, read_shapes
from meddiff_steps.models.points import load_point_denoiser
from meddiff_steps.report.application_figures import shape_sheet
from meddiff_steps.steps import options

log = logging.getLogger(__name__)

README = """# Shape completion

A part of each shape was missing and drawn by a diffusion of points, given the rest. If the shapes are of people's
organs, these are, too: handle them as the scans that they come from.

Per shape, in its own frame, mm: `desc-completed` is the solid whose surface what is left and what was drawn lie on,
`desc-drawn` what it has that the shape with its defect has not. completions.npz has the points of all draws.
figures.json says how near they come to what was there, beside the nearest training shape; measurements.parquet has
every shape.
"""

#: Shapes of the contact sheet, and mm around shapes on their grid.
SHOWN, MARGIN_MM = 8, 6.0


def run(
    config: options.Config,
    points: options.Points,
    network: Annotated[Path, typer.Option(help="folder shape_network: model.safetensors and card.json")],
    out: Annotated[Path, typer.Option(help="folder to write: a BIDS derivative dataset, figures.json, pictures")],
    threads: options.Threads = 1,
) -> None:
    """Complete test shapes in several ways, and measure how near they come to what was missing."""
    study = load_stage(config, "shape_completion")
    settings = study.shape_completion
    shapes = read_shapes(points)
    train, val, test = split(len(shapes), settings.test_every, points)
    library = shapes.points[np.sort([*train, *val])]
    model, card = load_point_denoiser(network)
    make_fabric(study.compute, threads).to_device(model)
    left = np.stack([shapes.left(i) for i in test])
    begun = time.perf_counter()
    drawn = complete(model, left, shapes.gap, settings, [f"{study.seed}/{shapes.ids[i]}" for i in test])
    each = (time.perf_counter() - begun) / len(test)
    origin, shape = grid_around(shapes.points, settings.voxel_mm, MARGIN_MM + settings.closing_mm)
    affine = np.diag([*[settings.voxel_mm] * 3, 1.0])
    affine[:3, 3] = origin

    def solid(surface: np.ndarray) -> np.ndarray:
        return mask_of(surface, origin, shape, settings.voxel_mm, settings.closing_mm)

    shutil.rmtree(out, ignore_errors=True)
    rows: list[dict[str, Any]] = []
    shown = []
    for at, i in enumerate(test.tolist()):
        here, gone, name = shapes.left(i), shapes.gone(i), shapes.ids[i]
        begun = time.perf_counter()
        _, patch = patch_like(library, here, shapes.gap)
        looked = time.perf_counter() - begun
        some = library[philox(study.seed, f"random|{name}").integers(len(library))]
        typical = most_typical(drawn[at])
        ways = {
            "random": (patch_of(some, here, shapes.gap), looked / len(library)),
            "nearest": (patch, looked),
            "draw": (drawn[at, 0], each / settings.samples),
            "typical": (drawn[at, typical], each),
        }
        whole, defective = solid(shapes.points[i]), solid(here)
        for method, (found, seconds) in ways.items():
            mask = solid(np.concatenate([here, found]))
            rows.append(
                {
                    "id": name,
                    "method": method,
                    "chamfer_mm": judging.chamfer(found, gone),
                    "hd95_mm": judging.farthest(found, gone),
                    "dice": judging.dice(mask, whole),
                    "volume_error_ml": abs(int(mask.sum()) - int(whole.sum())) * settings.voxel_mm**3 / 1000,
                    "seconds": seconds,
                }
            )
        completed = solid(np.concatenate([here, drawn[at, typical]]))
        source = derivative.Source(name, str(points), "mask")
        said = {"Missing": shapes.gap, "Left": len(here), "Samples": settings.samples, "Draw": typical}
        for kind, mask in (("completed", completed), ("drawn", completed & ~defective)):
            derivative.write_image(out, source, kind, mask.astype(np.float32), affine, said)
        if at < SHOWN:
            shown.append((name, here, [gone, patch, *drawn[at][:3]]))
    table = pd.DataFrame(rows)
    facts: dict[str, Any] = {"shapes": {"train": len(train), "val": len(val), "test": len(test)}}
    facts |= {"settings": settings.model_dump(mode="json", exclude={"points"}), "model": card["weights_sha256"]}
    facts |= {"parameters": card["parameters"]}
    facts |= {"methods": judging.figures(table, "nearest", resamples=study.evaluate.bootstrap, seed=study.seed)}
    with atomic_path(out / "measurements.parquet") as path:
        table.to_parquet(path, index=False)
    with atomic_path(out / "completions.npz") as path, open(path, "wb") as stream:
        np.savez(stream, drawn_mm=drawn, ids=np.array([shapes.ids[i] for i in test]))
    write_json(out / "figures.json", facts)
    write_atomic(out / "contact-sheet.png", shape_sheet(shown))
    derivative.complete(out, "Shape completion", README, {"network": card["weights_sha256"]}, "shape_completion")
    log.info("%s: %d shapes", out, len(test))
