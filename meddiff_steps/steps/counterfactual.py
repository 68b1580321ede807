"""Step `counterfactual`: real scans with one covariate moved, on their own grids, as a BIDS derivative."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from safetensors.numpy import load_file

from meddiff_steps.applications import derivative
from meddiff_steps.applications.counterfactual import Counterfactuals, counterfactuals
from meddiff_steps.applications.guides import image_guides, latent_guides
from meddiff_steps.applications.interpolation import interpolate
from meddiff_steps.applications.scans import chosen_scans, sweep, unseen, with_split
from meddiff_steps.cohort.learnt import shown
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import CategoricalCovariate, Study, load_stage
from meddiff_steps.core.files import atomic_path, write_atomic, write_json
from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.diffusion.guidance import Guidance
from meddiff_steps.evaluation import counterfactual as measuring
from meddiff_steps.imaging.restoration import restore, restore_difference
from meddiff_steps.imaging.selection import Images
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.instruments.embedder import load_embedder
from meddiff_steps.instruments.predictors import load_predictors
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.report.application_figures import counterfactual_sheet, interpolation_sheet
from meddiff_steps.steps import options

log = logging.getLogger(__name__)

#: Validation scans at most that say how unsure a network of the user's is.
MOST_HELD_OUT = 64

README = """# Counterfactuals

Each image was made by a generative model from a real person's scan, with one covariate moved. They show real people:
handle them as the scans themselves. What they show is what the model learnt about a population. It is no prognosis.

Per scan, on the scan's own grid: `desc-returned` is what the model makes of the scan with nothing moved,
`desc-COVARIATEVALUE` the scan with the covariate at a value, `desc-...Difference` the second less the first, in the
scan's grey values. Differences no larger than `NoiseOfReturn` in the sidecar mean nothing: so much does the model
change for no reason. figures.json says whether the covariate followed and the rest stayed; measurements.parquet has
every image.
"""


def run(
    config: options.Config,
    manifest: options.Manifest,
    qc: options.Quality,
    images: options.Images,
    autoencoder: options.Autoencoder,
    diffusion: options.Diffusion,
    embedder: options.Embedder,
    predictors: options.Predictors,
    out: Annotated[Path, typer.Option(help="folder to write: a BIDS derivative dataset, figures.json, pictures")],
    decoder: options.Decoder = None,
    latents: Annotated[
        list[Path] | None, typer.Option(help="latent shards of the cohort, which classifier guidance learns from")
    ] = None,
    scale: Annotated[Path | None, typer.Option(help="latents/scale.safetensors, which goes with them")] = None,
    threads: options.Threads = 1,
) -> None:
    """Move one covariate of real scans, and measure whether it follows and the rest stays."""
    study = load_stage(config, "counterfactual")
    settings = study.counterfactual
    cohort = Images.of_scans(images, manifest, study.covariates)
    training = cohort.of_splits(["train"])
    values = sweep(settings, study.covariates, training.table)
    scans = chosen_scans(cohort.table, settings.scans, settings.most_scans)
    real = cohort.shards.tensors("image", scans["row"].to_numpy())
    fabric = make_fabric(study.compute, threads)
    model = TrainedModel.load(autoencoder, diffusion, fabric, study.compute, decoder=decoder, toned=False)
    guides: Sequence[tuple[Guidance, ...]] | None = None
    if settings.predictor is not None:
        held_out = cohort.of_splits(["val"]).table[:MOST_HELD_OUT]
        shown = cohort.shards.tensors("image", held_out["row"].to_numpy())
        declared = study.covariates[settings.moved]
        guides = image_guides(settings, values, declared, model, shown, held_out[settings.moved])
    elif settings.classifier_guidance and latents and scale:
        guides = latent_guides(settings, values, training, Shards(latents), load_file(scale), model.encoding)
    keys = [seed_key(f"{study.seed}/counterfactual/{name}", 0, 0, "decoder") for name in scans["scan_id"]]
    made = counterfactuals(model, real, scans, values, settings, guides, keys if model.draws else None)

    shutil.rmtree(out, ignore_errors=True)
    instrument = load_predictors(predictors)
    moved = str(settings.covariate)
    kinds = {"scan": real, "decoded": made.decoded, "returned": made.returned, "moved": made.moved}
    rows = measuring.measure(scans, kinds, values, moved, study.covariates, instrument, load_embedder(embedder))
    rows = with_split(rows, scans)
    new = unseen(rows)
    figures: dict[str, Any] = {"moved": {}, "others": {}}
    if len(new):
        figures = measuring.figures(new, moved, study.covariates, resamples=study.evaluate.bootstrap, seed=study.seed)
    facts: dict[str, Any] = {"covariate": moved, "values": values, "scans": scans["scan_id"].tolist()}
    facts |= {"settings": settings.model_dump(mode="json"), "model": model.digests}
    with atomic_path(out / "measurements.parquet") as path:
        rows.astype({"requested": str}).to_parquet(path, index=False)
    write_json(out / "figures.json", facts | figures)
    _write_images(study, out, scans, pd.read_parquet(qc).set_index("scan_id"), real, made, values)
    names, captions = scans["scan_id"].tolist(), _captions(study, values)
    write_atomic(
        out / "contact-sheet.png", counterfactual_sheet(names, real, made.decoded, made.returned, made.moved, captions)
    )
    if settings.interpolation_steps and len(scans) > 1:
        shares = np.linspace(0, 1, settings.interpolation_steps).tolist()
        paths = [
            interpolate(
                model, real[i : i + 2], scans.iloc[i : i + 2], shares, settings, keys[i] if model.draws else None
            )
            for i in range(len(scans) - 1)
        ]
        write_atomic(out / "interpolations.png", interpolation_sheet(names, paths, shares))
    derivative.complete(out, f"Counterfactuals: {settings.covariate} moved", README, model.digests)
    log.info("%s: %s of %d scans moved to %s; %s", out, settings.covariate, len(scans), values, figures["moved"])


def _captions(study: Study, values: list[Any]) -> list[str]:
    declared = study.covariates[str(study.counterfactual.covariate)]
    if isinstance(declared, CategoricalCovariate):
        return [str(value) for value in values]
    return [f"{text} {declared.unit}" for text in shown(values)]


def _write_images(
    study: Study,
    out: Path,
    scans: pd.DataFrame,
    quality: pd.DataFrame,
    real: np.ndarray,
    made: Counterfactuals,
    values: list[Any],
) -> None:
    covariate = str(study.counterfactual.covariate)
    for i, scan in enumerate(scans.to_dict("records")):
        source, facts = (
            derivative.Source(scan["scan_id"], scan["path"], study.release.suffix),
            quality.loc[scan["scan_id"]],
        )
        noise = float((made.returned[i] - real[i])[real[i] > 0].std())
        grey = float(facts["percentile_high"] - facts["percentile_low"])
        common = {"Covariate": covariate, "OwnValue": _plain(scan[covariate]), "NoiseOfReturn": noise * grey}
        common |= {"SkullStripped": study.release.skull_stripped}
        derivative.write_image(out, source, "returned", *restore(made.returned[i], facts), facts=common)
        for value, image in zip(values, made.moved[i], strict=True):
            name, said = derivative.label(covariate, value), common | {"Value": value}
            derivative.write_image(out, source, name, *restore(image, facts), facts=said)
            change = restore_difference(image - made.returned[i], facts)
            derivative.write_image(out, source, f"{name}Difference", *change, facts=said)


def _plain(value: Any) -> Any:
    return None if pd.isna(value) else value if isinstance(value, str) else float(value)
