"""The steps `text`, `diffusion`, `generate` and `text_fidelity` of a study with texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file, save_file

from meddiff_steps.cohort.manifest import write_manifest
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import InitFrom, Study, freeze, parse_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.models.pretrained.convert import Sections, convert
from meddiff_steps.models.tone import ToneCurve
from meddiff_steps.models.trained import TrainedModel, save_image_network, save_tone
from meddiff_steps.steps import diffusion, generate, plan, text, text_fidelity
from meddiff_steps.synthesis.generate import CohortGenerator

SHAPE, SCANS = (1, 16, 16), 60
SPLITS = ["train"] * 40 + ["val"] * 5 + ["calibration"] * 5 + ["test"] * 10
OPTIMISER = {"steps": 3, "batch_size": 4, "warmup_steps": 1, "checkpoint_every": 2, "validate_every": 2}


class Files:
    """A folder with scans, their texts, and a first stage that was not trained."""

    def __init__(self, folder: Path) -> None:
        self.folder, rng = folder, np.random.default_rng(0)
        ids = [f"scan{i}" for i in range(SCANS)]
        self.images, self.manifest = folder / "images.arrow", folder / "manifest.parquet"
        texts = ["Left mass." if i % 2 else "No mass, effusion." for i in range(SCANS)]
        texts[3] = texts[44] = None
        with ShardWriter(self.images, {"scan_id": pa.string(), "image": TensorColumn("float16", SHAPE)}) as shard:
            for i, name in enumerate(ids):
                image = rng.uniform(0, 0.4, SHAPE)
                image[:, 4:12, 2:8] += 0.5 * (i % 2)
                shard.append(scan_id=name, image=image)
        table = pd.DataFrame({"scan_id": ids, "subject_id": ids, "session_id": None, "path": "x", "sha256": "0"})
        table = table.assign(content_sha256="0", split=SPLITS, age=rng.uniform(20, 80, SCANS), text=texts)
        write_manifest(table, self.manifest)
        torch.manual_seed(0)
        study = self.study()
        first_stage = build_first_stage(study.autoencoder, 2)
        self.shape = tuple(first_stage.encode(torch.zeros(1, *SHAPE)).mode().shape[1:])
        settings = {"settings": study.autoencoder.model_dump(mode="json"), "latent_shape": list(self.shape)}
        save_image_network(first_stage, folder / "autoencoder", SHAPE, settings)
        self.latents, self.scale = folder / "latents.arrow", folder / "scale.safetensors"
        columns = {"scan_id": pa.string(), "variant": pa.int64()}
        columns |= {"mean": TensorColumn("float16", self.shape), "numbers": TensorColumn("float32", (4,))}
        with ShardWriter(self.latents, columns) as shard:
            for name in ids:
                shard.append(scan_id=name, variant=0, mean=rng.normal(size=self.shape), numbers=np.zeros(4))
        prior = {"offset": np.zeros((1, *self.shape), np.float32), "scale": np.array(1, np.float32)}
        save_file(prior, self.scale)

    def study(self, **changes: Any) -> Study:
        content: dict[str, Any] = {
            "study": "x",
            "cohort": {"source": "table", "table": "x.csv"},
            "covariates": {"age": {"unit": "year", "range": [0, 100]}},
            "preprocess": {"shape": list(SHAPE[1:]), "spacing_mm": None},
            "text": {"column": "report", "width": 4, "max_tokens": 6, "draws": 1, "findings": {"mass": ["mass"]}},
            "autoencoder": {"channels": [8, 8], "latent_channels": 4},
            "decoder": {"network": None},
            "diffusion": {"channels": [8], "num_res_blocks": 1, "covariate_dim": 8, "optimiser": OPTIMISER},
            "generate": {"batch_size": 4, "num_inference_steps": 2, "guidance_scale": 2.0, "shard_size": 10},
            "plan": [
                {"name": "a", "subjects": 3, "texts": ["Mass.", "Left mass, {age}."]},
                {"name": "b", "subjects": 2},
            ],
            "evaluate": {"bootstrap": 100},
            "compute": {"device": "cpu", "precision": "32-true"},
        }
        return parse_study(content | changes, "test")

    def frozen(self, stage: str, **changes: Any) -> Path:
        return freeze(self.study(**changes), stage, self.folder / "config")

    def train(self, out: str = "diffusion", **changes: Any) -> Path:
        text.run(self.frozen("text", **changes), self.manifest, self.folder / "text")
        folder = self.folder / out
        diffusion.run(
            *(self.frozen("diffusion", **changes), self.manifest, [self.latents], self.scale, folder),
            *(self.folder / "state" / out, self.folder / "text"),
        )
        save_tone(ToneCurve(), folder, {})
        return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    made = Files(tmp_path_factory.mktemp("texts"))
    made.train()
    return made


def test_tokens_are_kept_by_the_digest_of_their_text(files):
    shards = Shards([files.folder / "text/tokens.arrow"])
    assert len(shards) == 2 and shards.shape("tokens") == (6, 8)
    assert all(len(digest) == 64 for digest in shards.column("text_sha256"))
    card = json.loads((files.folder / "text/card.json").read_text())
    assert card["texts"] == {"distinct": 2, "training": 2, "without_known_words": 0}
    assert set(card["encoder"]["vocabulary"]) == {"left", "mass", "no", "no:mass", "no:effusion"}


def test_words_of_scans_that_were_left_out_are_not_learnt(files, tmp_path):
    scans = pd.read_parquet(files.manifest)
    left = scans["text"].fillna("").str.contains("Left")
    assert left.any() and not left.all()
    qc = tmp_path / "qc.parquet"
    scans.assign(status=np.where(left, "left out", "ok"))[["scan_id", "status"]].to_parquet(qc)
    text.run(files.frozen("text"), files.manifest, tmp_path / "text", qc)
    card = json.loads((tmp_path / "text/card.json").read_text())
    assert "left" not in card["encoder"]["vocabulary"] and card["texts"]["training"] == 1


def test_the_encoder_lies_with_the_weights(files):
    card = json.loads((files.folder / "diffusion/card.json").read_text())
    encoder = json.loads((files.folder / "text/card.json").read_text())
    assert card["tokens"] == {"text": 8} and card["text"] == encoder["encoder"]
    assert card["text_encoder"] == encoder["weights_sha256"]
    weights, own = (load_file(files.folder / name / "model.safetensors") for name in ("diffusion", "text"))
    assert np.array_equal(weights["text.vectors"], own["vectors"])


def test_a_study_with_another_text_is_trained_anew_and_gives_other_weights(files):
    digests = [
        json.loads((files.train(name, text={"column": "report", **more}) / "card.json").read_text())["weights_sha256"]
        for name, more in (("one", {"width": 4, "max_tokens": 6}), ("two", {"width": 4, "max_tokens": 2}))
    ]
    first = json.loads((files.folder / "diffusion/card.json").read_text())["weights_sha256"]
    assert digests[0] == first != digests[1]
    files.train()


def test_a_planned_text_reaches_its_image_wherever_it_is_drawn(files):
    out = files.folder / "plan.parquet"
    plan.run(files.frozen("plan"), files.manifest, out)
    rows = pd.read_parquet(out)
    assert rows["text"].iloc[0] == "Mass." == rows["text"].iloc[2] and rows["text"].iloc[3:].isna().all()
    assert rows["text"].iloc[1] == f"Left mass, {rows['age'].iloc[1]:.0f}."
    shard = files.folder / "generated.arrow"
    generate.run(files.frozen("generate"), out, 0, files.folder / "autoencoder", files.folder / "diffusion", shard)
    made = Shards([shard])
    images = dict(zip(made.column("sample_id"), made.tensors("image", range(5)), strict=True))
    fabric = make_fabric(files.study().compute, 1)
    model = TrainedModel.load(files.folder / "autoencoder", files.folder / "diffusion", fabric)
    for parameter in model.denoiser.network.parameters():
        assert torch.isfinite(parameter).all()
    one = rows.iloc[[1]].reset_index(drop=True)
    ((_, again),) = CohortGenerator(model, files.study().generate).images(one, "again")
    assert np.array_equal(again.astype(np.float16).astype(np.float32), images["a000001"])
    told, untold = (model.condition(frame).tokens["text"] for frame in (one, one.assign(text=None)))
    assert torch.isfinite(told).all(-1).sum() == 2 and not torch.isfinite(untold).any() and told.shape == untold.shape
    assert not torch.isfinite(model.condition(one.drop(columns="text")).tokens["text"]).any()


def test_a_report_is_not_planned(files):
    with pytest.raises(UserError, match=r"plan.a, subject a000000: its text has a run of words"):
        plan.run(
            files.frozen(
                "plan",
                text={"column": "r", "shared_words": 3, "min_subjects": 40},
                plan=[{"name": "a", "subjects": 1, "texts": ["Mass left; no mass, effusion"]}],
            ),
            files.manifest,
            files.folder / "refused.parquet",
        )


def test_figures_are_of_held_out_texts_with_and_without_them(files):
    out = files.folder / "text.json"
    folders = files.folder / "autoencoder", files.folder / "diffusion"
    text_fidelity.run(files.frozen("text_fidelity"), files.manifest, [files.images], *folders, out)
    found = json.loads(out.read_text())
    assert found["held_out"] == {"scans": 19, "subjects": 19, "draws": 1}
    assert found["retrieval"]["scans"]["value"] == 1.0  # the mass is plain to see
    assert found["findings"]["mass"]["scans"]["value"] == 1.0
    assert {"with_text", "covariates_alone", "gain", "chance"} <= set(found["findings"]["mass"])
    assert abs(found["retrieval"]["gain"]["value"]) < 0.5


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"text": {}}, "plan.a.texts: the model learns no texts; set text.column"),
        ({"plan": [{"name": "a", "subjects": 1, "texts": ["{size} mass"]}]}, r"plan.a.texts: \{size\} is no covariate"),
        ({"plan": [{"name": "a", "subjects": 1, "texts": ["two\nlines"]}]}, "no line breaks"),
        ({"few_step": {"method": "consistency"}}, "few_step.method: trains a model without texts"),
        ({"second_model": {"subjects": 9}}, "second_model.subjects: trains a model without texts"),
        (
            {"init_from": {"path": "x"}, "autoencoder": {"optimiser": OPTIMISER | {"steps": 0}}},
            "init_from.models: diffusion: trains a model without texts",
        ),
    ],
)
def test_contradictions_are_refused(files, changes, problem):
    with pytest.raises(UserError, match=problem):
        files.study(**changes)


def test_no_training_goes_on_from_a_model_that_learnt_texts(files, tmp_path):
    study = files.study(text={}, plan=[{"name": "a", "subjects": 1}])
    base = InitFrom(path=str(files.folder), models=["diffusion"])
    with pytest.raises(UserError, match="diffusion: trained on texts, with an encoder of its own"):
        convert(base, Sections.of_study(study), tmp_path)


def test_models_with_an_encoder_of_texts_are_no_monai_bundle(files):
    assert files.study().unlike_monai == "MONAI has no encoder of texts"
    assert files.study(text={}, plan=[{"name": "a", "subjects": 1}]).unlike_monai is None
