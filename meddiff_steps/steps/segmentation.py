"""Step `segmentation`: a structure marked in real scans by several draws, as a BIDS derivative."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from meddiff_steps.applications import derivative
from meddiff_steps.applications.image_to_image import Drawer
from meddiff_steps.applications.scans import chosen_scans, unseen, with_split
from meddiff_steps.applications.segmentation import (
    Brightness,
    Marked,
    majority,
    marked_beside,
    marked_by,
    mean_label,
)
from meddiff_steps.applications.shape_from_picture import Shapes
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import Study, load_stage
from meddiff_steps.core.files import atomic_path, write_atomic, write_json
from meddiff_steps.evaluation import segmentation
from meddiff_steps.imaging.channels import Kind
from meddiff_steps.imaging.restoration import restore, restore_numbers
from meddiff_steps.imaging.selection import Images
from meddiff_steps.report.application_figures import completion_sheet
from meddiff_steps.steps import options

log = logging.getLogger(__name__)

#: Scans in the contact sheet: the first with something marked.
SHOWN = 6

README = """# Segmentation

What is marked here was drawn by a generative model that learnt from marked scans. The scans are of real people: handle
what was made of them as the scans themselves. It is no finding, and no reader has looked at it.

Per scan, on its own grid: `desc-ensemble` is what most draws mark, `desc-ensembleMap` the share of draws that mark a
voxel, `desc-ensembleVariance` the variance of draws there, `desc-draw1` and so on single draws. figures.json says how
well they agree with what readers marked, beside the same network without noise and ways without a network;
measurements.parquet has every scan and way.
"""


def run(
    config: options.Config,
    manifest: options.Manifest,
    qc: options.Quality,
    images: options.Images,
    model: Annotated[Path, typer.Option(help="folder that `segmentation_model` wrote")],
    out: Annotated[Path, typer.Option(help="folder to write: a BIDS derivative dataset, figures.json, pictures")],
    beside: Annotated[
        list[Path] | None, typer.Option(help="file of a folder that `segmentation_model --beside` wrote; repeat")
    ] = None,
    few_labels: Annotated[
        list[Path] | None, typer.Option(help="file of a folder that `segmentation_few_labels` wrote; repeat")
    ] = None,
    threads: options.Threads = 1,
) -> None:
    """Mark a structure in held-out scans, and measure how well draws agree with what readers marked."""
    study = load_stage(config, "segmentation")
    settings = study.segmentation_ensemble
    cohort = Images.of_scans(images, manifest)
    scans = chosen_scans(cohort.table, settings.scans, settings.most_scans, "segmentation_ensemble")
    quality = pd.read_parquet(qc).set_index("scan_id")
    fabric = make_fabric(study.compute, threads)
    root = f"{study.seed}/segmentation"
    drawer = Drawer.load(model, cohort.shards, settings, root, fabric, "segmentation_ensemble")
    pairs, train = drawer.pairs, cohort.of_splits(["train"]).rows
    compared = {
        folder.name: Drawer.load(folder, cohort.shards, settings, root, fabric, "segmentation_ensemble")
        for folder in _folders(beside)
    }
    few = {
        folder.name: drawer.with_other("regression", folder, "segmentation_ensemble") for folder in _folders(few_labels)
    }
    average = mean_label(pairs, train)
    depth = study.preprocess.depth
    bright = Brightness.of(pairs, train) if pairs.kind == "mask" and depth is None else None
    bodies = Shapes.of(pairs, train) if pairs.kind == "mask" and depth is not None else None
    spacing = study.preprocess.voxel_mm or (1.0,) * (len(pairs.shards.shape("image")) - 1)

    shutil.rmtree(out, ignore_errors=True)
    rows: list[dict[str, Any]] = []
    shown: list[Any] = []
    for scan in scans.to_dict("records"):
        row = int(scan["row"])
        truth, sources = pairs.truths([row])[0], pairs.sources([row])[0]
        ways = {"mean_label": average, **({"brightness": bright(sources)} if bright else {})}
        ways |= bodies(sources) if bodies else {}
        ways |= marked_by(drawer, row, scan["scan_id"])
        ways |= marked_beside(compared, few, row, scan["scan_id"])
        ways["draw"] = Marked.of_mask(ways["ensemble"].draws[0])
        if pairs.readers > 1:
            ways |= {"majority_of_readers": Marked.of_mask(majority(truth))}
        rows += [
            {"scan_id": scan["scan_id"], "subject_id": scan["subject_id"], "method": name}
            | _judged(truth, sources[0] > 0, said, spacing)
            for name, said in ways.items()
        ]
        if len(shown) < settings.most_images:
            shown.append((scan["scan_id"], truth, sources, ways))
            _write_images(study, out, scan, quality.loc[scan["scan_id"]], ways["ensemble"], pairs.kind)
        log.info("%s: done", scan["scan_id"])

    table = with_split(pd.DataFrame(rows), scans)
    facts: dict[str, Any] = {"scans": scans["scan_id"].tolist(), "settings": settings.model_dump(mode="json")}
    networks = {"": drawer, **compared, **few}
    facts |= {"model": drawer.digests, "readers": pairs.readers}
    facts |= {"beside": {name: one.digests for name, one in networks.items() if name}}
    facts |= {
        "trainings": {
            f"{name}_{way}".strip("_"): said for name, one in networks.items() for way, said in one.training.items()
        }
    }
    facts |= {"brightness": vars(bright) if bright else None}
    facts |= {"shapes": {key: getattr(bodies, key) for key in ("middle", "factor", "half")} if bodies else None}
    facts["methods"] = segmentation.figures(unseen(table), resamples=study.evaluate.bootstrap, seed=study.seed)
    with atomic_path(out / "measurements.parquet") as path:
        table.to_parquet(path, index=False)
    write_json(out / "figures.json", facts)
    draws = (f"draw {k + 1}" for k in range(min(settings.samples, 3)))
    columns = ["scan", "readers", "without noise", *draws, "mean of draws", "variance"]
    # Of pictures: as they are seen, and across
    views = ("axial", "coronal") if depth is None else ("sagittal", "coronal")
    shown = ([one for one in shown if (one[1] > 0).any()] or shown)[:SHOWN]
    regions = [(truth > 0).any(0) for _, truth, *_ in shown]
    write_atomic(
        out / "contact-sheet.png", completion_sheet("Segmentation", _tiles(shown), columns, regions, views=views)
    )
    derivative.complete(out, "Segmentation", README, drawer.digests, "segmentation")
    log.info("%s: %d scans", out, len(scans))


def _folders(files: list[Path] | None) -> list[Path]:
    return list(dict.fromkeys(path.parent for path in files or []))


def _judged(truth: np.ndarray, head: np.ndarray, said: Marked, spacing: tuple[float, ...]) -> dict[str, Any]:
    found: dict[str, Any] = segmentation.overlap(majority(truth), said.mask, spacing)
    found |= segmentation.as_probability(truth, said.shares, head)
    return found | segmentation.like_readers(truth, said.draws)


def _tiles(shown: list[tuple[str, np.ndarray, np.ndarray, dict[str, Marked]]]) -> list[tuple[str, list[np.ndarray]]]:
    tiles = []
    for name, truth, sources, ways in shown:
        shares = ways["ensemble"].shares
        masks = [(truth > 0).mean(0), ways["regression"].mask > 0, *(ways["ensemble"].draws[:3] > 0), shares]
        images = [*masks, 4 * shares * (1 - shares)]
        tiles.append((name, [sources[:1], *(image.astype(np.float32)[None] for image in images)]))
    return tiles


def _write_images(study: Study, out: Path, scan: dict[Any, Any], facts: pd.Series, said: Marked, kind: Kind) -> None:
    """On the scan's own grid."""
    source = derivative.Source(scan["scan_id"], scan["path"], study.release.suffix)
    about = {"Samples": len(said.draws), "Source": list(study.segmentation_ensemble.source)}
    masks = {"ensemble": said.mask, **{f"draw{k + 1}": draw for k, draw in enumerate(said.draws)}}
    shows = "mask" if kind == "mask" else "dseg"
    for name, mask in masks.items():
        derivative.write_image(out, source, name, *restore(mask, facts, kind="labels"), about, shows=shows)
    variance = said.shares * (1 - said.shares)
    for name, shares, most in (("ensembleMap", said.shares, 1.0), ("ensembleVariance", variance, 0.25)):
        derivative.write_image(out, source, name, *restore_numbers(shares, facts), about, (0.0, most), "probseg")
