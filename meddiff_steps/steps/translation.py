"""Step `translation`: another contrast of real scans, drawn from those that there are, as a BIDS derivative."""

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
from meddiff_steps.applications.image_to_image import Drawer
from meddiff_steps.applications.scans import chosen_scans
from meddiff_steps.applications.translation import (
    UNPAIRED,
    PatchRegression,
    head,
    translated,
    without_a_network,
    without_pairs,
)
from meddiff_steps.applications.unpaired import Translator
from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import Study, load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path, write_atomic, write_json
from meddiff_steps.core.folders import NETWORK
from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation import completion
from meddiff_steps.evaluation.segmentation import lesion_dice
from meddiff_steps.imaging.restoration import restore, restore_difference
from meddiff_steps.imaging.selection import Images
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.image_to_image import ImageToImage, load_image_to_image
from meddiff_steps.report.application_figures import completion_sheet
from meddiff_steps.steps import options

log = logging.getLogger(__name__)

README = """# Translation

What is shown here was not measured by any scanner: it was drawn by a generative model from other contrasts of the same
person. The scans are of real people: handle what was made of them as the scans themselves. What the other contrasts do
not show can be missing here, and what is here need not be there. It is no finding.

Per scan, on its own grid: `desc-CONTRAST` is the mean of all draws, `desc-CONTRASTDraw` the first draw,
`desc-CONTRASTStd` the standard deviation of draws. figures.json says how near they came to the true contrast of
held-out scans, beside copies, a linear regression and the same network without noise; measurements.parquet has every
scan and way.
"""


def run(
    config: options.Config,
    manifest: options.Manifest,
    qc: options.Quality,
    images: options.Images,
    model: Annotated[Path, typer.Option(help="folder that `translation_model` wrote")],
    out: Annotated[Path, typer.Option(help="folder to write: a BIDS derivative dataset, figures.json, pictures")],
    lesion: Annotated[
        Path | None, typer.Option(help="folder of what finds lesions; left out where the study names none")
    ] = None,
    unpaired: Annotated[
        Path | None, typer.Option(help="folder that `translation_unpaired` wrote; left out where the study has none")
    ] = None,
    threads: options.Threads = 1,
) -> None:
    """Draw another contrast of held-out scans, and measure how near it comes to the true one."""
    study = load_stage(config, "translation")
    settings = study.translation
    cohort = Images.of(Shards(images), "scan_id", "subject_id", read_manifest(manifest), f"{manifest}")
    scans = chosen_scans(cohort.table, settings.scans, settings.most_scans, "translation")
    quality = pd.read_parquet(qc).set_index("scan_id")
    fabric = make_fabric(study.compute, threads)
    root = f"{study.seed}/translation"
    drawer = Drawer.load(model, cohort.shards, settings, root, fabric, "translation")
    pairs, digests = drawer.pairs, dict(drawer.digests)
    simple = PatchRegression.of(pairs, cohort.of_splits(["train"]).rows, philox(study.seed, "patches"))
    finder = None
    if lesion is not None:
        finder, card = load_image_to_image(lesion, *NETWORK)
        digests["lesion"] = card["weights_sha256"]
        fabric.to_device(finder)
    translator = None
    if unpaired is not None:
        translator = Translator.load(unpaired, pairs.source, pairs.target, f"{root}/unpaired", fabric, "translation")
        digests["unpaired"] = translator.digest

    shutil.rmtree(out, ignore_errors=True)
    rows: list[dict[str, Any]] = []
    shown: list[Any] = []
    for scan in scans.to_dict("records"):
        row = int(scan["row"])
        truth, sources = pairs.truths([row])[0], pairs.sources([row])[0]
        region = head(sources) & (truth > 0).any(0)
        if not region.any():
            log.warning("%s: its target is empty, it is left out", scan["scan_id"])
            continue
        ways = without_a_network(pairs, simple, row) | translated(drawer, row, scan["scan_id"])
        if translator is not None:
            ways |= without_pairs(translator, sources, scan["scan_id"], settings.samples)
        marks = None if finder is None else cohort.shards.tensor(str(settings.lesion), row)[0]
        for name, draws in {**ways, **({} if finder is None else {"truth": truth[None]})}.items():
            found = {"scan_id": scan["scan_id"], "subject_id": scan["subject_id"], "method": name}
            if name != "truth":
                each = [completion.judged(truth[c], draws[:, c], region) for c in range(len(truth))]
                found |= {key: float(np.mean([one[key] for one in each])) for key in each[0]}
                found["texture"] = float(np.mean([completion.texture(truth, draw, region) for draw in draws]))
            if finder is not None and marks is not None:
                found |= lesion_dice(marks, [_found(finder, draw) for draw in draws])
            rows.append(found)
        if len(shown) < settings.most_images:
            shown.append((scan["scan_id"], truth, sources, ways))
            _write_images(study, out, scan, quality.loc[scan["scan_id"]], ways["draws"])
        log.info("%s: done", scan["scan_id"])

    if not rows:
        raise UserError(
            f"translation: the target is empty in all of {len(scans)} scans, so there is nothing to compare with. Name"
            " scans that have it (translation.scans)."
        )
    table = pd.DataFrame(rows)
    facts: dict[str, Any] = {"scans": scans["scan_id"].tolist(), "settings": settings.model_dump(mode="json")}
    facts |= {"model": digests, "nominal_coverage": completion.nominal_coverage(settings.samples)}
    chosen: dict[str, Any] = {"resamples": study.evaluate.bootstrap, "seed": study.seed}
    copies = [f"copy_of_{name}" for name in pairs.source]
    images_ = table[table["method"] != "truth"].drop(columns=[c for c in table if str(c).startswith("lesion")])
    facts["methods"] = completion.figures(images_, ["method"], [*copies, "patches"], **chosen)
    if finder is not None:
        facts["lesion"] = completion.figures_where_known(table, "lesion_dice", **chosen)
    with atomic_path(out / "measurements.parquet") as path:
        table.to_parquet(path, index=False)
    write_json(out / "figures.json", facts)
    columns = [*pairs.source, "true", "patches", "without noise", "mean of draws", "draw 1", "draw 2"]
    columns += [] if translator is None else ["unpaired: guess", "mean", "draw 1"]
    write_atomic(out / "contact-sheet.png", completion_sheet("Translation", _tiles(shown), columns))
    derivative.complete(out, "Translation", README, digests, "translation")
    log.info("%s: %d scans", out, len(scans))


@torch.no_grad()
def _found(finder: ImageToImage, image: np.ndarray) -> np.ndarray:
    """Where the finder sees a lesion in an image (targets, *spatial), bool (*spatial)."""
    device = next(finder.parameters()).device
    found: np.ndarray = finder.guess(torch.from_numpy(image)[None].to(device))[0, 0].cpu().numpy() > 0
    return found


def _tiles(
    shown: list[tuple[str, np.ndarray, np.ndarray, dict[str, np.ndarray]]],
) -> list[tuple[str, list[np.ndarray]]]:
    return [
        (
            name,
            [
                *(image[None] for image in sources),
                truth[:1],
                *(ways[way][0, :1] for way in ("patches", "regression", "mean_of_draws")),
                *(draw[:1] for draw in ways["draws"][:2]),
                *(ways[way][0, :1] for way in UNPAIRED if way in ways),
            ],
        )
        for name, truth, sources, ways in shown[:6]
    ]


def _write_images(study: Study, out: Path, scan: dict[Any, Any], facts: pd.Series, draws: np.ndarray) -> None:
    """On the scan's own grid, in the grey values of the contrast where the scan has it, else of the scan itself."""
    source = derivative.Source(scan["scan_id"], scan["path"], study.release.suffix)
    about = {"Samples": len(draws), "Source": list(study.translation.source)}
    for c, name in enumerate(study.translation.target):
        label = derivative.label(name, "")
        channel = None if name == "image" else name
        mean, std = draws[:, c].mean(0), draws[:, c].std(0, ddof=1)
        derivative.write_image(out, source, label, *restore(mean, facts, channel=channel), about)
        derivative.write_image(out, source, f"{label}Draw", *restore(draws[0, c], facts, channel=channel), about)
        derivative.write_image(out, source, f"{label}Std", *restore_difference(std, facts, channel=channel), about)
