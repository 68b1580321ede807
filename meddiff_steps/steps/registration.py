"""Step `registration`: scans of several people brought onto each other, wholly and in part; as a BIDS derivative."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer

from meddiff_steps.applications import derivative
from meddiff_steps.applications.registration import Deformed, deform, known_deformation
from meddiff_steps.applications.scans import chosen_scans
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import Study, load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path, write_atomic, write_json
from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation import registration as judging
from meddiff_steps.imaging import pairwise
from meddiff_steps.imaging.channels import filled_in
from meddiff_steps.imaging.deformation import moved, moved_labels
from meddiff_steps.imaging.label_maps import labels_on_grid, read_labels
from meddiff_steps.imaging.reading import ScanError
from meddiff_steps.imaging.restoration import restore
from meddiff_steps.imaging.selection import Images
from meddiff_steps.models.deformation import RegistrationNetwork, load_registration_network
from meddiff_steps.report.application_figures import registration_sheet
from meddiff_steps.steps import options

log = logging.getLogger(__name__)

README = """# Registration

Each scan was brought onto the scan of another person by a network. The images show real people: handle them as the
scans themselves.

On the grid of the fixed scan: `desc-...registered` is the moving scan, brought wholly onto it (`from` in its sidecar),
`desc-...partN` a share of the way of N percent, `desc-...labels` the moving scan's label map, where it has one.
figures.json says how well structures come to lie on each other, beside other ways; measurements.parquet has every pair.
"""

#: What a way is given, (fixed, moving) as float32 (1, *spatial), and what it finds, a displacement (3, *spatial).
Way = Callable[[np.ndarray, np.ndarray], np.ndarray]


def run(
    config: options.Config,
    manifest: options.Manifest,
    qc: options.Quality,
    images: options.Images,
    score: Annotated[Path, typer.Option(help="folder registration_networks/score: the network that tells noise")],
    plain: Annotated[Path, typer.Option(help="folder registration_networks/plain: the plain network")],
    out: Annotated[Path, typer.Option(help="folder to write: a BIDS derivative dataset, figures.json, pictures")],
    threads: options.Threads = 1,
) -> None:
    """Bring test scans onto each other in several ways, and measure how well they come to lie."""
    study = load_stage(config, "registration")
    settings = study.registration
    cohort = Images.of_scans(images, manifest)
    one_each = cohort.table.sort_values("scan_id").drop_duplicates("subject_id")
    scans = chosen_scans(one_each, [], settings.pairs, "registration")
    if len(scans) < 2:
        raise UserError(
            f"registration.pairs: test scans of {len(scans)} person, a pair needs 2. Ask for more, or enlarge splits."
        )
    if len(scans) < settings.pairs:
        log.warning(
            "registration.pairs: %d were asked for, there are %d, one for each person with a test scan",
            settings.pairs,
            len(scans),
        )
    real = cohort.shards.tensors("image", scans["row"].to_numpy())
    quality = pd.read_parquet(qc).set_index("scan_id")
    voxel_mm = study.preprocess.voxel_mm
    if voxel_mm is None:
        raise UserError("registration: the study has pictures, and volumes are registered. Leave the section out.")
    labels = _labels(study, scans, quality, real.shape[2:])
    fabric = make_fabric(study.compute, threads)
    networks: dict[str, RegistrationNetwork] = {}
    cards: dict[str, dict[str, Any]] = {}
    for name, folder in (("score", score), ("plain", plain)):
        networks[name], cards[name] = load_registration_network(folder)
        fabric.to_device(networks[name])

    ways: dict[str, Way] = {
        "none": lambda fixed, moving: np.zeros((3, *fixed.shape[1:]), np.float32),
        "affine": lambda fixed, moving: pairwise.affine(fixed[0], moving[0]),
        "demons": lambda fixed, moving: pairwise.demons(fixed[0], moving[0]),
        "plain": lambda fixed, moving: deform(networks["plain"], moving, fixed)[0].displacement,
        "score": lambda fixed, moving: deform(networks["score"], moving, fixed)[0].displacement,
    }
    shutil.rmtree(out, ignore_errors=True)
    rows: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    oracle: list[dict[str, Any]] = []
    shown: list[tuple[str, list[np.ndarray]]] = []
    people = scans.to_dict("records")
    for i, moving in enumerate(people):
        target = (i + 1) % len(people)
        fixed, pair = people[target], {"fixed": people[target]["scan_id"], "moving": moving["scan_id"]}
        judge = partial(_judged, study, real[i], real[target], labels.get(i), labels.get(target))
        found = {}
        for name, way in ways.items():
            begun = time.perf_counter()
            found[name] = way(real[target], real[i])
            seconds = time.perf_counter() - begun
            rows.append(pair | {"method": name, "seconds": seconds} | judge(found[name]))
        steps = {name: deform(net, real[i], real[target], settings.shares) for name, net in networks.items()}
        for name, each in steps.items():
            parts += [pair | {"share": one.share, "method": name} | judge(one.displacement) for one in each]
        oracle += _oracle(study, real[target], pair, ways, voxel_mm)
        way_there = [*steps["score"], *deform(networks["score"], real[i], real[target])]
        _write_images(study, out, moving, fixed, quality, way_there, labels.get(i))
        others = [_moved(real[i], found[name]) for name in ("demons", "plain")]
        tiles = [real[i], *(one.image for one in way_there), *others, real[target]]
        shown.append((f"{moving['scan_id']} onto {fixed['scan_id']}", tiles))
        log.info("%s onto %s", moving["scan_id"], fixed["scan_id"])

    table, along, known = pd.DataFrame(rows), pd.DataFrame(parts), pd.DataFrame(oracle)
    drawn: dict[str, Any] = {"resamples": study.evaluate.bootstrap, "seed": study.seed}
    digests = {name: card["weights_sha256"] for name, card in cards.items()}
    facts: dict[str, Any] = {"scans": scans["scan_id"].tolist(), "settings": settings.model_dump(mode="json")}
    facts |= {"model": digests, "parameters": {name: card["parameters"] for name, card in cards.items()}}
    facts |= {"methods": judging.figures(table, ["method"], "plain", **drawn)}
    facts |= {"along": judging.figures(along, ["share", "method"], "plain", **drawn)} if len(along) else {}
    facts |= {"oracle": judging.figures(known, ["method"], "plain", **drawn)}
    everything = [table, along.assign(kind="share"), known.assign(kind="oracle")]
    with atomic_path(out / "measurements.parquet") as path:
        pd.concat([part for part in everything if len(part)]).to_parquet(path, index=False)
    write_json(out / "figures.json", facts)
    captions = ["moving", *(f"{share:.0%}" for share in [*settings.shares, 1.0]), "demons", "plain", "fixed"]
    write_atomic(out / "contact-sheet.png", registration_sheet(shown, captions))
    derivative.complete(out, "Registration", README, digests, "registration")
    log.info("%s: %d pairs", out, len(scans))


def _labels(study: Study, scans: pd.DataFrame, quality: pd.DataFrame, shape: tuple[int, ...]) -> dict[int, np.ndarray]:
    """Label maps on the study's grid, by position; none where the study names none.

    Raises
    ------
    UserError
        No scan has a readable one, or none of the structures is in any.
    """
    pattern = study.registration.labels
    if pattern is None:
        return {}
    found = {}
    for i, scan in enumerate(scans.to_dict("records")):
        path = filled_in(pattern, scan, "registration.labels")
        affine = np.array(json.loads(quality.loc[scan["scan_id"], "target_affine"])).reshape(4, 4)
        try:
            found[i] = labels_on_grid(read_labels(path, "registration.labels"), affine, shape)
        except ScanError as error:
            log.warning("%s is not judged by labels: %s", scan["scan_id"], error)
    if not found:
        raise UserError(f"registration.labels: no test scan has a readable label map; looked for {path} and others.")
    present = np.unique(np.stack(list(found.values())))
    for name, labels in study.registration.structures.items():
        if not np.isin(labels, present).any():
            raise UserError(
                f"registration.structures.{name}: no label map has one of {labels}; they have"
                f" {', '.join(map(str, present[present > 0][:10]))}, ... Correct the labels, or leave it out."
            )
    return found


def _moved(image: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    return moved(torch.from_numpy(image)[None], torch.from_numpy(displacement)[None])[0].numpy()


def _judged(
    study: Study,
    moving: np.ndarray,
    fixed: np.ndarray,
    labels: np.ndarray | None,
    others: np.ndarray | None,
    displacement: np.ndarray,
) -> dict[str, float]:
    head = fixed[0] > 0
    found = {"correlation": float(np.corrcoef(_moved(moving, displacement)[0][head], fixed[0][head])[0, 1])}
    found |= judging.regularity(displacement, head)
    if labels is not None and others is not None:
        found |= judging.overlap(others, moved_labels(labels, displacement), study.registration.structures)
    return found


def _oracle(
    study: Study, fixed: np.ndarray, pair: Mapping[str, str], ways: Mapping[str, Way], voxel_mm: tuple[float, ...]
) -> list[dict[str, Any]]:
    """How far each way is from a known deformation of the fixed scan, mm and voxels, over its head."""
    largest = study.registration.oracle_mm / max(voxel_mm)
    generator = philox(f"{study.seed}/registration/{pair['fixed']}", "oracle")
    away, back = known_deformation(fixed.shape[1:], largest, generator)
    image, head = _moved(fixed, away), fixed[0] > 0
    rows: list[dict[str, Any]] = []
    for name, way in ways.items():
        error = judging.distance(way(fixed, image), back, head, voxel_mm)
        rows.append({**pair, "method": name, "error_mm": error, "error_voxels": error / float(np.mean(voxel_mm))})
    return rows


def _write_images(
    study: Study,
    out: Path,
    moving: Mapping[Any, Any],
    fixed: Mapping[Any, Any],
    quality: pd.DataFrame,
    steps: list[Deformed],
    labels: np.ndarray | None,
) -> None:
    """On the grid of the fixed scan, in the moving scan's grey values."""
    facts, own = quality.loc[fixed["scan_id"]], quality.loc[moving["scan_id"]]
    source = derivative.Source(fixed["scan_id"], fixed["path"], study.release.suffix)
    low, high = float(own["percentile_low"]), float(own["percentile_high"])
    name = "from" + re.sub("[^a-zA-Z0-9]", "", moving["subject_id"])
    said: dict[str, Any] = {"From": moving["scan_id"], "SkullStripped": study.release.skull_stripped}
    for step in steps:
        grey = facts.copy()
        grey["percentile_low"], grey["percentile_high"] = low, high
        image, affine = restore(step.image, grey)
        kind = "registered" if step.share == 1 else f"part{round(100 * step.share)}"
        derivative.write_image(out, source, name + kind, image, affine, said | {"Share": step.share})
    if labels is not None:
        image, affine = restore(moved_labels(labels, steps[-1].displacement), facts, kind="labels")
        derivative.write_image(out, source, f"{name}labels", image, affine, said | {"Share": 1.0})
