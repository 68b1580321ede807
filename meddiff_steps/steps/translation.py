"""Step `translation`: another contrast of real scans, drawn from those that there are, as a BIDS derivative."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer

from meddiff_steps.applications import derivative
from meddiff_steps.applications.image_to_image import Drawer
from meddiff_steps.applications.scans import chosen_scans, unseen, with_split
from meddiff_steps.applications.translation import (
    PatchRegression,
    head,
    several,
    translated,
    without_a_network,
    without_pairs,
)
from meddiff_steps.applications.unpaired import Translator
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import Study, load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path, write_atomic, write_json
from meddiff_steps.core.folders import NETWORK
from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation import completion
from meddiff_steps.evaluation.segmentation import lesion_dice
from meddiff_steps.imaging.pairs import Pairs
from meddiff_steps.imaging.restoration import restore, restore_difference
from meddiff_steps.imaging.selection import Images
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

#: Scans in the contact sheet: the first with a lesion, where lesions are known.
SHOWN = 6
#: What the contact sheet shows beside sources and truth, also where networks look at slices: caption, way, draw.
TILES = {
    "patches": ("patches", 0),
    "without noise": ("regression", 0),
    "mean of draws": ("mean_of_draws", 0),
    "draw 1": ("draws", 0),
    "draw 2": ("draws", 1),
}
VOLUME_TILES = {
    "without noise": ("regression", 0),
    "slice-wise": ("draws", 0),
    "volume-wise": ("volume_draws", 0),
    "3D": ("solid_draws", 0),
}
UNPAIRED_TILES = {
    "unpaired: guess": ("unpaired_guess", 0),
    "unpaired: mean": ("unpaired_mean", 0),
    "unpaired: draw 1": ("unpaired_draws", 0),
}


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
    volume: Annotated[
        Path | None, typer.Option(help="folder of the volume-wise diffusion; left out where the study has none")
    ] = None,
    solid: Annotated[Path | None, typer.Option(help="folder of the 3D diffusion of the same cost")] = None,
    unpaired: Annotated[
        Path | None, typer.Option(help="folder that `translation_unpaired` wrote; left out where the study has none")
    ] = None,
    threads: options.Threads = 1,
) -> None:
    """Draw another contrast of held-out scans, and measure how near it comes to the true one."""
    study = load_stage(config, "translation")
    settings = study.translation
    cohort = Images.of_scans(images, manifest)
    scans = chosen_scans(cohort.table, settings.scans, settings.most_scans, "translation")
    quality = pd.read_parquet(qc).set_index("scan_id")
    fabric = make_fabric(study.compute, threads)
    root = f"{study.seed}/translation"
    drawer = Drawer.load(model, cohort.shards, settings, root, fabric, "translation")
    pairs, digests = drawer.pairs, dict(drawer.digests)
    train, patterns = cohort.of_splits(["train"]).rows, pairs.patterns()
    simple = [
        (present, PatchRegression.of(pairs, train, philox(study.seed, "patches"), present)) for present in patterns
    ]
    others: dict[str, Drawer] = {}
    for name, folder in {"volume": volume, "solid": solid}.items():
        if folder is not None:
            others[name] = drawer.with_other("diffusion", folder, "translation")
            digests[name] = others[name].digests["diffusion"]
    finder = None
    if lesion is not None:
        finder, card = load_image_to_image(lesion, *NETWORK)
        digests["lesion"] = card["weights_sha256"]
        fabric.to_device(finder)
    translator = None
    if unpaired is not None:
        translator = Translator.load(unpaired, pairs.source, pairs.target, f"{root}/unpaired", fabric, "translation")
        digests["unpaired"] = translator.digest

    best_kind = "volume_" if "volume" in others else ""

    shutil.rmtree(out, ignore_errors=True)
    rows: list[dict[str, Any]] = []
    shown: list[Any] = []
    regions: list[np.ndarray] = []
    written: list[str] = []
    for scan in scans.to_dict("records"):
        row = int(scan["row"])
        truth, sources = pairs.truths([row])[0], pairs.sources([row])[0]
        given, known = (one[0] for one in pairs.there([row]))
        marks = None if finder is None else cohort.shards.tensor(str(settings.lesion), row)[0]
        drawn: dict[str, np.ndarray] = {}
        possible = [one for one in simple if not (one[0] & ~given).any()]
        if not possible:
            log.warning("%s: has none of the sources, it is left out", scan["scan_id"])
            continue
        fullest = np.max([present.sum() * pairs.asked(present) for present, _ in possible], axis=0)
        for present, regression in possible:
            best = pairs.asked(present) & (fullest == present.sum())
            ways = without_a_network(pairs, present, regression, row)
            ways |= translated(drawer, row, scan["scan_id"], present)
            for name, other in others.items():
                ways |= several(f"{name}_", other, row, scan["scan_id"], present)
            if translator is not None:
                ways |= without_pairs(translator, sources, scan["scan_id"], settings.samples)
            told = np.where(present.reshape(-1, *[1] * (sources.ndim - 1)), sources, 0)
            drawn |= {pairs.target[c]: ways[f"{best_kind}draws"][:, c] for c in np.flatnonzero(best)}
            for targets, names in _targets(pairs, present, known):
                region = head(sources) & (truth[targets] > 0).any(0)
                if not region.any():
                    log.warning("%s: its target is empty, it is left out", scan["scan_id"])
                    continue
                of_targets = {name: draws[:, targets] for name, draws in ways.items()}
                who = {"scan_id": scan["scan_id"], "subject_id": scan["subject_id"], **names}
                rows += [who | one for one in _judged(truth[targets], of_targets, region, finder, marks)]
                if best[targets].all() and len(written) < settings.most_images:
                    shown.append((scan["scan_id"], truth[targets], told, of_targets))
                    regions.append(region if marks is None else marks > 0)
        if drawn and len(written) < settings.most_images:
            written.append(scan["scan_id"])
            _write_images(study, out, scan, quality.loc[scan["scan_id"]], drawn, settings.source)
        log.info("%s: done", scan["scan_id"])

    if not rows:
        raise UserError(
            f"translation: the target is empty in all of {len(scans)} scans, so there is nothing to compare with. Name"
            " scans that have it (translation.scans)."
        )
    table = with_split(pd.DataFrame(rows), scans)
    facts: dict[str, Any] = {"scans": scans["scan_id"].tolist(), "settings": settings.model_dump(mode="json")}
    facts |= {"model": digests, "nominal_coverage": completion.nominal_coverage(settings.samples)}
    chosen: dict[str, Any] = {"resamples": study.evaluate.bootstrap, "seed": study.seed}
    copies = [f"copy_of_{name}" for name in pairs.source]
    known = unseen(table)
    images_ = known[known["method"] != "truth"].drop(columns=[c for c in known if str(c).startswith("lesion")])
    by = ["present", "target", "method"] if pairs.missing else ["method"]
    facts["methods"] = completion.figures(images_, by, [*copies, "patches"], **chosen)
    if finder is not None:
        facts["lesion"] = completion.figures_where_known(known, "lesion_dice", **chosen)
    with atomic_path(out / "measurements.parquet") as path:
        table.to_parquet(path, index=False)
    write_json(out / "figures.json", facts)
    tiles = {**(VOLUME_TILES if others else TILES), **(UNPAIRED_TILES if translator else {})}
    tiles = {name: tile for name, tile in tiles.items() if all(tile[0] in ways for *_, ways in shown)}
    columns = [*pairs.source, "true", *tiles]
    first = sorted(range(len(shown)), key=lambda i: not regions[i].any())[:SHOWN]
    pictures = _tiles([shown[i] for i in first], tiles)
    write_atomic(
        out / "contact-sheet.png", completion_sheet("Translation", pictures, columns, [regions[i] for i in first])
    )
    derivative.complete(out, "Translation", README, digests, "translation")
    log.info("%s: %d scans", out, len(scans))


def _targets(pairs: Pairs, present: np.ndarray, known: np.ndarray) -> list[tuple[np.ndarray, dict[str, str]]]:
    """Targets that are judged together, and what their rows are called: all, or, where sources may be missing, each
    that is not given and known.
    """
    if not pairs.missing:
        return [(np.arange(len(known)), {})]
    given = "+".join(name for name, one in zip(pairs.source, present, strict=True) if one)
    chosen = np.flatnonzero(pairs.asked(present) & known)
    return [(np.array([c]), {"present": given, "target": pairs.target[c]}) for c in chosen]


def _judged(
    truth: np.ndarray,
    ways: dict[str, np.ndarray],
    region: np.ndarray,
    finder: ImageToImage | None,
    marks: np.ndarray | None,
) -> list[dict[str, Any]]:
    """A row per way (draws, targets, *spatial)."""
    rows = []
    for name, draws in {**ways, **({} if finder is None else {"truth": truth[None]})}.items():
        found: dict[str, Any] = {"method": name}
        if name != "truth":
            each = [completion.judged(truth[c], draws[:, c], region) for c in range(len(truth))]
            found |= {key: float(np.mean([one[key] for one in each])) for key in each[0]}
            found["texture"] = float(np.mean([completion.texture(truth, draw, region) for draw in draws]))
            if region.ndim == 3:  # within slices, and from one to the next
                for key, axes in {"texture_within": (0, 1), "texture_across": (2,)}.items():
                    found[key] = float(np.mean([completion.texture(truth, draw, region, axes) for draw in draws]))
        if finder is not None and marks is not None:
            found |= lesion_dice(marks, [_found(finder, draw) for draw in draws])
        rows.append(found)
    return rows


@torch.no_grad()
def _found(finder: ImageToImage, image: np.ndarray) -> np.ndarray:
    """Where the finder sees a lesion in an image (targets, *spatial), bool (*spatial)."""
    device = next(finder.parameters()).device
    found: np.ndarray = finder.guess(torch.from_numpy(image)[None].to(device))[0, 0].cpu().numpy() > 0
    return found


def _tiles(
    shown: list[tuple[str, np.ndarray, np.ndarray, dict[str, np.ndarray]]], tiles: Mapping[str, tuple[str, int]]
) -> list[tuple[str, list[np.ndarray]]]:
    return [
        (
            name,
            [
                *(image[None] for image in sources),
                truth[:1],
                *(ways[way][number, :1] for way, number in tiles.values()),
            ],
        )
        for name, truth, sources, ways in shown
    ]


def _write_images(
    study: Study, out: Path, scan: dict[Any, Any], facts: pd.Series, drawn: dict[str, np.ndarray], given: Sequence[str]
) -> None:
    """Draws (k, *spatial) by contrast, on the scan's own grid, in the grey values of the contrast where the scan has
    it, else of the scan itself.
    """
    source = derivative.Source(scan["scan_id"], scan["path"], study.release.suffix)
    for name, draws in drawn.items():
        about = {"Samples": len(draws), "Source": [one for one in given if one != name]}
        label = derivative.label(name, "")
        channel = None if pd.isna(facts.get(f"channel_{name}_percentile_low")) else name
        mean, std = draws.mean(0), draws.std(0, ddof=1)
        derivative.write_image(out, source, label, *restore(mean, facts, channel=channel), about)
        derivative.write_image(out, source, f"{label}Draw", *restore(draws[0], facts, channel=channel), about)
        derivative.write_image(out, source, f"{label}Std", *restore_difference(std, facts, channel=channel), about)
