"""The steps `latents`, `scale`, `decoder` and `tone`, run as the workflow runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file

from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import Compute, freeze, parse_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.models.first_stage.base import latent_shape
from meddiff_steps.models.trained import DenoiserCard, TrainedModel, load_decoder, save_denoiser, save_image_network
from meddiff_steps.steps import decoder, diffusion, latents, scale, tone

SHAPE = (1, 8, 12, 8)
OPTIMISER = {"steps": 4, "batch_size": 4, "warmup_steps": 1, "checkpoint_every": 2, "validate_every": 2}
SPLITS = ["train"] * 8 + ["val"] * 2 + ["calibration"] + ["test"] * 2


class Files:
    """A folder with scans, an autoencoder and a denoiser, neither of which was trained."""

    def __init__(self, folder: Path, named: str = "scan_id", **variants: Any) -> None:
        self.folder = folder
        study: dict[str, Any] = {
            "study": "x",
            "cohort": {"source": "simulated"},
            "covariates": {"age": {"unit": "year", "range": [0, 100]}},
            "preprocess": {"shape": list(SHAPE[1:])},
            "variants": {"count": 2, "flip": True, **variants},
            "autoencoder": {"channels": [8, 8], "latent_channels": 4},
            "decoder": {"channels": 8, "num_res_blocks": 1, "crop": 8, "optimiser": OPTIMISER},
            "diffusion": {"channels": [8], "num_res_blocks": 1, "optimiser": OPTIMISER},
            "generate": {"batch_size": 4, "num_inference_steps": 2, "drawing_steps": 2},
            "plan": [{"name": "syn", "subjects": 2}],
            "compute": {"device": "cpu", "precision": "32-true"},
        }
        self.study = parse_study(study, "test")
        rng, ids = np.random.default_rng(0), [f"scan{i}" for i in range(len(SPLITS))]
        self.images = folder / "images.arrow"
        with ShardWriter(self.images, {named: pa.string(), "image": TensorColumn("float16", SHAPE)}) as shard:
            for name in ids:
                shard.append(**{named: name}, image=rng.random(SHAPE))
        table = pd.DataFrame({"scan_id": ids, "subject_id": ids, "session_id": None, "path": "x", "sha256": "0"})
        table = table.assign(content_sha256="0", split=SPLITS, age=rng.uniform(20, 80, len(ids)))
        self.manifest = folder / "manifest.parquet"
        table.to_parquet(self.manifest)
        torch.manual_seed(0)
        shape = list(latent_shape(self.study.autoencoder, SHAPE))
        settings = {"settings": self.study.autoencoder.model_dump(mode="json"), "latent_shape": shape}
        save_image_network(build_first_stage(self.study.autoencoder, 3), folder / "autoencoder", SHAPE, settings)
        encoding = CovariateEncoding.fit(read_manifest(self.manifest, self.study.covariates), self.study.covariates)
        card = DenoiserCard(self.study.diffusion, latent_shape(self.study.autoencoder, SHAPE), encoding, 5)
        save_denoiser(card.build(), card, folder / "diffusion", {})

    def frozen(self, stage: str) -> Path:
        return freeze(self.study, stage, self.folder / "frozen")

    def draw(self, out: str = "decoder", state: str = "state") -> Path:
        f = self.folder
        decoder.run(self.frozen("decoder"), self.manifest, [self.images], f / "autoencoder", f / out, f / state)
        return f / out

    def latents(self) -> Path:
        f = self.folder
        latents.run(self.frozen("latents"), self.images, f / "autoencoder", f / "latents.arrow")
        return f / "latents.arrow"

    def tone(self, **changes: Any) -> dict[str, Any]:
        f = self.folder
        models = {"autoencoder": f / "autoencoder", "diffusion": f / "diffusion", "out": f / "diffusion"}
        tone.run(self.frozen("tone"), changes.pop("manifest", self.manifest), [self.images], **models, **changes)
        found: dict[str, Any] = json.loads((f / "diffusion/tone.json").read_text())
        return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    made = Files(tmp_path_factory.mktemp("steps"))
    made.draw()
    return made


def test_the_decoder_is_written_with_what_is_known_of_it(files: Files) -> None:
    out = files.folder / "decoder"
    model, card = load_decoder(out)
    assert card["scans"] == {"train": 8, "val": 2, "calibration": 1, "test": 2} and card["image_shape"] == list(SHAPE)
    assert card["autoencoder"] == json.loads((files.folder / "autoencoder/card.json").read_text())["weights_sha256"]
    assert card["residual"] == pytest.approx(float(model.deviation)) and card["residual"] > 0.1
    assert set(card["held_out"]) == {"test", "val"} and card["held_out"]["test"]["psnr"]["n"] == 2
    curve = pd.read_parquet(out / "history.parquet")
    assert {"train/loss", "val/loss"} == set(curve["metric"]) and np.isfinite(curve["value"]).all()
    assert card["validation_loss"] == curve[curve["metric"] == "val/loss"]["value"].iloc[-1]
    shards = Shards([out / "reconstructions.arrow"])
    assert shards.column("split") == ["test"] * 2 + ["val"] * 2
    drawn = shards.tensors("reconstruction")
    assert drawn.min() >= 0 and drawn.max() <= 1 and len({image.tobytes() for image in drawn}) == 4


def test_the_same_decoder_comes_out_again_and_a_finished_one_is_not_trained_again(files: Files) -> None:
    names = ["model.safetensors", "card.json", "history.parquet", "reconstructions.arrow"]
    before = {name: (files.folder / "decoder" / name).read_bytes() for name in names}
    for state in ("state", "another-state"):
        again = files.draw("again", state)
        assert {name: (again / name).read_bytes() for name in names} == before


def test_grey_levels_belong_to_what_the_parts_make_together(files: Files) -> None:
    plain = files.tone()
    assert set(plain["model"]) == {"autoencoder", "diffusion"} and plain["images"] == 8
    drawn = files.tone(decoder=files.folder / "decoder")
    assert set(drawn["model"]) == {"autoencoder", "decoder", "diffusion"}
    assert drawn["weights_sha256"] != plain["weights_sha256"]
    assert drawn["distance_toned"] >= 0 and set(drawn["zeros"]) == {"scans", "images", "images_toned"}
    assert files.tone(decoder=files.folder / "decoder") == drawn
    fabric = make_fabric(Compute(device="cpu", precision="32-true"), 1)
    model = TrainedModel.of_study(files.folder, fabric)
    assert model.draws and model.digests["tone"] == drawn["weights_sha256"]
    bare = TrainedModel.load(files.folder / "autoencoder", files.folder / "diffusion", fabric, toned=False)
    assert not bare.draws and set(bare.digests) == {"autoencoder", "diffusion"}
    assert model.digest != bare.digest


def test_a_model_without_its_grey_levels_is_refused(files: Files, tmp_path: Path) -> None:
    made = Files(tmp_path)
    fabric = make_fabric(Compute(device="cpu", precision="32-true"), 1)
    with pytest.raises(UserError, match=r"diffusion/tone\.json"):
        TrainedModel.of_study(made.folder, fabric)
    made.tone()
    (made.folder / "diffusion/tone.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"tone\.safetensors: not readable"):
        TrainedModel.of_study(made.folder, fabric)


def test_images_of_a_second_model_are_named_by_their_sample_id(tmp_path: Path) -> None:
    assert Files(tmp_path, named="sample_id").tone()["images"] == 8


def test_without_training_scans_there_are_no_grey_levels(files: Files, tmp_path: Path) -> None:
    table = pd.read_parquet(files.manifest).assign(split="test")
    table.to_parquet(tmp_path / "manifest.parquet")
    with pytest.raises(UserError, match="no scan of the train split is left"):
        files.tone(manifest=tmp_path / "manifest.parquet")


@pytest.mark.parametrize("shifted", [True, False])
def test_latents_are_of_mirrored_scans_and_of_shifted_ones_where_asked(tmp_path: Path, shifted: bool) -> None:
    files = Files(tmp_path, count=6, max_shift_voxels=1, shift_latents=shifted)
    shards = Shards([files.latents()])
    numbers, variant = shards.tensors("numbers"), np.array(shards.column("variant"))
    assert len(numbers) == 6 * len(SPLITS) and not numbers[variant == 0].any()
    assert set(numbers[variant > 0, 0]) == {0.0, 1.0}
    assert numbers[:, 1:4].any() == shifted


def test_latents_are_standardised_as_those_of_scans_as_they_are(tmp_path: Path) -> None:
    files = Files(tmp_path, count=3, max_shift_voxels=2)
    made = files.latents()
    folder, out = tmp_path / "autoencoder", tmp_path / "scale.safetensors"
    scale.run(files.frozen("scale"), files.manifest, [made], [files.images], folder, out, tmp_path / "scale.json")
    shards = Shards([made])
    kept = [
        i
        for i, (scan, v) in enumerate(zip(shards.column("scan_id"), shards.column("variant"), strict=True))
        if v == 0 and scan in {f"scan{k}" for k in range(8)}
    ]
    mean = shards.tensors("mean", kept).mean(0)
    np.testing.assert_allclose(load_file(out)["offset"][0], mean, atol=1e-5)
    assert json.loads((tmp_path / "scale.json").read_text())["train_latents"] == 8


def test_covariates_are_encoded_as_the_scans_that_are_learnt_from_have_them(tmp_path: Path) -> None:
    """Training scans of the manifest that were left out, and so have no latents, do not count."""
    files = Files(tmp_path)
    made, scans = files.latents(), read_manifest(files.manifest, files.study.covariates)
    learnt = CovariateEncoding.fit(scans, files.study.covariates)
    left_out = scans.iloc[:4].assign(scan_id=[f"old{i}" for i in range(4)], age=99.0)
    more, out = tmp_path / "more.parquet", tmp_path / "scale.safetensors"
    pd.concat([scans, left_out.assign(subject_id=left_out["scan_id"])]).to_parquet(more)
    folder = tmp_path / "autoencoder"
    scales = []
    for manifest in (files.manifest, more):
        scale.run(files.frozen("scale"), manifest, [made], [files.images], folder, out, tmp_path / "scale.json")
        scales.append(out.read_bytes())
    assert scales[0] == scales[1]
    diffusion.run(files.frozen("diffusion"), more, [made], out, tmp_path / "trained", tmp_path / "state")
    found = json.loads((tmp_path / "trained/card.json").read_text())["encoding"]
    encoding = CovariateEncoding.from_json(found)
    assert (encoding.means, encoding.stds) == (learnt.means, learnt.stds)
