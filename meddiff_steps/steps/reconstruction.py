"""Step `reconstruction`: scans from incomplete measurements of them, as a BIDS derivative."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer

from meddiff_steps.applications import derivative
from meddiff_steps.applications.reconstruction import (
    VALIDATION_SCANS,
    WEIGHT_SCANS,
    Measurement,
    Reconstructor,
    best_weight,
    first_stage_variance,
    without_a_model,
)
from meddiff_steps.applications.scans import chosen_scans, unseen, with_split
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import Study, load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path, write_atomic, write_json
from meddiff_steps.core.npz import read_npz
from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation import completion
from meddiff_steps.imaging.channels import filled_in
from meddiff_steps.imaging.operators.base import build
from meddiff_steps.imaging.places import lesion, with_lesion
from meddiff_steps.imaging.restoration import restore, restore_difference
from meddiff_steps.imaging.selection import Images
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.report.application_figures import completion_sheet
from meddiff_steps.steps import options

log = logging.getLogger(__name__)

README = """# Reconstruction

Each image was made from a measurement that leaves it open, by a generative model that knows heads of a cohort. They
show real people: handle them as the scans themselves. A model can put in what is usual and leave out what is not:
figures.json says how much of inserted lesions came back, where the study put some in.

Per scan, on its own grid and by measurement: `desc-...FirstLook` is what one sees without any prior, `desc-...` the
mean of all draws, `desc-...Std` their standard deviation in the scan's grey values. measurements.parquet has every
scan and method.
"""
#: Methods that no trained model is needed for.
SIMPLE = ("first_look", "total_variation")


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
    """Measure scans incompletely, or read what was measured, and make images of it."""
    study = load_stage(config, "reconstruction")
    settings = study.reconstruction
    cohort = Images.of_scans(images, manifest, study.covariates)
    scans = chosen_scans(cohort.table, settings.scans, settings.most_scans, "reconstruction")
    quality = pd.read_parquet(qc).set_index("scan_id")
    fabric = make_fabric(study.compute, threads)
    model = TrainedModel.load(autoencoder, diffusion, fabric, study.compute, toned=False)
    truths = cohort.shards.tensors("image", scans["row"].to_numpy())
    spacing = study.preprocess.voxel_mm or (1.0,) * (truths.ndim - 2)
    validation = cohort.of_splits(["val"]).at_most(VALIDATION_SCANS)
    if not len(validation):
        raise UserError("no preprocessed scan is in the val split, on which weights are chosen. Enlarge splits.val.")
    known = validation.column()[0 : len(validation)]
    maker = Reconstructor(model, settings, first_stage_variance(model, known))

    shutil.rmtree(out, ignore_errors=True)
    rows: list[dict[str, Any]] = []
    shown: dict[str, tuple[str, list[np.ndarray]]] = {}
    weights: dict[str, float] = {}
    for name, strength in settings.tasks:
        task = derivative.label(name, strength)
        tried = [
            (_measured(study, name, strength, spacing, image, f"{scan}/{task}").to(fabric.device), image)
            for scan, image in zip(validation.ids[:WEIGHT_SCANS], known[:WEIGHT_SCANS], strict=True)
        ]
        weights[task] = best_weight(tried)
        for i, scan in enumerate(scans.to_dict("records")):
            facts, clean = quality.loc[scan["scan_id"]], truths[i]
            share, truth = np.zeros(clean.shape[1:], np.float32), clean
            if settings.lesions.given:
                place = philox(f"{study.seed}/reconstruction/{scan['scan_id']}", "place")
                share = lesion(settings.lesions, i, facts, clean[0] > 0, spacing, place, "reconstruction")
                truth = with_lesion(clean[0], share, settings.lesions.contrast)[None]
            if settings.measured:
                measurement = _read(study, name, strength, spacing, scan, clean.shape)
            else:
                measurement = _measured(study, name, strength, spacing, truth, f"{scan['scan_id']}/{task}")
            measurement = measurement.to(fabric.device)
            found = {key: image[None] for key, image in without_a_model(measurement, weights[task]).items()}
            root = f"{study.seed}/reconstruction/{scan['scan_id']}/{task}"
            for method in settings.methods:
                draws, mean = maker.reconstruct(method, measurement, scans.iloc[[i]], root)
                found |= {method: draws, f"{method}_mean": mean[None]}
            who = {"scan_id": scan["scan_id"], "subject_id": scan["subject_id"], "operator": name, "strength": strength}
            if not settings.measured:
                rows += [
                    who | {"method": key} | _judged(truth[0], clean[0], share, draws[:, 0])
                    for key, draws in found.items()
                ]
            _write_images(study, out, scan, facts, task, found, settings.methods[0])
            if task not in shown:
                means = [found[f"{method}_mean"][0] for method in settings.methods]
                shown[task] = (scan["scan_id"], [truth, *(found[key][0] for key in SIMPLE), *means])
            log.info("%s %s: done", scan["scan_id"], task)

    table = with_split(pd.DataFrame(rows), scans)
    facts_: dict[str, Any] = {"scans": scans["scan_id"].tolist(), "settings": settings.model_dump(mode="json")}
    facts_ |= {"model": model.digests, "nominal_coverage": completion.nominal_coverage(settings.samples)}
    facts_ |= {
        "first_stage_std": float(maker.first_stage_variance.mean()) ** 0.5,
        "total_variation": weights,
        "results": [],
    }
    if len(table):
        by = ["operator", "strength", "method"]
        chosen: dict[str, Any] = {"resamples": study.evaluate.bootstrap, "seed": study.seed}
        facts_["results"] = completion.figures(unseen(table), by, list(SIMPLE), **chosen)
    with atomic_path(out / "measurements.parquet") as path:
        table.to_parquet(path, index=False)
    write_json(out / "figures.json", facts_)
    columns = ["measured from" if settings.measured else "scan", "first look", "total variation", *settings.methods]
    tiles = [(f"{task}: {name}", images_) for task, (name, images_) in shown.items()]
    write_atomic(out / "contact-sheet.png", completion_sheet("Reconstruction", tiles, columns))
    derivative.complete(out, "Reconstruction", README, model.digests, "reconstruction")
    log.info("%s: %d scans, %d measurements", out, len(scans), len(settings.tasks))


def _measured(
    study: Study, name: str, strength: float, spacing: tuple[float, ...], image: np.ndarray, label: str
) -> Measurement:
    """A simulated measurement of an image (1, *spatial)."""
    generator = philox(study.seed, f"measurement|{label}")
    operator = build(name, strength, study.reconstruction, image.shape, spacing, generator)
    return Measurement(*operator.measure(torch.from_numpy(image)[None], generator))


def _read(
    study: Study, name: str, strength: float, spacing: tuple[float, ...], scan: dict[Any, Any], shape: tuple[int, ...]
) -> Measurement:
    """The measurement of a scan from its file."""
    path = filled_in(str(study.reconstruction.measured), scan, "reconstruction.measured")
    given = read_npz(path, ("y",), "Write it with numpy.savez(path, y=...).")
    try:
        operator = build(name, strength, study.reconstruction, shape, spacing, philox(study.seed, "unused"), given)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Measurement(operator, operator.checked(given["y"], path))


def _judged(truth: np.ndarray, clean: np.ndarray, share: np.ndarray, draws: np.ndarray) -> dict[str, float]:
    found = completion.judged(truth, draws, truth > 0)
    return found | completion.lesion_left(truth, clean, share, draws) if share.any() else found


def _write_images(
    study: Study, out: Path, scan: dict[Any, Any], facts: pd.Series, task: str, found: dict[str, Any], method: str
) -> None:
    source = derivative.Source(scan["scan_id"], scan["path"], study.release.suffix)
    said = {"Measurement": task, "Method": method, "Samples": len(found[method])}
    said |= {"SkullStripped": study.release.skull_stripped}
    derivative.write_image(out, source, f"{task}FirstLook", *restore(found["first_look"][0], facts), facts=said)
    derivative.write_image(out, source, task, *restore(found[f"{method}_mean"][0], facts), facts=said)
    if len(found[method]) > 1:
        spread = restore_difference(found[method].std(axis=0, ddof=1), facts)
        derivative.write_image(out, source, f"{task}Std", *spread, facts=said)
