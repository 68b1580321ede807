"""Step `release`: the images become a dataset."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from meddiff_steps.cohort.manifest import counts, read_manifest, usable
from meddiff_steps.config import BidsSource, Study, load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json
from meddiff_steps.core.folders import CARD, MANIFEST
from meddiff_steps.release.dataset import Story, complete_dataset
from meddiff_steps.release.facts import facts_of, with_base
from meddiff_steps.steps import options

logger = logging.getLogger(__name__)


def run(
    config: options.Config,
    released: options.Released,
    privacy: options.Privacy,
    images: options.ImageTables,
    cohort: options.Cohort,
    autoencoder: options.Autoencoder,
    diffusion: options.Diffusion,
    out: Annotated[Path, typer.Option(help="dataset_description.json in the root folder of the release.")],
    decoder: options.Decoder = None,
    masks: options.Masks = None,
    qc: options.KeptBy = None,
    metrics: Annotated[
        Path | None, typer.Option(help="evaluation/metrics.json; without, README says that nothing was measured.")
    ] = None,
) -> None:
    """Complete the released dataset: participants, description, sidecar, README (its card), licence.

    Refuses a release in which a planned subject has no image, or an image is not planned.
    """
    if out.name != "dataset_description.json":
        raise UserError(
            f"--out {out}: expected a path that ends in dataset_description.json. Its folder is the dataset."
        )
    study = load_stage(config, "describe")
    cards = {
        "autoencoder": read_json(autoencoder / CARD),
        **({"drawing decoder": read_json(decoder / CARD)} if decoder else {}),
        "diffusion model": read_json(diffusion / CARD),
    }
    if masks:
        cards |= {
            f"{name} of label maps": read_json(masks / folder / CARD)
            for name, folder in (("autoencoder", "autoencoder"), ("diffusion model", "diffusion"))
        }
    cards = {name: with_base(card, study.init_from) for name, card in cards.items()}
    learnt_from = read_json(cohort / CARD)
    if qc is not None:
        scans = usable(read_manifest(cohort / Path(MANIFEST).name), pd.read_parquet(qc))
        learnt_from |= counts(scans) | {"learnt_from": counts(scans[scans["split"] == "train"])}
    told = facts_of(learnt_from, read_json(privacy), cards, read_json(metrics) if metrics else None)
    story = Story.of(study, told, _sources(study))
    tables = pd.concat([pd.read_parquet(path) for path in images], ignore_index=True)
    complete_dataset(out.parent, pd.read_parquet(released), tables, story)
    logger.info("%s: %d synthetic subjects", out.parent, len(tables))


def _sources(study: Study) -> list[dict[str, str]]:
    """What the source cohort says about its own address: DOI or URL, never a path of this machine."""
    if not isinstance(study.cohort, BidsSource):
        return []
    try:
        described = json.loads((Path(study.cohort.root) / "dataset_description.json").read_text(encoding="utf-8-sig"))
        if isinstance(described.get("DatasetDOI"), str):
            return [{"DOI": described["DatasetDOI"]}]
        entries = [
            {key: str(entry[key]) for key in ("DOI", "URL", "Version") if key in entry}
            for entry in described.get("SourceDatasets", [])
        ]
    except (OSError, ValueError, AttributeError, TypeError):  # optional information, written by others
        return []
    return [entry for entry in entries if "DOI" in entry or entry.get("URL", "").startswith("http")]
