"""Degenerate cohorts: a clear message or a verdict that is no PASS, never a crash."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from meddiff_steps import config
from meddiff_steps.config import Privacy, freeze, parse_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json
from meddiff_steps.imaging.shards import ShardWriter, TensorColumn
from meddiff_steps.instruments.embedder import Embedder
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.models.weights import save_model
from meddiff_steps.privacy import assessment as audit
from meddiff_steps.privacy import attacks
from meddiff_steps.privacy.verdict import COPIES_BEFORE, PLAIN, verdict
from meddiff_steps.steps import calibrate, embedder

SHAPE = (1, 16, 16, 16)
SPLITS = ["train"] * 30 + ["calibration"] * 20 + ["test"] * 20


def strangers(count):
    rng = np.random.default_rng(0)
    return rng.random((count, *SHAPE)).astype(np.float32)


class Cohort:
    """Files as the workflow has them before the detectors are calibrated."""

    def __init__(self, folder, images, splits):
        self.folder, self.images = folder, folder / "shard.arrow"
        names = [f"sub-{i:03d}" for i in range(len(images))]
        with ShardWriter(self.images, {"scan_id": pa.string(), "image": TensorColumn("float16", SHAPE)}) as shard:
            for name, image in zip(names, images, strict=True):
                shard.append(scan_id=name, image=image)
        self.manifest = folder / "manifest.parquet"
        digests = [f"{i:064x}" for i in range(len(names))]
        columns = {
            "scan_id": names,
            "subject_id": names,
            "session_id": pd.Series([None] * len(names), dtype=object),
            "path": "x.nii.gz",
        }
        pd.DataFrame(columns | {"sha256": digests, "content_sha256": digests, "split": splits, "age": 50.0}).to_parquet(
            self.manifest, index=False
        )
        self.study = parse_study(
            {
                "study": "x",
                "cohort": {"source": "simulated"},
                "covariates": {"age": {"unit": "year", "range": [0, 100]}},
                "plan": [{"name": "syn", "subjects": 2}],
                "privacy": {
                    "level": 0.2,
                    "embedder": {"optimiser": {"steps": 2, "batch_size": 8, "learning_rate": 1e-3}},
                },
            },
            "test",
        )

    def train_embedder(self):
        embedder.run(
            freeze(self.study, "embedder", self.folder), self.manifest, [self.images], self.folder / "embedder"
        )

    def calibrate(self):
        torch.manual_seed(0)
        settings = config.Autoencoder(channels=[8, 16], norm_num_groups=4, latent_channels=4)
        autoencoder = build_first_stage(settings, 3)
        folder, card = self.folder, self.folder / "calibration.json"
        facts = {"settings": settings.model_dump(mode="json"), "image_shape": SHAPE, "latent_shape": [4, 4, 4, 4]}
        save_model(autoencoder, folder / "autoencoder", facts)
        scale = {"offset": torch.zeros(1, 4, 4, 4, 4), "scale": torch.ones(())}
        save_file(scale, folder / "scale.safetensors")
        calibrate.run(
            freeze(self.study, "calibrate", folder),
            self.manifest,
            [self.images],
            autoencoder=folder / "autoencoder",
            scale=folder / "scale.safetensors",
            embedder=folder / "embedder",
            reference=folder / "reference.safetensors",
            reference_scans=folder / "reference-scans.arrow",
            out=card,
        )
        return read_json(card)


def outcome(card):
    """The verdict if no other gate had anything against it."""
    copies = None
    if card["status"] == "CALIBRATED":
        copies = attacks.excess_risk(np.zeros(2000, bool), np.zeros(2000, bool))
    gates = audit.gates(Privacy(level=0.2), ["age"], card, copies, {}, {}, {"failed": 0, "duplicates": 0, "planned": 2})
    of_filter = [gate for gate in gates if gate.name in (*PLAIN, COPIES_BEFORE)]
    return verdict(of_filter), {gate.name: gate.outcome for gate in of_filter}


@pytest.mark.parametrize("value", [None, 0.0, 1.0], ids=["identical", "black", "white"])
def test_images_that_are_all_the_same_pass_nothing(tmp_path, value):
    image = strangers(1) if value is None else np.full((1, *SHAPE), value, np.float32)
    cohort = Cohort(tmp_path, np.repeat(image, len(SPLITS), axis=0), SPLITS)
    cohort.train_embedder()
    word, gates = outcome(cohort.calibrate())
    assert word == "NOT_EVALUATED"
    assert gates["planted copies are found"] == "NOT_EVALUATED"


def test_an_empty_calibration_split_passes_nothing(tmp_path):
    splits = ["test" if split == "calibration" else split for split in SPLITS]
    cohort = Cohort(tmp_path, strangers(len(splits)), splits)
    cohort.train_embedder()
    card = cohort.calibrate()
    assert (card["status"], card["subjects"], card["needed"]) == ("NOT_CALIBRATED", 0, 14)
    assert outcome(card)[0] == "NOT_EVALUATED"


def test_an_empty_test_split_passes_nothing(tmp_path):
    splits = ["val" if split == "test" else split for split in SPLITS]
    cohort = Cohort(tmp_path, strangers(len(splits)), splits)
    cohort.train_embedder()
    word, gates = outcome(cohort.calibrate())
    assert word != "PASS"
    assert gates["strangers are not flagged"] != "PASS"


def test_one_training_subject_is_refused(tmp_path):
    cohort = Cohort(tmp_path, strangers(10), ["train"] + ["test"] * 9)
    with pytest.raises(UserError, match=r"manifest.parquet: 1 training scan; .* fewer than 2. Add scans"):
        cohort.train_embedder()


def test_no_training_subject_is_refused(tmp_path):
    cohort = Cohort(tmp_path, strangers(len(SPLITS)), SPLITS)
    cohort.train_embedder()
    table = pd.read_parquet(cohort.manifest)
    table.assign(split="test").to_parquet(cohort.manifest, index=False)
    with pytest.raises(UserError, match="no preprocessed scan is in the train split"):
        cohort.calibrate()


def test_an_embedder_that_gives_nan_is_refused(tmp_path):
    cohort = Cohort(tmp_path, strangers(len(SPLITS)), SPLITS)
    model = Embedder(SHAPE[1:])
    with torch.no_grad():
        model.layers[-1].bias[0] = torch.nan
    save_model(model, tmp_path / "embedder", {"image_shape": SHAPE})
    with pytest.raises(UserError, match=r"vectors are not finite.*diverged"):
        cohort.calibrate()
