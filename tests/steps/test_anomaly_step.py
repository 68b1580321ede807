"""The step `anomaly` on colour pictures with masks, from the table to the derivative, with an untrained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.config import freeze, parse_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.places import ball
from meddiff_steps.imaging.selection import Images
from meddiff_steps.models.first_stage.base import build, latent_shape
from meddiff_steps.models.trained import DenoiserCard, save_denoiser, save_image_network
from meddiff_steps.steps import anomaly, cohort, preprocess, quality, translation_model

SIDE, PEOPLE = 32, 24


def study(folder: Path, **section: Any) -> dict[str, Any]:
    return {
        "study": "x",
        "seed": "x",
        "cohort": {
            "source": "table",
            "table": str(folder / "scans.csv"),
            "path_column": "image",
            "subject_column": "person",
        },
        "covariates": {"lesion": {"levels": ["0", "1"]}, "level": {"unit": "", "range": [0, 1]}},
        "splits": {"train": 0.3, "val": 0.2, "calibration": 0.25, "test": 0.25},
        "preprocess": {"shape": [16, 16], "spacing_mm": None, "colour": "green", "shards": 1},
        "autoencoder": {"channels": [8, 8], "latent_channels": 4},
        "diffusion": {"channels": [8], "num_res_blocks": 1},
        "decoder": {"network": None},
        "plan": [{"name": "syn", "subjects": 2}],
        "evaluate": {"bootstrap": 100},
        "compute": {"device": "cpu", "precision": "32-true"},
        "release": {"suffix": "FLAIR"},
        "anomaly": {
            "methods": ["gaussian_noise", "classifier_free", "healing"],
            "healthy": {"lesion": "0"},
            "masks": str(folder / "masks/{scan_id}.png"),
            "look_for": "bright",
            "num_inference_steps": 3,
            "samples": 1,
            "subject_false_positive_rate": 0.5,
            **section,
        },
    }


class Files:
    """Pictures whose green channel has a lesion on every second of a person's, masks, and a model nobody trained."""

    def __init__(self, folder: Path) -> None:
        self.folder, rng, rows = folder, np.random.default_rng(0), []
        head, spot = ball((SIDE, SIDE), (15.5, 15.5), (12, 12)), ball((SIDE, SIDE), (12, 19), (3, 3))
        for name in ("images", "masks"):
            (folder / name).mkdir()
        for person in range(PEOPLE):
            for ill in (0, 1):
                grey = np.where(head, 110 + 8 * rng.standard_normal(head.shape), 0) + 100 * ill * spot
                colours = np.stack([rng.integers(0, 255, head.shape), grey, 255 * head], -1)
                name = f"p{person:02d}x{ill}.png"
                Image.fromarray(colours.clip(0, 255).astype(np.uint8)).save(folder / "images" / name)
                Image.fromarray((255 * ill * spot).astype(np.uint8)).save(folder / "masks" / name)
                rows.append({"image": f"images/{name}", "person": f"p{person:02d}", "lesion": ill, "level": 0.1 * ill})
        pd.DataFrame(rows).to_csv(folder / "scans.csv", index=False)
        made = self.study()
        self.manifest, self.images, self.qc = folder / "manifest.parquet", folder / "s.arrow", folder / "qc.parquet"
        cohort.run(self.frozen(made, "cohort"), self.manifest, folder / "card.json")
        preprocess.run(self.frozen(made, "preprocess"), self.manifest, 0, self.images, folder / "qc0.parquet")
        quality.run(self.frozen(made, "quality"), [folder / "qc0.parquet"], self.qc)
        torch.manual_seed(0)
        shape = latent_shape(made.autoencoder, (1, 16, 16))
        settings = {"settings": made.autoencoder.model_dump(mode="json"), "latent_shape": list(shape)}
        save_image_network(build(made.autoencoder, 2), folder / "autoencoder", (1, 16, 16), settings)
        encoding = CovariateEncoding.fit(read_manifest(self.manifest, made.covariates), made.covariates)
        card = DenoiserCard(made.diffusion, shape, encoding, 5)
        save_denoiser(card.build(), card, folder / "diffusion", {})

    def study(self, **section: Any) -> Any:
        return parse_study(study(self.folder, **section), "test")

    def frozen(self, made: Any, stage: str) -> Path:
        return freeze(made, stage, self.folder / "frozen")

    def run(self, out: str, **section: Any) -> Path:
        f, config = self.folder, self.frozen(self.study(**section), "anomaly")
        anomaly.run(config, self.manifest, self.qc, [self.images], f / out, f / "autoencoder", f / "diffusion")
        return f / out


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("anomaly"))


def test_lesions_are_found_and_everything_is_written(files: Files) -> None:
    out = files.run("out")
    found = json.loads((out / "figures.json").read_text())
    methods = {entry["method"]: entry for entry in found["methods"]}
    assert list(methods) == [
        *("z_score", "asymmetry", "intensity", "gaussian_noise", "gaussian_noise_0.3", "gaussian_noise_0.5"),
        *("classifier_free", "healing", "ensemble"),
    ]
    manifest = pd.read_parquet(files.manifest).set_index("scan_id")
    test = manifest[manifest["split"] == "test"]
    assert found["scans"] == sorted(test.index)
    assert set(found["calibration_scans"]) == set(
        manifest[(manifest["split"] == "calibration") & (manifest["lesion"] == "0")].index
    )
    z_score = methods["z_score"]
    assert z_score["average_precision"]["value"] > 0.9 and z_score["scan_auroc"]["value"] == 1.0
    assert z_score["sensitivity"]["value"] == 1.0 and z_score["recall"][0]["found"]["value"] == 1.0
    assert z_score["false_share"]["value"] < 0.05 and z_score["best_dice"]["value"] > 0.7
    assert "gain" not in z_score and methods["ensemble"]["gain"]["n"] == test["subject_id"].nunique()
    assert methods["intensity"]["average_precision"]["value"] > 0.5, "the green channel alone shows the lesion"
    rows = pd.read_parquet(out / "measurements.parquet")
    assert len(rows) == len(methods) * len(test)
    assert (rows[rows["method"] == "z_score"].set_index("scan_id")["lesion_voxels"] > 0).equals(test["lesion"] == "1")
    for scan in test.index:
        place = out / f"sub-{scan}/anat"
        pictures = {p.name.split("desc-")[1].split("_")[0]: np.asarray(Image.open(p)) for p in place.glob("*.png")}
        assert set(pictures) == {"anomaly", "anomalyMask", "healed"}
        assert all(picture.shape == (SIDE, SIDE) for picture in pictures.values()), "on the scan's own grid"
        facts = json.loads(next(place.glob("*desc-anomaly_*.json")).read_text())
        assert facts["Threshold"] == methods["ensemble"]["calibration"]["threshold"]
        marked = pictures["anomaly"] / 255 * (facts["GreyValueOf255"] - facts["GreyValueOf0"]) + facts["GreyValueOf0"]
        assert ((marked > facts["Threshold"] + 0.1) <= (pictures["anomalyMask"] > 0)).all()
    assert (out / "contact-sheet.png").stat().st_size > 10_000 and (out / "dataset_description.json").is_file()
    again = files.run("again", healthy={"lesion": 0})  # a level that is written as a number is the same
    assert json.loads((again / "figures.json").read_text())["methods"] == found["methods"]


def test_no_more_healthy_scans_are_loaded_than_methods_are_given(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """And they are chosen by lot, of all people."""
    given: list[str] = []

    def stop(name: str, context: Any) -> Any:
        given.extend(scan.subject["scan_id"].iloc[0] for scan in context.reference)
        raise InterruptedError

    monkeypatch.setattr(anomaly, "build", stop)
    monkeypatch.setattr(anomaly, "REFERENCE_SCANS", 3)
    with pytest.raises(InterruptedError):
        files.run("stopped", methods=["healing"], subject_false_positive_rate=0.3)
    rows = pd.read_parquet(files.manifest)
    healthy = rows[(rows["split"] == "val") & (rows["lesion"] == "0")]
    assert len(given) == 3 < len(healthy) and set(given) <= set(healthy["scan_id"])
    assert set(given) != set(healthy["scan_id"][:3])


def test_figures_leave_out_scans_that_were_learnt_from(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    """Their maps are written all the same."""
    manifest = pd.read_parquet(files.manifest)
    test, *others = (manifest.loc[manifest["split"] == name, "scan_id"] for name in ("test", "train", "calibration"))
    own = files.run("own", methods=["gaussian_noise"], scans=test.tolist())
    assert "learnt from" not in caplog.text
    named = files.run("named", methods=["gaussian_noise"], scans=[*test, *others[0][:2], *others[1][:1]])
    assert "anomaly.scans: 3 of" in caplog.text and "train (2), calibration (1)" in caplog.text
    figures = [json.loads((out / "figures.json").read_text())["methods"] for out in (own, named)]
    assert figures[0] == figures[1] and "average_precision" in figures[0][0]
    rows = pd.read_parquet(named / "measurements.parquet").drop_duplicates("scan_id")
    assert rows["split"].value_counts().to_dict() == {"test": len(test), "train": 2, "calibration": 1}
    assert list(named.rglob(f"*{others[0].iloc[0].removeprefix('sub-')}*anomaly*"))


def test_a_scan_tells_by_no_report_whether_it_is_healthy(files: Files) -> None:
    made = files.study()
    cohort = Images.of_scans([files.images], files.manifest, made.covariates)
    worker = anomaly._Worker(made, cohort, pd.read_parquet(files.qc).set_index("scan_id"))
    subject = worker.scan(cohort.table.iloc[0].to_dict() | {"text": "A lesion."}).subject
    assert "text" not in subject and subject["lesion"].isna().all() and subject["level"].notna().all()


def test_without_masks_there_are_maps_and_scores_alone(files: Files) -> None:
    out = files.run("blind", masks=None, methods=["gaussian_noise"], most_scans=2)
    found = json.loads((out / "figures.json").read_text())
    assert all(set(entry) == {"method", "calibration"} for entry in found["methods"])
    rows = pd.read_parquet(out / "measurements.parquet")
    assert {"score", "flagged", "marked_share"} <= set(rows) and not {"dice", "lesion_voxels"} & set(rows)
    assert len(list(out.glob("sub-*/anat/*_desc-anomaly_FLAIR.png"))) == 2


def test_lesions_that_are_put_in_are_the_truth(files: Files) -> None:
    lesions = {"diameter_mm": 5, "contrast": 0.4}
    out = files.run("inserted", masks=None, lesions=lesions, methods=["gaussian_noise"], depths=[0.3], most_scans=4)
    rows = pd.read_parquet(out / "measurements.parquet").query("method == 'z_score'")
    assert (rows["lesion_voxels"] > 0).sum() == 2
    assert rows["lesion_voxels"].max() <= 4 * np.pi * 3.5**2, "on the scan's grid a voxel of the study's is four"
    assert len(json.loads((out / "figures.json").read_text())["methods"]) == 5


def test_masks_that_do_not_fit_and_too_few_healthy_people_are_refused(files: Files, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file|missing"):
        files.run("bad", masks=str(tmp_path / "{scan_id}.png"))
    for path in (files.folder / "masks").glob("*.png"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / path.name)
    with pytest.raises(UserError, match=r"a mask of 8x8 voxels, expected 32x32, as p\d\dx\d has \(anomaly.masks\)"):
        files.run("bad", masks=str(tmp_path / "{scan_id}.png"))
    with pytest.raises(UserError, match=r"0.01 needs healthy scans of 99 people in the calibration split, found \d"):
        files.run("bad", subject_false_positive_rate=0.01)
    with pytest.raises(UserError, match=r"anomaly.scans: 'nobody' is no preprocessed scan"):
        files.run("bad", scans=["nobody"])


def test_modality_cycles_need_no_autoencoder_and_learn_from_healthy_scans(files: Files, tmp_path: Path) -> None:
    """From a table with a second contrast to the derivative; lesions are in the first contrast alone."""
    content = study(files.folder, methods=["modality_cycles"])
    (tmp_path / "other").mkdir()
    for path in (files.folder / "images").glob("*.png"):
        grey = np.asarray(Image.open(files.folder / "images" / f"{path.stem[:-1]}0.png"))[..., 1].astype(float)
        Image.fromarray(np.where(grey > 0, 200 - grey, 0).clip(0, 255).astype(np.uint8)).save(
            tmp_path / "other" / path.name
        )
    content["preprocess"]["channels"] = {"other": {"path": str(tmp_path / "other/{scan_id}.png")}}
    optimiser = {"steps": 30, "batch_size": 4, "validate_every": 30, "warmup_steps": 2}
    content["translation"] = {"target": ["other"], "cycle": True, "block": 2, "channels": [8], "num_res_blocks": 1}
    content["translation"]["optimiser"] = optimiser
    made = parse_study(content, "test")

    def frozen(stage: str) -> Path:
        return freeze(made, stage, tmp_path / "frozen")

    images, qc = tmp_path / "s.arrow", tmp_path / "qc.parquet"
    preprocess.run(frozen("preprocess"), files.manifest, 0, images, tmp_path / "qc0.parquet")
    quality.run(frozen("quality"), [tmp_path / "qc0.parquet"], qc)
    there, back, out = (tmp_path / name for name in ("there", "back", "out"))
    translation_model.run(frozen("translation_model"), files.manifest, [images], there, tmp_path / "state", back=back)
    manifest = read_manifest(files.manifest)
    healthy = (manifest["split"] == "train") & (manifest["lesion"] == "0")
    card = json.loads((back / "card.json").read_text())
    assert (card["way"], card["source"], card["target"]) == ("diffusion", ["other"], ["image"])
    assert card["scans"]["train"] == healthy.sum() < (manifest["split"] == "train").sum()
    anomaly.run(frozen("anomaly"), files.manifest, qc, [images], out, translation=there, back=back)
    found = json.loads((out / "figures.json").read_text())
    methods = {entry["method"]: entry for entry in found["methods"]}
    assert list(methods)[3:] == ["modality_cycles", "modality_cycles_measured", "ensemble"]
    assert methods["modality_cycles_measured"]["average_precision"]["value"] > 0.5
    assert set(found["model"]) == {"translation", "back"} and found["model"]["back"] == card["weights_sha256"]
    with pytest.raises(UserError, match=r"draws \['other'\] from \['image'\], expected the way back"):
        anomaly.run(frozen("anomaly"), files.manifest, qc, [images], out, translation=there, back=there)
    content["anomaly"]["methods"] = ["gaussian_noise"]
    config = freeze(parse_study(content, "test"), "anomaly", tmp_path / "frozen")
    with pytest.raises(UserError, match="need a trained model; give --autoencoder and --diffusion"):
        anomaly.run(config, files.manifest, qc, [images], out)
