"""Step `privacy`: decisions of all shards as one, attacks before and after the filter, and the verdict."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from safetensors.numpy import load_file

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.config import load_stage
from meddiff_steps.core.files import atomic_path, read_json, write_json
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.trained import LatentDiffusion, load_autoencoder
from meddiff_steps.privacy import assessment as audit
from meddiff_steps.privacy import attacks
from meddiff_steps.privacy.reference import ReferenceFiles, load_detectors
from meddiff_steps.privacy.table_attacks import table_attacks

log = logging.getLogger(__name__)


def run(
    config: Annotated[Path, typer.Option(help="frozen config of stage `privacy`")],
    manifest: Annotated[Path, typer.Option(help="cohort/manifest.parquet")],
    images: Annotated[list[Path], typer.Option(help="preprocessed shard; repeat for all of them")],
    plan: Annotated[Path, typer.Option(help="plan.parquet")],
    generated: Annotated[list[Path], typer.Option(help="generated shard, before the filter; repeat for all of them")],
    filtered: Annotated[list[Path], typer.Option(help="filtered shard; repeat for all of them")],
    shard_decisions: Annotated[list[Path], typer.Option(help="decisions of one shard; repeat for all of them")],
    autoencoder: Annotated[Path, typer.Option(help="autoencoder/model.safetensors")],
    autoencoder_card: Annotated[Path, typer.Option(help="autoencoder/card.json")],
    diffusion: Annotated[Path, typer.Option(help="diffusion/model.safetensors")],
    diffusion_card: Annotated[Path, typer.Option(help="diffusion/card.json")],
    scale: Annotated[Path, typer.Option(help="latents/scale.safetensors")],
    embedder: Annotated[Path, typer.Option(help="privacy/embedder.safetensors")],
    embedder_card: Annotated[Path, typer.Option(help="privacy/embedder.json")],
    reference: Annotated[Path, typer.Option(help="privacy/reference.safetensors")],
    calibration: Annotated[Path, typer.Option(help="privacy/calibration.json")],
    decisions: Annotated[Path, typer.Option(help="decision on every candidate to write (Parquet); private")],
    out: Annotated[Path, typer.Option(help="report to write (JSON)")],
    threads: Annotated[int, typer.Option(help="CPU threads; changes the last bits of CPU results")] = 1,
) -> None:
    """Attack the cohort before and after the filter, and say whether it may be released."""
    study = load_stage(config, "privacy")
    settings = study.privacy
    torch.set_num_threads(threads)
    shards, before, after = Shards(images), Shards(generated), Shards(filtered)
    tensors, card = load_file(reference), read_json(calibration)
    detectors = load_detectors(
        ReferenceFiles(images, autoencoder, autoencoder_card, scale, embedder, embedder_card), tensors
    )
    scans = read_manifest(manifest).set_index("scan_id").loc[shards.column("scan_id")].reset_index()

    def split(name: str) -> tuple[np.ndarray, audit.RealScans]:
        rows = np.flatnonzero((scans["split"] == name).to_numpy())
        known = (
            {detector.name: tensors[detector.name] for detector in detectors}
            if name == "train"
            else audit.directions(detectors, shards, rows)
        )
        return rows, audit.RealScans(known, scans["subject_id"].to_numpy()[rows])

    (train_rows, train), (_, held), (test_rows, test) = split("train"), split("calibration"), split("test")
    planned = pd.read_parquet(plan)
    planned["subgroup"] = planned[settings.subgroup].astype(str) if settings.subgroup else "all"
    duplicates = audit.near_duplicates(after, planned, settings.duplicate_correlation)
    sets = {}
    for label, drawn, left_out in (("before", before, []), ("after", after, duplicates)):
        ids = np.array(drawn.column("sample_id"))
        kept = np.flatnonzero(~np.isin(ids, left_out))
        rows = kept[audit.sample(ids[kept].tolist())]
        if len(rows) and len(held) and len(test):
            sets[label] = audit.attack(
                audit.directions(detectors, drawn, rows), train, held, test, settings.bootstrap, study.seed
            )

    table = pd.concat([pd.read_parquet(path) for path in shard_decisions], ignore_index=True)
    counts = audit.count(table, planned, duplicates)
    copies = None
    if card["status"] == "CALIBRATED":
        first, strangers = table[table["attempt"] == 0], card["controls"]["negative"]
        copies = attacks.excess_risk(
            ((first["decision"] == "rejected") & (first["reason"] != "not an image")).to_numpy(),
            np.arange(strangers["n"]) < strangers["flagged"],
        )
    found: dict[str, Any] = {"excess_copies_before": copies, **sets}
    found["denoising_loss"] = _loss_attack(
        study, scans, shards, train_rows, test_rows, autoencoder, autoencoder_card, diffusion, diffusion_card
    )
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
    found["covariate_drift"] = audit.covariate_drift(planned, released, study.covariates)
    gates = audit.gates(
        settings,
        card,
        copies,
        sets.get("after", {"nearer_to_training": {}, "membership": {}}),
        found["covariate_table"],
        counts,
    )
    with atomic_path(decisions) as path:
        table.assign(
            decision=np.where(
                table["sample_id"].isin(duplicates) & (table["decision"] == "accepted"), "duplicate", table["decision"]
            )
        ).to_parquet(path, index=False)
    result = audit.report(settings, card, gates, found, counts)
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


def _loss_attack(
    study: Any,
    scans: pd.DataFrame,
    shards: Shards,
    train: np.ndarray,
    test: np.ndarray,
    autoencoder: Path,
    autoencoder_card: Path,
    diffusion: Path,
    card: Path,
) -> dict[str, Any] | None:
    """Membership by denoising loss: what somebody who had the weights could do."""
    members, others = train[: audit.LOSS_SCANS], test[: audit.LOSS_SCANS]
    if len(members) < 2 or len(others) < 2:
        return None
    rows = np.concatenate([members, others])
    model, (first_stage, _) = LatentDiffusion.load(diffusion, card), load_autoencoder(autoencoder, autoencoder_card)
    with torch.no_grad():
        means = [
            first_stage.encode(torch.from_numpy(shards.tensors("image", rows[i : i + 16])))[0]
            for i in range(0, len(rows), 16)
        ]
    latents = ((torch.cat(means) - model.denoiser.offset) / model.denoiser.scale).numpy()
    losses = audit.denoising_losses(model.denoiser, latents, model.encoding.encode(scans.iloc[rows]))
    is_member = np.arange(len(rows)) < len(members)
    return attacks.membership(
        is_member, -losses, scans["subject_id"].iloc[rows].tolist(), study.privacy.bootstrap, study.seed, "loss"
    )
