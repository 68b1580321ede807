"""Step `report`: report.html, the page a person looks at first, and its contact sheet as a picture."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import pandas as pd
import pyarrow as pa
import typer

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json, write_atomic
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.weights import CARD
from meddiff_steps.report import pictures, sections
from meddiff_steps.report.page import Card, Section, render
from meddiff_steps.steps import options

logger = logging.getLogger(__name__)


def run(
    config: options.Config,
    cohort: options.Cohort,
    qc: options.Quality,
    images: options.Images,
    plan: options.Plan,
    generated: options.Filtered,
    autoencoder: Annotated[
        Path, typer.Option(help="folder autoencoder/: card.json, history.parquet, reconstructions.arrow")
    ],
    diffusion: Annotated[Path, typer.Option(help="folder of the released model: card.json, history.parquet")],
    evaluation: Annotated[
        Path,
        typer.Option(help="folder evaluation/: metrics.json, predictions.parquet, components.parquet, showcase.arrow"),
    ],
    out: Annotated[Path, typer.Option(help="page to write (HTML)")],
    contact_sheet: Annotated[Path, typer.Option(help="picture of real beside synthetic images to write (PNG)")],
    decoder: Annotated[
        Path | None,
        typer.Option(
            help="folder decoder/: card.json, history.parquet, reconstructions.arrow; left out if there is none"
        ),
    ] = None,
    privacy: Annotated[Path | None, typer.Option(help="privacy/report.json; left out of the page if not given")] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="folder of the first model, where a second made the release: privacy/report.json and"
            " evaluation/metrics.json"
        ),
    ] = None,
    downstream: Annotated[
        Path | None,
        typer.Option(help="folder of the downstream study: results.json and test-opened.json; left out if not given"),
    ] = None,
) -> None:
    """Write report.html, one self-contained page, and its contact sheet as a PNG.

    The page shows real scans: handle it as the cohort itself.
    """
    study = load_stage(config, "report")
    measured, card = read_json(evaluation / "metrics.json"), read_json(cohort / CARD)
    scans, planned = read_manifest(cohort / "manifest.parquet", study.covariates), _parquet(plan)
    real, synthetic = Shards(images), Shards(generated)
    pairs = pictures.matched_pairs(real, synthetic, scans, planned, study)
    sheet = pictures.contact_sheet(pairs, study)
    simulated = study.cohort.source == "simulated" or bool(card.get("simulated"))
    contents = [Section("images", "Real beside synthetic", pictures=[sheet])]
    if study.spatial_dims == 3:
        contents.append(Section("slices", "Slice by slice", viewer=pictures.slices(pairs)))
    sweeps = pictures.showcase(Shards([evaluation / "showcase.arrow"]), study)
    contents += [
        Section("sweeps", "One subject, one covariate moved", pictures=sweeps),
        sections.fidelity_section(measured, _parquet(evaluation / "predictions.parquet")),
        sections.realism_section(measured, _parquet(evaluation / "components.parquet")),
        sections.discriminability_section(measured["discriminability"]),
        sections.sanity_section(measured["sanity"]),
    ]
    if privacy:
        judged = read_json(privacy)
        contents.append(sections.privacy_section(judged))
        if teacher:
            first = read_json(teacher / "privacy/report.json"), read_json(teacher / "evaluation/metrics.json")
            contents.append(sections.second_model_section([first[0], judged], [first[1], measured]))
    if downstream:
        results, opened = read_json(downstream / "results.json"), read_json(downstream / "test-opened.json")
        contents.append(sections.downstream_section(results, opened))
    stages = {"autoencoder": autoencoder, "drawing decoder": decoder, "diffusion model": diffusion}
    folders = {name: folder for name, folder in stages.items() if folder}
    cards = [
        Card("Cohort", card),
        *(Card(name.capitalize(), read_json(folder / CARD)) for name, folder in folders.items()),
        Card("Predictors that measure covariates", measured["predictors"]),
        Card("Counts", measured["n"]),
        Card("Preprocessing", study.preprocess.model_dump(mode="json")),
    ]
    curves = {name: _parquet(folder / "history.parquet") for name, folder in folders.items()}
    pairs_of_scans = Shards([(decoder or autoencoder) / "reconstructions.arrow"])
    released = planned.loc[planned["sample_id"].isin(synthetic.column("sample_id"))]
    contents += [
        sections.sharpness_section(measured["spectrum"]),
        sections.reconstruction_section(pairs_of_scans, measured["reconstruction"]),
        Section("training", "Training", pictures=pictures.histories(curves)),
        sections.data_section(_parquet(qc), scans, released, study),
        Section("cards", "Cards", cards=cards),
    ]
    page = render(
        title=study.title or study.study,
        study=f"Study {study.study}",
        lead=sections.lead(measured["n"], simulated),
        simulated=simulated,
        headline=sections.headlines(measured),
        sections=contents,
    )
    write_atomic(contact_sheet, sheet.png)
    write_atomic(out, page)
    logger.info("%s: %.1f MB", out, len(page) / 1e6)


def _parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable table ({error}). Run the step that writes it again.") from None
