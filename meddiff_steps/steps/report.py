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
from meddiff_steps.report import pictures, sections
from meddiff_steps.report.page import Card, Section, render

logger = logging.getLogger(__name__)


def run(
    config: Annotated[Path, typer.Option(help="Frozen config of stage `report`.")],
    cohort_card: Annotated[Path, typer.Option(help="Card of the cohort (JSON).")],
    qc: Annotated[Path, typer.Option(help="preprocessed/qc.parquet.")],
    manifest: Annotated[Path, typer.Option(help="cohort/manifest.parquet.")],
    images: Annotated[list[Path], typer.Option(help="Preprocessed shard; repeat for every shard.")],
    generated: Annotated[list[Path], typer.Option(help="Generated shard; repeat for every shard.")],
    plan: Annotated[Path, typer.Option(help="plan.parquet.")],
    autoencoder_card: Annotated[Path, typer.Option(help="autoencoder/card.json.")],
    autoencoder_history: Annotated[Path, typer.Option(help="Training history of the autoencoder (.parquet).")],
    diffusion_card: Annotated[Path, typer.Option(help="diffusion/card.json.")],
    diffusion_history: Annotated[Path, typer.Option(help="Training history of the diffusion model (.parquet).")],
    reconstructions: Annotated[Path, typer.Option(help="Held-out images beside their reconstructions (.arrow).")],
    showcase: Annotated[Path, typer.Option(help="Sweeps and interpolations (.arrow).")],
    metrics: Annotated[Path, typer.Option(help="evaluation/metrics.json.")],
    predictions: Annotated[Path, typer.Option(help="Requested or true beside measured covariates (.parquet).")],
    out: Annotated[Path, typer.Option(help="Page to write (.html).")],
    contact_sheet: Annotated[Path, typer.Option(help="Picture of real beside synthetic images to write (.png).")],
    privacy: Annotated[
        Path | None, typer.Option(help="privacy/report.json; left out of the page if not given.")
    ] = None,
    components: Annotated[
        Path | None,
        typer.Option(help="evaluation/components.parquet; the picture of features is left out if not given."),
    ] = None,
    teacher_privacy: Annotated[
        Path | None, typer.Option(help="The same of the first model, where a second made the release.")
    ] = None,
    teacher_metrics: Annotated[Path | None, typer.Option(help="Its metrics.")] = None,
    augmentation: Annotated[
        Path | None, typer.Option(help="augmentation/results.json; left out of the page if not given.")
    ] = None,
    opened: Annotated[Path | None, typer.Option(help="augmentation/test-opened.json, which goes with it.")] = None,
) -> None:
    """Write report.html, one self-contained page, and its contact sheet as a PNG.

    The page shows real scans: handle it as the cohort itself.
    """
    study = load_stage(config, "report")
    measured, card = read_json(metrics), read_json(cohort_card)
    scans, planned = read_manifest(manifest, study.covariates), _parquet(plan)
    real, synthetic = Shards(images), Shards(generated)
    pairs = pictures.matched_pairs(real, synthetic, scans, planned, study)
    sheet = pictures.contact_sheet(pairs, study)
    simulated = study.cohort.source == "simulated" or bool(card.get("simulated"))
    contents = [Section("images", "Real beside synthetic", pictures=[sheet])]
    if study.spatial_dims == 3:
        contents.append(Section("slices", "Slice by slice", viewer=pictures.slices(pairs)))
    contents += [
        Section("sweeps", "One subject, one covariate moved", pictures=pictures.showcase(Shards([showcase]), study)),
        sections.fidelity_section(measured, _parquet(predictions)),
        sections.realism_section(measured, _parquet(components) if components else None),
    ]
    if privacy:
        judged = read_json(privacy)
        contents.append(sections.privacy_section(judged))
        if teacher_privacy and teacher_metrics:
            contents.append(
                sections.distillation_section(
                    [read_json(teacher_privacy), judged], [read_json(teacher_metrics), measured]
                )
            )
    if augmentation and opened:
        contents.append(sections.augmentation_section(read_json(augmentation), read_json(opened)))
    histories = {"autoencoder": _parquet(autoencoder_history), "diffusion model": _parquet(diffusion_history)}
    cards = [
        Card("Cohort", card),
        Card("Autoencoder", read_json(autoencoder_card)),
        Card("Diffusion model", read_json(diffusion_card)),
        Card("Predictors that measure covariates", measured["predictors"]),
        Card("Counts", measured["n"]),
        Card("Preprocessing", study.preprocess.model_dump(mode="json")),
    ]
    contents += [
        sections.sharpness_section(measured["spectrum"]),
        sections.reconstruction_section(Shards([reconstructions]), measured["reconstruction"]),
        Section("training", "Training", pictures=pictures.histories(histories)),
        sections.data_section(
            _parquet(qc), scans, planned.loc[planned["sample_id"].isin(synthetic.column("sample_id"))], study
        ),
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
