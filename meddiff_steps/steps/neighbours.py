"""Step `neighbours`: the released images that are most like training scans, beside these; for the owner of the cohort
alone.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from safetensors import safe_open

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.config import load_stage
from meddiff_steps.core.files import read_json, write_atomic
from meddiff_steps.core.registries import DETECTORS
from meddiff_steps.imaging.selection import none_accepted
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.provenance.record import checkout
from meddiff_steps.report import pictures
from meddiff_steps.report.page import Section, render
from meddiff_steps.steps import options

log = logging.getLogger(__name__)

#: Pairs shown per detector.
PAIRS = 6


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    plan: options.Plan,
    filtered: options.Filtered,
    decisions: Annotated[Path, typer.Option(help="privacy/decisions.parquet")],
    reference: options.Reference,
    calibration: options.Calibration,
    out: Annotated[Path, typer.Option(help="page to write (HTML); private: it shows training scans")],
) -> None:
    """Show, for every detector, the accepted images nearest to the training set, so that the owner can judge by eye
    what the filter let pass.
    """
    study = load_stage(config, "neighbours")
    card, real, made = read_json(calibration), Shards(images), Shards(filtered)
    with safe_open(reference, framework="numpy") as tensors:
        rows = tensors.get_tensor("rows")  # and not the directions, which may be gigabytes
    ids = real.column("scan_id")
    names = [str(ids[row]) for row in rows]
    table = pd.read_parquet(decisions)
    accepted = table[(table["decision"] == "accepted") & table["sample_id"].isin(made.column("sample_id"))]
    if accepted.empty:
        raise none_accepted(decisions, "show")
    planned, scans = pd.read_parquet(plan), read_manifest(manifest, study.covariates)
    sections = []
    for name in card["detectors"]:
        first = accepted.nlargest(PAIRS, f"similarity_{name}", keep="all").sort_values(
            [f"similarity_{name}", "sample_id"], ascending=[False, True]
        )[:PAIRS]
        nearest = [names[int(i)] for i in first[f"nearest_{name}"]]
        pairs = pd.DataFrame(
            {"sample_id": first["sample_id"], "similarity": first[f"similarity_{name}"], "scan_id": nearest}
        )
        shown = pictures.neighbours(
            pairs, (card.get("thresholds") or {}).get(name), made, real, planned, scans, study.covariates
        )
        sections.append(Section(name, f"By the detector {name}", text=[meaning(name)], pictures=[shown]))
    page = render(
        title=f"{study.title or study.study}: nearest training scans",
        study=f"Study {study.study}",
        lead=(
            "Private. This page shows training scans with their ids beside the synthetic images most like them. It is"
            " for those who may see the cohort, no part of the release, and who was nearest to whom is itself something"
            " that an attacker would like to know."
        ),
        simulated=study.cohort.source == "simulated",
        sections=sections,
        code=checkout(),
    )
    write_atomic(out, page)
    log.info("%s: %d pairs for each of %d detectors", out, min(PAIRS, len(accepted)), len(sections))


def meaning(detector: str) -> str:
    """What a detector compares, in words; nothing of one that this version does not have."""
    return DETECTORS.entry(detector)["summary"] if detector in DETECTORS.names() else ""
