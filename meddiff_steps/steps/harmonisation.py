"""Step `harmonisation`: scans of some sites as another shows them, as a BIDS derivative."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer

from meddiff_steps.applications import derivative
from meddiff_steps.applications.harmonisation import GreyValues, sides, training_scans
from meddiff_steps.applications.scans import LEARNT_FROM, chosen_scans, unseen, with_split
from meddiff_steps.applications.unpaired import Translator
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import Study, load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path, write_atomic, write_json
from meddiff_steps.evaluation import harmonisation as judging
from meddiff_steps.imaging.restoration import restore
from meddiff_steps.imaging.selection import Images
from meddiff_steps.instruments.feature_spaces.radiomics import radiomic_features
from meddiff_steps.report.application_figures import completion_sheet
from meddiff_steps.steps import options

log = logging.getLogger(__name__)

README = """# Harmonisation

Scans of some sites, drawn by a generative model as another site would show them. The scans are of real people: handle
what was made of them as the scans themselves. Nobody was scanned twice to learn this from: what the model took for the
look of a site can be something that its people have. It is no finding.

Per scan, on its own grid: `desc-harmonised` is the mean of all draws. figures.json says how well the site can be told
before and after, and whether covariates and anatomy are kept, beside grey values matched by quantiles and by mean and
spread, and ComBat on measured features; measurements.parquet has every scan and way.
"""

#: Ways of which images are compared, those together that are made together; `none` is the scan as it is.
STAGES = (("none",), ("z_score",), ("histogram",), ("guess",), ("draw", "mean_of_draws"))
WAYS = tuple(way for ways in STAGES for way in ways)


def run(
    config: options.Config,
    manifest: options.Manifest,
    qc: options.Quality,
    images: options.Images,
    model: Annotated[Path, typer.Option(help="folder that `harmonisation_model` wrote")],
    out: Annotated[Path, typer.Option(help="folder to write: a BIDS derivative dataset, figures.json, pictures")],
    threads: options.Threads = 1,
) -> None:
    """Take test scans to the look of another site, and measure what is left of the site, of covariates and anatomy."""
    study = load_stage(config, "harmonisation")
    settings = study.harmonisation
    cohort = Images.of_scans(images, manifest)
    here, there = sides(settings, cohort.table)
    table = cohort.table.assign(there=there)[here | there].reset_index(drop=True)
    train = training_scans(replace(cohort, table=table), settings.most_scans)
    test = chosen_scans(table, settings.scans, settings.most_scans, "harmonisation")
    new = (~test["split"].isin(LEARNT_FROM)).to_numpy(dtype=bool)
    asked = test[new].reset_index(drop=True)
    for side, expected in (("there", True), ("others", False)):
        if not (asked["there"] == expected).any():
            raise UserError(
                f"harmonisation.{'to' if expected else 'others'}: no scan of these sites is among the {len(asked)} that"
                f" are asked about and were not learnt from ({side}). Enlarge splits.test, or raise"
                " harmonisation.most_scans."
            )
    quality = pd.read_parquet(qc).set_index("scan_id")
    fabric = make_fabric(study.compute, threads)
    channel = [settings.channel]
    root = f"{study.seed}/harmonisation"
    translator = Translator.load(model, channel, channel, root, fabric, "harmonisation.channel")

    plain = cohort.shards.tensors(settings.channel, train["row"].to_numpy())
    moved_in_train = ~train["there"].to_numpy(dtype=bool)
    reference = GreyValues.of(plain[~moved_in_train])
    moved_in_test = ~test["there"].to_numpy(dtype=bool)
    scans = cohort.shards.tensors(settings.channel, test["row"].to_numpy())
    found: dict[str, np.ndarray] = {}
    for ways in STAGES:
        found |= _ways(ways, scans, moved_in_test, test["scan_id"].tolist(), reference, translator, settings.samples)
    log.info("%d scans, of which %d were taken to %s", len(test), moved_in_test.sum(), settings.to)

    names = settings.kept or [name for name in study.covariates if name != settings.covariate]
    covariates = {name: study.covariates[name] for name in names}
    chosen: dict[str, Any] = {"resamples": study.evaluate.bootstrap, "seed": study.seed}
    tables = (train, asked)
    as_scanned = judging.scanner(plain, train)
    methods = []
    for ways in STAGES:  # one after the other: of training scans there are many
        learnt = _ways(ways, plain, moved_in_train, train["scan_id"].tolist(), reference, translator, settings.samples)
        for way in ways:
            judged = judging.told(learnt.pop(way), found[way][new], tables, covariates, as_scanned, **chosen)
            methods.append({"method": way} | judged)
        log.info("%s: %d training scans, done", " and ".join(ways), len(train))
    moved = np.flatnonzero(~test["there"].to_numpy(dtype=bool))
    rows = pd.DataFrame(
        [
            {"scan_id": test["scan_id"][i], "subject_id": test["subject_id"][i], "method": way}
            | judging.kept(found["none"][i], found[way][i])
            for way in WAYS[1:]
            for i in moved
            if (found["none"][i] > 0).any()
        ]
    )
    rows = with_split(rows, test)
    left = judging.anatomy(unseen(rows), **chosen)
    for entry in methods:
        entry["anatomy"] = left.get(str(entry["method"]), {})
    learnt_from, read_of = (radiomic_features(torch.from_numpy(each)).numpy() for each in (plain, found["none"][new]))

    shutil.rmtree(out, ignore_errors=True)
    for i in moved[: settings.most_images]:
        _write_image(study, out, test.iloc[i], quality, found["mean_of_draws"][i])
    facts: dict[str, Any] = {
        "scans": test["scan_id"].tolist(),
        "subjects": {str(k): int(v) for k, v in asked.groupby("there")["subject_id"].nunique().items()},
        "settings": settings.model_dump(mode="json"),
        "model": translator.digest,
        "methods": methods,
        "features": judging.features_told(learnt_from, read_of, tables, covariates, **chosen),
    }
    with atomic_path(out / "measurements.parquet") as path:
        rows.to_parquet(path, index=False)
    write_json(out / "figures.json", facts)
    shown = [(str(test["scan_id"][i]), [found[way][i] for way in WAYS]) for i in moved[:6]]
    shown += [(f"{test['scan_id'][i]}, as it is", [found["none"][i]]) for i in _some(test["there"])]
    captions = ["scan", *(way.replace("_", " ") for way in WAYS[1:])]
    write_atomic(out / "contact-sheet.png", completion_sheet("Harmonisation", _even(shown, len(WAYS)), captions))
    derivative.complete(out, "Harmonisation", README, {"model": translator.digest}, "harmonisation")
    log.info("%s: %d scans", out, len(moved))


def _ways(
    ways: tuple[str, ...],
    plain: np.ndarray,
    moved: np.ndarray,
    scans: list[str],
    reference: GreyValues,
    translator: Translator,
    samples: int,
) -> dict[str, np.ndarray]:
    """Images (n, 1, *spatial) after each way of one of `STAGES`; curves of grey values touch all, networks those that
    are moved.
    """
    if ways == ("none",):
        return {"none": plain}
    found = {way: plain.copy() for way in ways}
    for i, image in enumerate(plain):
        head = image > 0
        if ways == ("z_score",):
            found["z_score"][i] = reference.scaled(image)
        elif ways == ("histogram",):
            found["histogram"][i] = reference.matched(image)
        elif moved[i] and ways == ("guess",):
            found["guess"][i] = translator.guess(plain[i : i + 1])[0] * head
        elif moved[i]:
            draws = translator.draws(plain[i : i + 1], [scans[i]], samples)[0]
            found["draw"][i], found["mean_of_draws"][i] = draws[0] * head, draws.mean(0) * head
    return found


def _some(there: pd.Series) -> np.ndarray:
    return np.flatnonzero(there.to_numpy(dtype=bool))[:2]


def _even(lines: list[tuple[str, list[np.ndarray]]], width: int) -> list[tuple[str, list[np.ndarray]]]:
    """Lines of as many images, empty ones behind."""
    return [(name, images + [np.zeros_like(images[0])] * (width - len(images))) for name, images in lines]


def _write_image(study: Study, out: Path, scan: pd.Series, quality: pd.DataFrame, image: np.ndarray) -> None:
    settings, facts = study.harmonisation, quality.loc[scan["scan_id"]]
    source = derivative.Source(scan["scan_id"], scan["path"], study.release.suffix)
    channel = None if settings.channel == "image" else settings.channel
    said = {"Samples": settings.samples, "From": str(scan[str(settings.covariate)]), "To": settings.to}
    derivative.write_image(out, source, "harmonised", *restore(image, facts, channel=channel), said)
