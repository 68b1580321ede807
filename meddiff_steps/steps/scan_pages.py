"""Step `scan_pages`: all preprocessed scans on pages, the oddest first, for a person to keep or exclude."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from tqdm import tqdm

from meddiff_steps.cohort.decisions import read_decisions
from meddiff_steps.config import load_stage
from meddiff_steps.core.files import write_atomic
from meddiff_steps.imaging.registration import load_template, template_on_grid
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.report.scan_pages import COUNTED, PER_PAGE, TEMPLATE, card, in_order, measures, render, thumbnail
from meddiff_steps.steps import options

log = logging.getLogger(__name__)


def run(
    config: options.Config,
    qc: options.Quality,
    images: options.Images,
    out: Annotated[Path, typer.Option(help="first page to write (HTML), the others beside it; private: scans")],
    template: options.Template = None,
    exclude: options.Exclude = None,
) -> None:
    """Draw every scan as it was preprocessed, with its measures, the oddest first.

    The pages show real scans: handle them as the cohort itself.
    """
    study = load_stage(config, "scan_pages")
    quality, shards = pd.read_parquet(qc), Shards(images)
    decisions = {} if exclude is None else read_decisions(exclude, quality["scan_id"].tolist())
    rows = {name: row for row, name in enumerate(shards.column("scan_id"))}
    head, outlines = None, [("what counts of the scan", COUNTED)]
    if study.preprocess.registration is not None and study.preprocess.voxel_mm is not None:
        found = load_template(study.preprocess.registration.template)
        head = template_on_grid(found, study.preprocess.shape, study.preprocess.voxel_mm)
        outlines.append((f"the template {found.name}", TEMPLATE))
    table, names = in_order(quality), list(map(str, measures(quality)))
    firsts = range(0, max(1, len(table)), PER_PAGE)
    pages = [out.name, *(f"page-{number:03d}.html" for number in range(2, len(firsts) + 1))]
    for number, first in enumerate(tqdm(firsts, desc="scan_pages", unit="page", mininterval=5, file=sys.stderr)):
        cards = []
        for row in table.iloc[first : first + PER_PAGE].to_dict("records"):
            at = rows.get(row["scan_id"])
            jpeg = None if at is None else thumbnail(shards.tensor("image", at), head)
            cards.append(card(row, names, jpeg, decisions.get(row["scan_id"])))
        page = render(
            cards,
            title=study.study,
            simulated=study.cohort.source == "simulated",
            page=number,
            pages=pages,
            scans=len(table),
            decisions=decisions,
            outlines=outlines,
        )
        write_atomic(out.parent / pages[number], page)
    log.info("%s: %d scans on %d pages; private, they show the cohort", out, len(table), len(pages))
