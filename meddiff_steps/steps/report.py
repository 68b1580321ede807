"""Step `report`: report.html, the page a person looks at first, and its contact sheet as a picture."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pandas as pd
import pyarrow as pa
import typer

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.config import Study, load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json, write_atomic
from meddiff_steps.core.folders import CARD
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.provenance.record import checkout
from meddiff_steps.release.facts import with_base
from meddiff_steps.report import names, pictures, sections
from meddiff_steps.report.page import Section, render
from meddiff_steps.report.sentences import sentences
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
    pairs, called = pictures.matched_pairs(real, synthetic, scans, planned, study), names.of(study.covariates)
    simulated = study.cohort.source == "simulated" or bool(card.get("simulated"))
    judged = read_json(privacy) if privacy else None
    used, opened = (
        (read_json(downstream / "results.json"), read_json(downstream / "test-opened.json"))
        if downstream
        else (None, None)
    )
    nearby = downstream / "neighbours.json" if downstream else None
    averaged = read_json(nearby) if nearby and nearby.exists() else None
    stages = {"autoencoder": autoencoder, "drawing decoder": decoder, "diffusion model": diffusion}
    folders = {name: folder for name, folder in stages.items() if folder}
    quality = _parquet(qc)
    cards = {name: with_base(read_json(folder / CARD), study.init_from) for name, folder in folders.items()}
    exposed = sections.privacy_section(judged, called)
    exposed = replace(exposed, text=[*exposed.text, *sections.given_weights(cards)])
    if judged and teacher:
        first = read_json(teacher / "privacy/report.json"), read_json(teacher / "evaluation/metrics.json")
        beside = sections.second_model_section([first[0], judged], [first[1], measured], called)
        exposed = replace(exposed, parts=[beside])
    seen = [Section("images", "Real beside synthetic", pictures=[pictures.gallery(pairs, study)])]
    if study.pairs is not None:
        maps = pictures.label_maps(synthetic, planned, study.pairs.structures)
        seen.append(Section("label-maps", "Synthetic images with their label maps", pictures=[maps]))
    if study.spatial_dims == 3:
        seen.append(Section("slices", "Slice by slice", viewer=pictures.slices(pairs)))
    sweeps = pictures.showcase(Shards([evaluation / "showcase.arrow"]), study)
    seen.append(Section("sweeps", "One subject, one covariate moved", pictures=sweeps))
    released = planned.loc[planned["sample_id"].isin(synthetic.column("sample_id"))]
    made = sections.making_section(
        sections.data_section(quality, scans, released, study, called),
        sections.reconstruction_section(
            Shards([(decoder or autoencoder) / "reconstructions.arrow"]), measured["reconstruction"]
        ),
        {name: _parquet(folder / "history.parquet") for name, folder in folders.items()},
        {
            "Cohort": card,
            **{name.capitalize(): made for name, made in cards.items()},
            "Predictors that measure covariates": measured["predictors"],
            "Counts": measured["n"],
            "Preprocessing": study.preprocess.model_dump(mode="json"),
        },
    )
    page = render(
        title=study.title or study.study,
        study=f"Study {study.study}",
        lead=sections.lead(measured["n"], simulated),
        simulated=simulated,
        sentences=sentences(
            measured,
            judged,
            used,
            opened,
            called,
            simulated=simulated,
            grid=_grid(study),
            scans_left_out=int((quality["status"] != "ok").sum()),
        ),
        sections=[
            Section("pictures", "Pictures", parts=seen),
            sections.looks_section(measured, _parquet(evaluation / "components.parquet")),
            sections.fidelity_section(measured, _parquet(evaluation / "predictions.parquet"), called),
            exposed,
            sections.downstream_section(used, opened, called, averaged),
            made,
        ],
        code=checkout(),
    )
    write_atomic(contact_sheet, pictures.contact_sheet(pairs, study).png)
    write_atomic(out, page)
    logger.info("%s: %.1f MB", out, len(page) / 1e6)


def _grid(study: Study) -> str:
    """Size of an image, as people write it."""
    shape, spacing = study.preprocess.shape, study.preprocess.voxel_mm
    size = "x".join(map(str, shape)) + (" voxels" if len(shape) == 3 else " pixels")
    if spacing is None:
        return size
    mm = "x".join(f"{side:g}" for side in (spacing if len(set(spacing)) > 1 else spacing[:1]))
    return f"{size} of {mm} mm"


def _parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable table ({error}). Run the step that writes it again.") from None
