"""Step `normative`: how far real scans are from a reference population, on their own grids, as a BIDS derivative."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from scipy import stats
from tqdm import tqdm

from meddiff_steps.applications import derivative
from meddiff_steps.applications.normative import COUNTERFACTUAL, NormativeMaps, is_reference
from meddiff_steps.applications.scans import CALIBRATED_ON, chosen_scans, one_a_session, unseen, with_split
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import Study, load_stage
from meddiff_steps.core.files import atomic_path, write_atomic, write_json
from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation import normative as measuring
from meddiff_steps.imaging.places import lesion, with_lesion
from meddiff_steps.imaging.restoration import restore, restore_numbers
from meddiff_steps.imaging.selection import Images
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.report.application_figures import SHOWN_Z, deviation_sheet
from meddiff_steps.steps import options

log = logging.getLogger(__name__)

README = """# Normative deviation maps

Each map compares a real person's scan with a reference population, by a generative model. The images show real people:
handle them as the scans themselves. A deviation is no finding: it says that few subjects of the reference have such
grey values there, for whatever reason, and one voxel in twenty of a healthy scan lies beyond 1.96.

Per scan, on the scan's own grid: `desc-reference` is the mean of draws of the reference that share the scan's coarse
anatomy, in its grey values, `desc-deviation` the map of z. figures.json says how often healthy scans deviate, and
whether lesions that were put in are found, beside a normative model by regression; measurements.parquet has every scan.
"""

#: Lines of the contact sheet at most.
SHOWN = 16


def run(
    config: options.Config,
    manifest: options.Manifest,
    qc: options.Quality,
    images: options.Images,
    autoencoder: options.Autoencoder,
    diffusion: options.Diffusion,
    out: Annotated[Path, typer.Option(help="folder to write: a BIDS derivative dataset, figures.json, pictures")],
    threads: options.Threads = 1,
) -> None:
    """Map how far real scans are from a reference population, and measure whether the maps can be believed."""
    study = load_stage(config, "normative")
    settings = study.normative
    cohort = Images.of_scans(images, manifest, study.covariates)
    comparable = one_a_session(cohort.table)
    scans = chosen_scans(
        cohort.table if settings.scans else comparable,
        settings.scans,
        settings.most_scans,
        "normative",
        CALIBRATED_ON,
    )
    elsewhere = ~scans["scan_id"].isin(comparable["scan_id"])
    if elsewhere.any():
        log.warning(
            "normative.scans: %d of %d scans are not the middle one of their session, which what is normal was learnt"
            " from (%s, ...). Where a session has slices of a head, their maps compare different places",
            elsewhere.sum(),
            len(scans),
            scans.loc[elsewhere, "scan_id"].iloc[0],
        )
    model = TrainedModel.load(autoencoder, diffusion, make_fabric(study.compute, threads), study.compute, toned=False)
    maps = NormativeMaps(study, model, cohort)
    quality = pd.read_parquet(qc).set_index("scan_id")

    shutil.rmtree(out, ignore_errors=True)
    rows: list[dict[str, Any]] = []
    tiles: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]] = []
    regions: list[np.ndarray] = []
    healthy = is_reference(scans, settings)
    for i in tqdm(range(len(scans)), "scans", unit="scan"):
        scan, facts = scans.iloc[[i]], quality.loc[scans["scan_id"].iloc[i]]
        image = cohort.shards.tensors("image", scan["row"].to_numpy())[0]
        draws, found = maps.of(image, scan)
        kind = measuring.REFERENCE if healthy[i] else "other"
        rows += _rows(scan, kind, found, image[0] > 0, settings.beyond)
        _write_images(study, out, scan.iloc[0], facts, draws, found[COUNTERFACTUAL], maps.count)
        tiles.append((str(scan["scan_id"].iloc[0]), image, draws.mean(0), found[COUNTERFACTUAL]))
        regions.append(image[0] > 0)
        if settings.lesions.given and healthy[i]:
            place = philox(f"{study.seed}/normative/{scan['scan_id'].iloc[0]}", "place")
            share = lesion(settings.lesions, i, facts, image[0] > 0, maps.spacing, place, "normative")
            ill = with_lesion(image[0], share, settings.lesions.contrast)[None]
            draws, found = maps.of(ill, scan)
            rows += _rows(scan, measuring.LESION, found, image[0] > 0, settings.beyond, share > 0)
            tiles.append((f"{tiles[-1][0]} with a lesion", ill, draws.mean(0), found[COUNTERFACTUAL]))
            regions.append(share > 0)

    table = with_split(pd.DataFrame(rows), scans)
    nominal = 2 * float(stats.norm.sf(settings.beyond))
    facts_: dict[str, Any] = {"scans": scans["scan_id"].tolist(), "settings": settings.model_dump(mode="json")}
    facts_ |= {"model": model.digests, "calibration_scans": maps.count, "training_scans": maps.training}
    facts_ |= {
        "methods": measuring.figures(
            unseen(table, CALIBRATED_ON), nominal, resamples=study.evaluate.bootstrap, seed=study.seed
        ),
    }
    with atomic_path(out / "measurements.parquet") as path:
        table.to_parquet(path, index=False)
    write_json(out / "figures.json", facts_)
    write_atomic(out / "contact-sheet.png", deviation_sheet(tiles[:SHOWN], regions[:SHOWN]))
    derivative.complete(out, "Normative deviation maps", README, model.digests, "normative")
    log.info("%s: %d scans", out, len(scans))


def _rows(
    scan: pd.DataFrame,
    kind: str,
    found: dict[str, np.ndarray],
    head: np.ndarray,
    beyond: float,
    lesion: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    named = {"scan_id": scan["scan_id"].iloc[0], "subject_id": scan["subject_id"].iloc[0], "kind": kind}
    return [{**named, "method": method, **measuring.measured(z, head, beyond, lesion)} for method, z in found.items()]


def _write_images(
    study: Study, out: Path, scan: pd.Series, facts: pd.Series, draws: np.ndarray, z: np.ndarray, count: int
) -> None:
    source = derivative.Source(scan["scan_id"], scan["path"], study.release.suffix)
    settings = study.normative
    said: dict[str, Any] = {"Reference": dict(settings.reference), "Samples": len(draws)}
    said |= {"SkullStripped": study.release.skull_stripped, "CalibrationSubjects": count}
    said |= {"SmoothingFWHM": settings.smoothing_mm}
    mean, affine = restore(draws.mean(0), facts)
    derivative.write_image(out, source, "reference", mean, affine, said)
    deviation, affine = restore_numbers(z, facts)
    derivative.write_image(out, source, "deviation", deviation, affine, said | {"Units": "z"}, span=(-SHOWN_Z, SHOWN_Z))
