"""Step `translation_unpaired`: networks between contrasts that never see two of one subject."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import philox
from meddiff_steps.imaging.domains import Domain, halves
from meddiff_steps.imaging.pairs import Pairs
from meddiff_steps.imaging.selection import Images
from meddiff_steps.models.unpaired import Side
from meddiff_steps.steps import options
from meddiff_steps.training.checkpoints import state_key
from meddiff_steps.training.unpaired import train_unpaired


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    out: Annotated[Path, typer.Option(help="folder to write: weights, card, training curve")],
    state: options.State,
    threads: options.Threads = 1,
) -> None:
    """Train networks from one contrast to another and back: sources of one half of the training subjects, targets of
    the other.
    """
    study = load_stage(config, "translation_unpaired")
    settings, key = study.translation, "translation.unpaired"
    if settings.unpaired is None:
        raise UserError(f"{key}: not set, so nothing is trained without pairs. Set it to {{}} for defaults.")
    cohort = Images.of_scans(images, manifest)
    groups: dict[Side, Domain] = {}
    split = {}
    for name in ("train", "val"):
        of = cohort.of_splits([name])
        several = len(np.unique(of.units)) > 1
        parts = halves(of.rows, of.units, philox(study.seed, f"unpaired|{name}")) if several else (of.rows, of.rows[:0])
        split[name] = dict(zip(("a", "b"), parts, strict=True))
    for side, columns, what in (("a", settings.source, "source"), ("b", settings.target, "target")):
        rows = split["train"][side]
        other = settings.target if side == "a" else settings.source
        kind = Pairs.of(cohort.shards, other, columns, rows, "translation").kind
        if kind != "contrast":
            raise UserError(f"translation.{what}: {columns[0]} is of kind {kind}, expected a contrast.")
        groups["a" if side == "a" else "b"] = Domain(key, cohort.shards, tuple(columns), rows, split["val"][side])
    fabric = make_fabric(study.compute, threads)
    found = state / state_key("translation_unpaired", config, [manifest, *images])
    root = f"{study.seed}/translation"
    train_unpaired(groups, settings.unpaired, study.variants, study.compute, root, fabric, found, out)
