"""Step `report`: report.html, the page a person looks at first, and its contact sheet as a picture."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import typer

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.config import CategoricalCovariate, Covariates, Study, load_stage
from meddiff_steps.errors import UserError
from meddiff_steps.files import write_atomic
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.report import figures
from meddiff_steps.report.page import (
    Card,
    Picture,
    Section,
    augmentation_section,
    band_table,
    correlation_table,
    covariate_table,
    distillation_section,
    distribution_table,
    extrapolation_table,
    fidelity_table,
    headlines,
    number,
    privacy_section,
    quality_control,
    quality_table,
    realism_table,
    render,
    subgroup_table,
)
from meddiff_steps.report.viewer import Viewer, viewer

logger = logging.getLogger(__name__)

#: Pairs of a real scan and the synthetic image with the most similar request on the contact sheet (3D and 2D).
PAIRS = {3: 6, 2: 12}
#: Reconstructions searched for the shown ones (worst, middle, best tenth).
SEARCHED = 200


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
    privacy: Annotated[Path | None, typer.Option(help="privacy/report.json; left out of the page if not given.")] = None,
    components: Annotated[Path | None, typer.Option(help="evaluation/components.parquet; the picture of features is left out if not given.")] = None,
    teacher_privacy: Annotated[Path | None, typer.Option(help="The same of the first model, where a second made the release.")] = None,
    teacher_metrics: Annotated[Path | None, typer.Option(help="Its metrics.")] = None,
    augmentation: Annotated[Path | None, typer.Option(help="augmentation/results.json; left out of the page if not given.")] = None,
    opened: Annotated[Path | None, typer.Option(help="augmentation/test-opened.json, which goes with it.")] = None,
) -> None:
    """Write report.html, one self-contained page, and its contact sheet as a PNG.

    The page shows real scans: handle it as the cohort itself.
    """
    study = load_stage(config, "report")
    measured = _json(metrics)
    card = _json(cohort_card)
    scans, planned = read_manifest(manifest, study.covariates), _parquet(plan)
    table = _parquet(predictions)
    real, synthetic = Shards(images), Shards(generated)

    pairs = _pairs(real, synthetic, scans, planned, study)
    sheet = _contact_sheet(pairs, study)
    simulated = study.cohort.source == "simulated" or bool(card.get("simulated"))
    counts = measured["n"]
    real_word = "simulated" if simulated else "real"
    lead = (
        f"A diffusion model learnt from {number(counts['training_scans'])} {real_word} images of {number(counts['training_subjects'])} subjects and then made "
        f"{number(counts['generated'])} synthetic ones. Every figure of quality is measured on subjects it never saw, or on the synthetic images."
    )
    checks, left_out = quality_control(_parquet(qc))
    sections = [
        Section("images", "Real beside synthetic", pictures=[sheet]),
        *([Section("slices", "Slice by slice", viewer=_viewer(pairs))] if study.spatial_dims == 3 else []),
        Section("sweeps", "One subject, one covariate moved", pictures=_showcase_pictures(Shards([showcase]), study)),
        Section(
            "fidelity",
            "Do the images show what was asked for?",
            text=_fidelity_text(measured),
            pictures=_fidelity_pictures(table, measured["covariates"]),
            tables=[
                table
                for table in (
                    fidelity_table(measured["covariates"]),
                    extrapolation_table(measured["covariates"], measured["training_range"]),
                    correlation_table(measured["correlations"]),
                    distribution_table(measured["distributions"]),
                    subgroup_table(measured["subgroups"]),
                )
                if table.rows
            ],
        ),
        Section(
            "realism",
            "Are they like real ones, and as various?",
            text=_realism_text(measured),
            pictures=_realism_pictures(_parquet(components), measured["realism"]) if components else [],
            tables=[realism_table(measured)],
        ),
        *([privacy_section(_json(privacy))] if privacy else []),
        *(
            [distillation_section([_json(teacher_privacy), _json(privacy)], [_json(teacher_metrics), measured])]
            if privacy and teacher_privacy and teacher_metrics
            else []
        ),
        *([augmentation_section(_json(augmentation), _json(opened))] if augmentation and opened else []),
        Section(
            "sharpness",
            "How sharp are they?",
            text=["Blur removes power at high spatial frequencies; noise and checkerboards add it. 100 % is what real images have."],
            pictures=[
                Picture(
                    figures.spectra(measured["spectrum"]),
                    "Radially averaged power spectra of real, synthetic and reconstructed images, and their ratios over spatial frequency.",
                    "Left: power of held-out real, synthetic and reconstructed images (Hann-windowed). Right: ratio to real. Dotted: the bands.",
                )
            ],
            tables=[band_table(measured["spectrum"])],
        ),
        Section(
            "reconstruction",
            "What the autoencoder keeps",
            pictures=[_reconstruction_picture(Shards([reconstructions]))],
            tables=[quality_table(measured["reconstruction"])],
        ),
        Section("training", "Training", pictures=_history_pictures({"autoencoder": autoencoder_history, "diffusion model": diffusion_history})),
        Section(
            "data",
            "The data",
            text=checks,
            tables=[covariate_table(scans, planned.loc[planned["sample_id"].isin(synthetic.column("sample_id"))], study.covariates), *left_out],
        ),
        Section(
            "cards",
            "Cards",
            cards=[
                Card("Cohort", card),
                Card("Autoencoder", _json(autoencoder_card)),
                Card("Diffusion model", _json(diffusion_card)),
                Card("Predictors that measure covariates", measured["predictors"]),
                Card("Counts", counts),
                Card("Preprocessing", study.preprocess.model_dump(mode="json")),
            ],
        ),
    ]
    page = render(
        title=study.title or study.study, study=f"Study {study.study}", lead=lead, simulated=simulated, headline=headlines(measured), sections=sections
    )
    write_atomic(contact_sheet, sheet.png)
    write_atomic(out, page)
    logger.info("%s: %.1f MB", out, len(page) / 1e6)


# --------------------------------------------------------------------------------------------------- inputs


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}). Run the step that writes it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}. Run the step that writes it again.")
    return content


def _parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable table ({error}). Run the step that writes it again.") from None


# -------------------------------------------------------------------------------------------------- pictures


def _facts(row: pd.Series, covariates: Covariates) -> list[str]:
    """Covariates of one image; labels with their name, numbers with their unit."""
    facts = []
    for name, covariate in covariates.items():
        value = row[name]
        if pd.isna(value):
            facts.append(f"{name} –")
        else:
            facts.append(f"{name} {value}" if isinstance(covariate, CategoricalCovariate) else f"{name} {_short(float(value))} {covariate.unit}")
    return facts


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value.is_integer() else f"{value:.3g}"


def _coordinates(table: pd.DataFrame, covariates: Covariates, reference: pd.DataFrame) -> np.ndarray:
    """Covariates on comparable scales, (rows, dimensions): standard deviations for numbers, 2 between labels, 0 where missing."""
    columns = []
    for name, covariate in covariates.items():
        if isinstance(covariate, CategoricalCovariate):
            columns += [np.sqrt(2.0) * (table[name] == level).to_numpy(dtype=float) for level in covariate.levels]
        else:
            known = reference[name].astype(float)
            spread = float(known.std()) or 1.0
            columns.append(((table[name].astype(float) - known.mean()) / spread).fillna(0.0).to_numpy())
    return np.stack(columns, axis=1)


#: Facts about an image, and the image.
Shown = tuple[list[str], np.ndarray]


def _pairs(real: Shards, synthetic: Shards, scans: pd.DataFrame, planned: pd.DataFrame, study: Study) -> list[tuple[Shown, Shown]]:
    """Held-out scans spread evenly over the first covariate's order, each with the synthetic image whose request is closest, and their covariates."""
    held = _rows(real, "scan_id", scans[scans["split"] == "test"])
    made = _rows(synthetic, "sample_id", planned)
    if held.empty or made.empty:
        raise UserError("report: there are no preprocessed test scans or no planned synthetic images to show. Check splits and the plan.")
    places, requests = (_coordinates(t, study.covariates, scans) for t in (held, made))
    order = np.lexsort((held["scan_id"].to_numpy(dtype=str), places[:, 0]))
    shown = order[np.unique(np.linspace(0, len(order) - 1, min(PAIRS[study.spatial_dims], len(order), len(made))).round().astype(int))]
    free = np.ones(len(made), dtype=bool)
    pairs = []
    for i in shown:
        partner = int(np.where(free, np.square(requests - places[i]).sum(1), np.inf).argmin())
        free[partner] = False
        one, other = (
            (_facts(table.iloc[at], study.covariates), shards.tensor("image", int(table["row"].iloc[at])))
            for shards, table, at in ((real, held, i), (synthetic, made, partner))
        )
        pairs.append((one, other))
    return pairs


def _contact_sheet(pairs: list[tuple[Shown, Shown]], study: Study) -> Picture:
    """All pairs as one picture."""
    spatial_dims = study.spatial_dims
    columns, width = (2, 92) if spatial_dims == 3 else (6, 26)
    tiles = [[figures.Tile(image, figures.wrapped(facts, width)) for facts, image in side] for side in zip(*pairs, strict=True)]
    kind = "Simulated, held out" if study.cohort.source == "simulated" else "Real, held out"
    if spatial_dims == 3:  # pairs side by side
        blocks = [figures.Block("", [tile for pair in zip(*tiles, strict=True) for tile in pair], columns)]
        title = f"Left: {kind.lower()}. Right: synthetic, with the covariates that were requested"
    else:
        blocks = [
            figures.Block(kind, tiles[0], columns, figures.REAL),
            figures.Block("Synthetic, with the covariates that were requested", tiles[1], columns, figures.SYNTHETIC),
        ]
        title = ""
    how = (
        "Axial, coronal and sagittal middle slices, radiological convention (the subject's right is on the left; in sagittal slices, anterior). "
        if spatial_dims == 3
        else ""
    )
    return Picture(
        figures.image_grid(blocks, title=title),
        f"{len(pairs)} held-out {kind.split(',')[0].lower()} images beside {len(pairs)} synthetic ones, each with its covariates.",
        f"{how}Grey values 0 to 1, bicubic. Each held-out scan stands beside the synthetic image whose request is closest; none was picked by eye.",
    )


def _viewer(pairs: list[tuple[Shown, Shown]]) -> Viewer:
    """The first, middle and last pair."""
    chosen = [pairs[i] for i in sorted({0, len(pairs) // 2, len(pairs) - 1})]
    groups = [[(f"{kind}: {', '.join(facts)}", image) for kind, (facts, image) in zip(("Held out", "Synthetic"), pair, strict=True)] for pair in chosen]
    return viewer(
        groups,
        "Move the sliders, or click or drag in a slice: all planes of both volumes follow. Good: the same structures in the same places, as sharp "
        "in every plane. Bad: texture that breaks off from slice to slice, or haze outside the head. Radiological convention, 8 grey bits.",
    )


def _rows(shards: Shards, key: str, table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `table` that have an image, with its shard row."""
    ids = shards.column(key)
    return pd.DataFrame({key: ids, "row": range(len(ids))}).merge(table, on=key, how="inner")


def _showcase_pictures(shards: Shards, study: Study) -> list[Picture]:
    """A picture per sweep and one of interpolations."""
    table = pd.DataFrame({c: shards.column(c) for c in ("panel", "row", "position", "label")}).reset_index(names="at")
    views = ("axial", "coronal")
    pictures = []
    for panel in dict.fromkeys(table["panel"]):
        rows = []
        for _, part in table[table["panel"] == panel].groupby("row", sort=True):
            ordered = part.sort_values("position", kind="stable")
            rows.append([figures.Tile(shards.tensor("image", at), figures.plain(label)) for at, label in zip(ordered["at"], ordered["label"], strict=True)])
        if panel.startswith("sweep:"):
            name = panel.removeprefix("sweep:")
            covariate = study.covariates.get(name)
            unit = f" ({covariate.unit})" if covariate is not None and not isinstance(covariate, CategoricalCovariate) else ""
            caption = f"{name}{unit} moved while noise and all other covariates stay. Right: last minus first image, red is brighter."
            pictures.append(Picture(figures.strip(rows, difference=True, views=views), f"Synthetic images of {len(rows)} subjects as {name} changes.", caption))
        else:
            caption = "From one synthetic subject to another: noise and covariates change together."
            picture = figures.strip(rows, difference=False, views=views, row_name="pair")
            pictures.append(Picture(picture, f"{panel}: synthetic images between pairs of subjects.", caption))
    return pictures


def _fidelity_text(measured: dict[str, Any]) -> list[str]:
    counts = measured["n"]
    instrument = (
        "Predictors that learnt from real training scans alone measure each covariate in the synthetic images, and in held-out real scans for comparison "
        f"({number(counts['held_out_scans'])} scans, split {', '.join(counts['held_out_splits'])}). Points on the dashed line are what was asked for."
    )
    skipped = measured["predictors"]["skipped"]
    return [instrument, *(f"Not measured: {name}, because {reason}." for name, reason in skipped.items())]


def _fidelity_pictures(predictions: pd.DataFrame, metrics: dict[str, Any]) -> list[Picture]:
    if not metrics or predictions.empty:
        return []
    alt = f"Requested against measured {', '.join(metrics)}, synthetic images over held-out real scans."
    caption = "Orange: synthetic, requested against measured. Grey: held-out real scans, true against measured: the predictor's own error. Bars: quartiles."
    return [Picture(figures.scatter(predictions, metrics), alt, caption)]


def _realism_text(measured: dict[str, Any]) -> list[str]:
    spaces = measured["realism"]
    named = "; ".join(f"{name} ({entry['description']}, digest {entry['digest']})" for name, entry in spaces.items())
    text = [
        f"Images are compared as rows of features, in several spaces: {named}. Figures of different spaces cannot be compared, nor can published ones; "
        "what counts is how far a figure is from that of as many real training scans in place of the synthetic images (real against real).",
        "An AUC near 1 means that a simple classifier tells synthetic from real, by whatever little differs; precision falls when images look like no "
        "real one, recall and coverage when kinds of real images are missing. Copies of training scans would score perfectly: see the section on privacy.",
    ]
    return text + [f"{name}: not measured, {entry['skipped']}." for name, entry in spaces.items() if "skipped" in entry]


def _realism_pictures(places: pd.DataFrame, spaces: dict[str, Any]) -> list[Picture]:
    if places.empty:
        return []
    caption = (
        "Each point is an image, along the two directions in which real training scans vary most. Good: orange crosses mix with grey circles and spread as "
        "far. Bad: crosses beside the circles (not real), in a clump (not various), or missing where circles are (a kind of image is left out). "
        "Two directions show only a part of what differs; the table is about all of them."
    )
    alt = f"Synthetic and held-out real images in the feature spaces {', '.join(spaces)}, principal components 1 and 2."
    return [Picture(figures.feature_spaces(places, spaces), alt, caption)]


def _reconstruction_picture(shards: Shards) -> Picture:
    """Three held-out images at the 10th, 50th and 90th percentile of reconstruction error."""
    split = np.array(shards.column("split"))
    rows = np.flatnonzero(split == "test") if (split == "test").any() else np.arange(len(shards))
    if len(rows) == 0:
        raise UserError("report: the reconstructions hold no image. Run the step that writes them again.")
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(SEARCHED, len(rows))).round().astype(int))]
    errors = np.array([np.mean(np.square(shards.tensor("image", r).astype(np.float64) - shards.tensor("reconstruction", r))) for r in map(int, rows)])
    order = rows[np.argsort(errors, kind="stable")]
    ids, shown = shards.column("scan_id"), []
    for share, words in ((0.1, "better than most"), (0.5, "typical"), (0.9, "worse than most")):
        row = int(order[round(share * (len(order) - 1))])
        error = float(errors[np.flatnonzero(rows == row)[0]])
        label = f"{words}: {ids[row]}, {10 * np.log10(1 / max(error, 1e-10)):.1f} dB"
        shown.append((figures.plain(label), shards.tensor("image", row), shards.tensor("reconstruction", row)))
    return Picture(
        figures.reconstruction_grid(shown),
        "Held-out images, their reconstructions by the autoencoder, and the differences.",
        "Held-out images at the 10th, 50th and 90th percentile of reconstruction error. Difference: reconstruction minus image, red is brighter.",
    )


def _history_pictures(histories: dict[str, Path]) -> list[Picture]:
    pictures = []
    for name, path in histories.items():
        history = _parquet(path)
        if not history.empty:
            pictures.append(Picture(figures.loss_curves(history), f"Training curves of the {name}.", f"Training of the {name}, by step."))
    return pictures
