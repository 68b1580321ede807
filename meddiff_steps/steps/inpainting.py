"""Step `inpainting`: hidden parts of real scans, or lesions put into them, drawn anew; as a BIDS derivative."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from meddiff_steps.applications import derivative
from meddiff_steps.applications.inpainting import Inpainted, inpaint
from meddiff_steps.applications.scans import chosen_scans, unseen, with_split
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import ContinuousCovariate, Study, load_stage
from meddiff_steps.core.files import atomic_path, write_atomic, write_json
from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation import completion
from meddiff_steps.imaging.filling import FILLINGS, pasted, seam
from meddiff_steps.imaging.places import hidden_voxels, lesion, with_lesion
from meddiff_steps.imaging.reading import read_image
from meddiff_steps.imaging.restoration import restore, restore_difference
from meddiff_steps.imaging.selection import Images
from meddiff_steps.instruments.predictors import Predictors, load_predictors
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.report.application_figures import completion_sheet
from meddiff_steps.steps import options

log = logging.getLogger(__name__)

README = """# Inpainting

Part of each scan was hidden and drawn anew by a generative model, given the rest. The images show real people: handle
them as the scans themselves. What stands in a hole is what heads of the training cohort have there. It is no finding.

Per scan, on the scan's own grid: `desc-hidden` is what was hidden (1), `desc-inpainted` the scan with the first draw in
it, `desc-inpaintedMean` with the mean of all draws, `desc-inpaintedStd` their standard deviation in the scan's grey
values. figures.json says how near hidden voxels came to what was there, beside fillings without a model;
measurements.parquet has every scan.
"""


def run(
    config: options.Config,
    manifest: options.Manifest,
    qc: options.Quality,
    images: options.Images,
    autoencoder: options.Autoencoder,
    diffusion: options.Diffusion,
    predictors: options.Predictors,
    out: Annotated[Path, typer.Option(help="folder to write: a BIDS derivative dataset, figures.json, pictures")],
    decoder: options.Decoder = None,
    threads: options.Threads = 1,
) -> None:
    """Hide parts of real scans, draw them anew, and measure how near they come to what was there."""
    study = load_stage(config, "inpainting")
    settings = study.inpainting
    cohort = Images.of_scans(images, manifest, study.covariates)
    scans = chosen_scans(cohort.table, settings.scans, settings.most_scans, "inpainting")
    real = cohort.shards.tensors("image", scans["row"].to_numpy())
    quality = pd.read_parquet(qc).set_index("scan_id")
    fabric = make_fabric(study.compute, threads)
    model = TrainedModel.load(autoencoder, diffusion, fabric, study.compute, decoder=decoder, toned=False)
    spacing = study.preprocess.voxel_mm or (1.0,) * (real.ndim - 2)
    naive_way = settings.model_copy(update={"resamples": 1})

    shutil.rmtree(out, ignore_errors=True)
    rows: list[dict[Any, Any]] = []
    kinds: dict[str, list[np.ndarray]] = {"true": [], "lesion": []}
    shown, parts = [], []
    for i, scan in enumerate(scans.to_dict("records")):
        facts, truth, root = quality.loc[scan["scan_id"]], real[i], f"{study.seed}/inpainting/{scan['scan_id']}"
        place, foreground = philox(root, "place"), truth[0] > 0
        given = truth
        if settings.lesions.given:
            share = lesion(settings.lesions, i, facts, foreground, spacing, place, "inpainting")
            given = with_lesion(truth[0], share, settings.lesions.contrast)[None]
            hidden = share > 0
        else:
            hidden = hidden_voxels(settings.hole, scan, facts, foreground, spacing, place)
        subject = scans.iloc[[i]]
        made = inpaint(model, given, hidden, subject, settings, root)
        naive = inpaint(model, given, hidden, subject, naive_way, root)
        simple = {name: fill(given[0], hidden)[None] for name, fill in FILLINGS.items()}
        encoded = model.decode(model.encode(truth[None])).cpu().numpy()[0]
        ways = {
            **{name: image[None] for name, image in simple.items()},
            "naive": naive.drawn,
            "naive_mean": naive.drawn.mean(0, keepdims=True),
            "repaint": made.drawn,
            "repaint_mean": made.drawn.mean(0, keepdims=True),
            "repaint_copied": np.where(hidden, made.decoded, given),
            "first_stage": np.where(hidden, encoded, given)[None],
        }
        rows += [_row(scan, name, truth, draws, hidden, made.known) for name, draws in ways.items()]
        kinds["true"].append(truth)
        kinds["lesion"].append(given)
        for name, draws in ways.items():
            kinds.setdefault(name, []).append(draws[0])
        shown.append((scan["scan_id"], truth, np.where(hidden, 0, given), simple["harmonic"], made.drawn))
        parts.append((scan, facts, hidden, made))
        log.info("%s: %d voxels hidden, %.0f%% of latents known", scan["scan_id"], hidden.sum(), 100 * made.known)

    table = with_split(pd.DataFrame(rows), scans)
    options_: dict[str, Any] = {"resamples": study.evaluate.bootstrap, "seed": study.seed}
    facts_: dict[str, Any] = {"scans": scans["scan_id"].tolist(), "settings": settings.model_dump(mode="json")}
    facts_ |= {"model": model.digests, "nominal_coverage": completion.nominal_coverage(settings.samples)}
    facts_ |= {"methods": completion.figures(unseen(table), ["method"], list(FILLINGS), **options_)}
    if settings.lesions.given:
        facts_["volumes"] = _volumes(study, load_predictors(predictors), scans, kinds, options_)
    with atomic_path(out / "measurements.parquet") as path:
        table.to_parquet(path, index=False)
    write_json(out / "figures.json", facts_)
    for scan, facts, hidden, made in parts:
        _write_images(study, out, scan, facts, hidden, made, own=not settings.lesions.given)
    columns = ["scan", "hidden", "harmonic", *(f"draw {k + 1}" for k in range(min(3, settings.samples)))]
    tiles = [(name, [a, b, c, *draws[:3]]) for name, a, b, c, draws in shown]
    write_atomic(out / "contact-sheet.png", completion_sheet("Inpainting", tiles, columns, [h for _, _, h, _ in parts]))
    derivative.complete(out, "Inpainting", README, model.digests, "inpainting")
    log.info("%s: %d scans", out, len(scans))


def _row(
    scan: dict[Any, Any], method: str, truth: np.ndarray, draws: np.ndarray, hidden: np.ndarray, known: float
) -> dict[Any, Any]:
    steps = float(np.mean([seam(draw[0], truth[0], hidden) for draw in draws]))
    row = {"scan_id": scan["scan_id"], "subject_id": scan["subject_id"], "method": method}
    judged = completion.judged(truth[0], draws[:, 0], hidden)
    return row | {"hidden_voxels": int(hidden.sum()), "known_latents": known, "seam": steps} | judged


def _volumes(
    study: Study,
    instrument: Predictors,
    scans: pd.DataFrame,
    kinds: dict[str, list[np.ndarray]],
    options_: dict[str, Any],
) -> list[dict[str, Any]]:
    """How far what is measured in an image is from what is measured without the lesion."""
    numbers = [name for name, declared in study.covariates.items() if isinstance(declared, ContinuousCovariate)]
    measured = {
        kind: {name: v for name, v in instrument.measure(np.stack(stack)).items() if name in numbers}
        for kind, stack in kinds.items()
    }
    found = completion.volumes_after(measured, "true")
    for column in ("scan_id", "subject_id"):
        found[column] = scans[column].to_numpy()[found["row"]]
    units = {name: study.covariates[name].unit for name in numbers}  # type: ignore[union-attr]
    return completion.volume_figures(unseen(with_split(found, scans)), units, **options_)


def _write_images(
    study: Study, out: Path, scan: dict[Any, Any], facts: pd.Series, hidden: np.ndarray, made: Inpainted, *, own: bool
) -> None:
    """On the scan's own grid; voxels that were not hidden are those of the scan itself, where it was not changed."""
    source = derivative.Source(scan["scan_id"], scan["path"], study.release.suffix)
    grey = float(facts["percentile_high"] - facts["percentile_low"])
    said = {"HiddenVoxels": int(hidden.sum()), "KnownLatents": made.known, "Samples": len(made.drawn)}
    said |= {"SkullStripped": study.release.skull_stripped, "GreyValueRange": grey}
    covered, affine = restore(hidden.astype(np.uint8), facts, kind="mask")
    derivative.write_image(out, source, "hidden", covered, affine, said)
    colour = study.preprocess.colour
    scan_itself = read_image(Path(scan["path"]), colour=colour).array.astype(np.float32) if own else None
    for name, image in (("inpainted", made.drawn[0]), ("inpaintedMean", made.drawn.mean(0))):
        restored, affine = restore(image, facts)
        if scan_itself is not None and scan_itself.shape == restored.shape:
            restored = pasted(scan_itself, restored, covered > 0)
        derivative.write_image(out, source, name, restored, affine, said)
    if len(made.drawn) > 1:
        spread, affine = restore_difference(made.drawn.std(axis=0, ddof=1), facts)
        derivative.write_image(out, source, "inpaintedStd", spread, affine, said)
