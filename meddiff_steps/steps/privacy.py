"""Step `privacy`: decisions of all shards as one, attacks before and after the filter, and the verdict."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from safetensors.numpy import load_file

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.compute.device import full_float32, make_fabric
from meddiff_steps.config import Rare, Study, load_stage
from meddiff_steps.core.files import atomic_path, read_json, write_json
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.masks import MaskModel
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.privacy import assessment, attacks
from meddiff_steps.privacy.detectors.base import directions
from meddiff_steps.privacy.duplicates import near_duplicates
from meddiff_steps.privacy.label_maps import RealLabelMaps
from meddiff_steps.privacy.reference import ReferenceFiles, load_attackers
from meddiff_steps.privacy.size import batch_size
from meddiff_steps.privacy.table_attacks import table_attacks
from meddiff_steps.steps import options

log = logging.getLogger(__name__)

#: What the losses of scans are computed in, since they are compared to the last digit.
EXACT = {"precision": "32-true", "compile": False}
#: Scans encoded at once, fewer where they are large.
ENCODED = 16


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    plan: options.Plan,
    generated: options.Generated,
    filtered: options.Filtered,
    shard_decisions: Annotated[list[Path], typer.Option(help="decisions of one shard; repeat for all of them")],
    autoencoder: options.Autoencoder,
    diffusion: options.Diffusion,
    scale: options.Scale,
    embedder: options.Embedder,
    reference: options.Reference,
    reference_scans: options.ReferenceScans,
    calibration: options.Calibration,
    decisions: Annotated[Path, typer.Option(help="decision on every candidate to write (Parquet); private")],
    out: Annotated[Path, typer.Option(help="report to write (JSON)")],
    decoder: options.Decoder = None,
    masks: options.Masks = None,
    label_maps: options.LabelMaps = None,
    threads: options.Threads = 1,
) -> None:
    """Attack the cohort before and after the filter, and say whether it may be released."""
    study = load_stage(config, "privacy")
    settings = study.privacy
    fabric = make_fabric(study.compute, threads)
    shards, before, after = Shards(images), Shards(generated), Shards(filtered)
    tensors, card = load_file(reference), read_json(calibration)
    files = ReferenceFiles(reference_scans, autoencoder, scale, embedder)
    scans = read_manifest(manifest).set_index("scan_id").loc[shards.column("scan_id")].reset_index()
    unseen = np.flatnonzero(scans["split"].isin(["calibration", "test"]).to_numpy())
    detectors, of_training = load_attackers(files, tensors, card["detectors"], shards, unseen, card["mirrors"], fabric)

    def split(name: str) -> tuple[np.ndarray, assessment.RealScans]:
        rows = np.flatnonzero((scans["split"] == name).to_numpy())
        known = of_training if name == "train" else directions(detectors, shards, rows)
        return rows, assessment.RealScans(known, scans["subject_id"].to_numpy()[rows])

    (train_rows, train), (_, held), (test_rows, test) = split("train"), split("calibration"), split("test")
    planned = pd.read_parquet(plan)
    planned["subgroup"] = planned[settings.subgroup].astype(str) if settings.subgroup else "all"
    duplicates = near_duplicates(after, planned, settings.duplicate_correlation)
    sets: dict[str, Any] = {}
    rare: dict[str, Any] | None = None
    for label, drawn, left_out in (("before", before, []), ("after", after, duplicates)):
        ids = np.array(drawn.column("sample_id"))
        kept = np.flatnonzero(~np.isin(ids, left_out))
        rows = kept[assessment.sample(ids[kept].tolist())]
        if len(rows) and len(held) and len(test):
            made = directions(detectors, drawn, rows)
            flipped = directions(detectors, drawn, rows, mirrored=True) if card["mirrors"] else None
            told = (assessment.RealSplits(train, held, test), settings.bootstrap, study.seed, fabric.device, flipped)
            sets[label] = assessment.attack(made, *told)
            if label == "after" and study.diffusion.rare is not None:
                of_level = _rare_level(study.diffusion.rare, scans, planned.set_index("sample_id").loc[ids[rows]])
                rare = assessment.attack_rare(of_level, made, *told)

    table = pd.concat([pd.read_parquet(path) for path in shard_decisions], ignore_index=True)
    counts = assessment.count(table, planned, duplicates)
    copies = None
    if card["status"] == "CALIBRATED":
        first, strangers = table[table["attempt"] == 0], card["controls"]["negative"]
        copies = attacks.excess_risk(
            ((first["decision"] == "rejected") & (first["reason"] != "not an image")).to_numpy(),
            # An image is one scan; cards that do not say how many people are flagged by one are older.
            np.arange(strangers["n"]) < strangers.get("flagged_by_one_scan", strangers["flagged"]),
        )
    found: dict[str, Any] = {"excess_copies_before": copies, **sets}
    exact = make_fabric(study.compute.model_copy(update=EXACT), threads)
    weights = Weights(
        lambda: TrainedModel.load(autoencoder, diffusion, exact, decoder=decoder),
        lambda: MaskModel.where_there_is(masks, exact),
        None if not label_maps else RealLabelMaps.of(Shards(label_maps), scans["scan_id"].tolist()),
    )
    found["denoising_loss"] = _loss_attack(study, scans, shards, train_rows, test_rows, weights)
    if rare is not None and study.diffusion.rare is not None:
        level = study.diffusion.rare
        few, others = (
            (scans[level.covariate].iloc[rows] == level.level).to_numpy() for rows in (train_rows, test_rows)
        )
        compared = test_rows[others] if rare["strangers"] == "of that level" else test_rows
        rare["denoising_loss"] = _loss_attack(study, scans, shards, train_rows[few], compared, weights)
        found["rare"] = rare
    accepted = set(table.loc[table["decision"] == "accepted", "sample_id"]) - set(duplicates)
    released = planned[planned["sample_id"].isin(accepted)]
    people = scans.drop_duplicates("subject_id")
    found["covariate_table"] = table_attacks(
        released,
        people[people["split"] == "train"],
        people[people["split"].isin(["calibration", "test"])],
        study.covariates,
        study.seed,
    )
    found["covariate_drift"] = assessment.covariate_drift(planned, released, study.covariates)
    gates = assessment.gates(
        settings,
        study.covariates,
        card,
        copies,
        sets.get("after", {}),
        found["covariate_table"],
        counts,
        rare if rare is not None or study.diffusion.rare is None else {},
    )
    with atomic_path(decisions) as path:
        table.assign(
            decision=np.where(
                table["sample_id"].isin(duplicates) & (table["decision"] == "accepted"), "duplicate", table["decision"]
            )
        ).to_parquet(path, index=False)
    result = assessment.report(settings, card, gates, found, counts)
    write_json(out, result)
    log.info("verdict: %s", result["verdict"])
    for gate in gates:
        if not gate.passed:
            log.warning(
                "%s: %s (%s against %s): %s",
                gate.outcome,
                gate.name,
                gate.figure.get("value"),
                gate.limit,
                gate.meaning,
            )


@dataclass(frozen=True)
class Weights:
    """What somebody who had the weights would have; loaded where they are asked.

    Attributes
    ----------
    model, masks
        Load the networks of images and of label maps.
    label_maps
        Of all scans, where there are such.
    """

    model: Callable[[], TrainedModel]
    masks: Callable[[], MaskModel | None]
    label_maps: RealLabelMaps | None


def _rare_level(rare: Rare, scans: pd.DataFrame, images: pd.DataFrame) -> assessment.RareLevel:
    has, split = scans[rare.covariate] == rare.level, scans["split"]
    train, calibration, test = (has[split == name].to_numpy() for name in ("train", "calibration", "test"))
    return assessment.RareLevel(train, calibration, test, (images[rare.covariate] == rare.level).to_numpy())


def _loss_attack(
    study: Study,
    scans: pd.DataFrame,
    shards: Shards,
    train: np.ndarray,
    test: np.ndarray,
    weights: Weights,
) -> dict[str, Any] | None:
    """Membership by denoising loss: what somebody who had the weights could do."""
    members, others = (rows[assessment.some_people(scans["subject_id"].iloc[rows].tolist())] for rows in (train, test))
    if len(members) < 2 or len(others) < 2:
        return None
    rows, model, size = (
        np.concatenate([members, others]),
        weights.model(),
        min(ENCODED, batch_size(shards.shape("image"))),
    )
    with full_float32():
        parts = [model.encode(shards.tensors("image", rows[i : i + size])) for i in range(0, len(rows), size)]
        told: dict[str, torch.Tensor] = {}
        masks = weights.masks()
        if masks is not None and weights.label_maps is not None:
            each = [masks.maps(weights.label_maps[rows[i : i + size]]) for i in range(0, len(rows), size)]
            told = {name: torch.cat([maps[name] for maps in each]) for name in each[0]}
        losses = assessment.denoising_losses(model, torch.cat(parts), model.condition(scans.iloc[rows], told))
    is_member = np.arange(len(rows)) < len(members)
    return attacks.membership(
        is_member, -losses, scans["subject_id"].iloc[rows].tolist(), study.privacy.bootstrap, study.seed, "loss"
    )
