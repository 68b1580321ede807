"""The release: images that say what they are, tables that fit them, and a dataset that the BIDS validator accepts."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image as PilImage

from meddiff_steps.cohort.bids import read_bids
from meddiff_steps.cohort.manifest import build_manifest
from meddiff_steps.cohort.table import load_table, read_table
from meddiff_steps.config import BidsSource, Splits, TableSource, freeze, parse_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.encoding import read_mark, voxel_digest
from meddiff_steps.imaging.reading import read_image
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.release import dataset as module
from meddiff_steps.release import seal
from meddiff_steps.release.layout import image_path, unknown_to_bids
from meddiff_steps.release.regeneration import Added, write_added
from meddiff_steps.steps import describe as describe_step
from meddiff_steps.steps import images as images_step

SHAPE = {3: (12, 16, 14), 2: (24, 20)}


class Workplace:
    """A study with four synthetic subjects in two shards, up to the `generate` step."""

    def __init__(self, root: Path, dims: int = 3, **changes: Any) -> None:
        self.root, self.dims, self.release = root, dims, root / "release"
        self.study = {
            "study": "test",
            "cohort": {"source": "simulated"},
            "title": "A test",
            "covariates": {
                "age": {"unit": "year", "range": [0, 120], "description": "Age at scan."},
                "sex": {"levels": ["F", "M"]},
                "ventricles_ml": {"unit": "mL", "range": [0, 200]},
            },
            "preprocess": {"shape": list(SHAPE[dims]), "spacing_mm": 5.0 if dims == 3 else None},
            "autoencoder": {"channels": [32], "stem": "none"},
            "plan": [{"name": "demo", "subjects": 4}],
            "release": {
                "name": "Test cohort",
                "authors": ["A. Author", "B. Author"],
                "acknowledgements": "Thanks to all.",
            },
            **changes,
        }
        self.samples = [f"demo{i:06d}" for i in range(4)]
        values = np.random.default_rng(0).random((4, 1, *SHAPE[dims])).astype(np.float16)
        values[:, :, 0, 0], values[:, :, 1, 0] = 0, 1
        self.values = dict(zip(self.samples, values, strict=True))
        for shard, members in enumerate((self.samples[:3], self.samples[3:])):
            self.write_shard(shard, {s: self.values[s] for s in members})
        self.plan = pd.DataFrame(
            {
                "sample_id": self.samples,
                "group": "demo",
                "index": range(4),
                "noise_index": range(4),
                "attempt": 0,
                "shard": [0, 0, 0, 1],
            }
        )
        self.plan["age"], self.plan["sex"], self.plan["ventricles_ml"] = (
            [92.5, np.nan, 50, 1 / 3],
            ["F", "M", None, "F"],
            [20.123456789, 30, 40, 50],
        )
        self.privacy = {
            "verdict": "PASS",
            "calibration": {
                "status": "CALIBRATED",
                "detectors": ["a", "b"],
                "level": 0.05,
                "subjects": 99,
                "needed": 39,
            },
        }
        self.metrics: dict[str, Any] = {}
        self.drawing = True
        self.card = {"scans": 30, "subjects": 25, "simulated": False, "source": "bids"}

    def write_shard(self, shard: int, images: dict[str, np.ndarray]) -> None:
        shape = next(iter(images.values())).shape
        with ShardWriter(
            self.root / f"generated-{shard}.arrow", {"sample_id": pa.string(), "image": TensorColumn("float16", shape)}
        ) as writer:
            for sample_id, image in images.items():
                writer.append(sample_id=sample_id, image=image)

    def frozen(self, stage: str) -> Path:
        return freeze(parse_study(self.study, "test"), stage, self.root)

    def images(self, shard: int, without: str = "") -> pd.DataFrame:
        generated, released = self.root / f"generated-{shard}.arrow", self.root / f"released-{shard}.parquet"
        ids = Shards([generated]).column("sample_id") if generated.exists() else []
        pd.DataFrame({"sample_id": [name for name in ids if name != without]}).to_parquet(released)
        images_step.run(self.frozen("images"), generated, released, self.release, self.root / f"images-{shard}.parquet")
        return pd.read_parquet(self.root / f"images-{shard}.parquet")

    def complete(self, shards: tuple[int, ...] = (0, 1)) -> None:
        self.plan.to_parquet(self.root / "plan.parquet", index=False)
        (self.root / "privacy.json").write_text(json.dumps(self.privacy))
        tables = [self.root / f"images-{s}.parquet" for s in shards]
        network = {"parameters": 1234, "weights_sha256": "ab" * 32, "scans": {"train": 20, "test": 5}}
        cards = {"cohort": self.card} | dict.fromkeys(("autoencoder", "decoder", "diffusion"), network)
        for folder, card in cards.items():
            (self.root / folder).mkdir(exist_ok=True)
            (self.root / folder / "card.json").write_text(json.dumps(card))
        (self.root / "metrics.json").write_text(json.dumps(self.metrics))
        inputs = (
            self.root / "plan.parquet",
            self.root / "privacy.json",
            tables,
            *(self.root / folder for folder in ("cohort", "autoencoder", "diffusion")),
        )
        describe_step.run(
            self.frozen("describe"),
            *inputs,
            self.release / "dataset_description.json",
            decoder=self.root / "decoder" if self.drawing else None,
            metrics=self.root / "metrics.json" if self.metrics else None,
        )

    def run(self) -> Path:
        for shard in (0, 1):
            self.images(shard)
        self.complete()
        return self.release


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------- images


def test_volume(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    table = place.images(0)
    assert table.columns.tolist() == ["sample_id", "path", "bytes", "sha256", "voxel_sha256"]
    assert table["path"].tolist() == [f"sub-{s}/anat/sub-{s}_T1w.nii.gz" for s in place.samples[:3]]
    row = table.iloc[1]
    path = place.release / row["path"]
    assert path.stat().st_size == row["bytes"] and hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]

    volume = nib.Nifti1Image.from_filename(path)
    stored = np.asarray(volume.dataobj)
    assert stored.dtype == np.int16 and stored.min() == 0 and stored.max() == 1000
    assert voxel_digest(stored, volume.affine) == row["voxel_sha256"]
    assert voxel_digest(stored, volume.affine * 1.001) != row["voxel_sha256"], "the geometry is part of it"
    assert voxel_digest(stored[::-1], volume.affine) != row["voxel_sha256"]
    assert np.abs(stored / 1000 - place.values["demo000001"][0].astype(np.float64)).max() <= 0.0005 + 1e-9
    header = volume.header
    assert header.get_xyzt_units() == ("mm", "sec") and header["descrip"].item().startswith(b"SYNTHETIC")
    assert int(header["qform_code"]) == int(header["sform_code"]) == 2
    assert np.allclose(header.get_qform(), header.get_sform())
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S") and np.allclose(header.get_zooms(), 5)
    assert np.allclose(nib.affines.apply_affine(volume.affine, (np.array(volume.shape) - 1) / 2), 0), (
        "the middle of the grid is the origin"
    )
    assert read_mark(path) == {"synthetic": True, "sample_id": "demo000001", "study": "test"}
    assert np.array_equal(read_image(path).array, stored), "our own reader takes it, so a release can be a cohort"


def test_what_may_not_be_released_is_not_written(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    first = place.samples[0]
    assert first not in place.images(0, without=first)["sample_id"].tolist()
    assert not (place.release / f"sub-{first}").exists()


@pytest.mark.parametrize(
    ("verdict", "status", "gate", "words"),
    [
        ("PASS", "CALIBRATED", None, "Verdict: PASS. Every image was compared with every training scan by 2 detectors"),
        ("FAIL", "CALIBRATED", "membership, latent", "although it failed, because its study says so"),
        ("NOT_EVALUATED", "NOT_CALIBRATED", None, "39 unseen real subjects are needed for its level and there were 99"),
        ("NOT_EVALUATED", "NOT_CALIBRATED", "calibrated", "although the filter is none (calibrated), because its"),
    ],
)
def test_the_dataset_says_its_verdict(tmp_path: Path, verdict: str, status: str, gate: str | None, words: str) -> None:
    place = Workplace(tmp_path)
    figure = {"value": 1.0, "low": None, "high": None, "n": 9}
    failed = {"name": gate, "outcome": verdict, "figure": figure, "limit": 59, "meaning": ""}
    place.privacy["gates"] = [failed] if gate else []
    place.privacy["verdict"] = verdict
    place.privacy["calibration"]["status"] = status
    root = place.run()
    assert words in (root / "README.md").read_text()
    assert words in read_json(root / "dataset_description.json")["Description"]


def test_mark_survives_a_usual_edit(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    path = place.release / place.images(0)["path"][0]
    volume = nib.Nifti1Image.from_filename(path)
    nib.save(nib.Nifti1Image(volume.get_fdata() * 2, volume.affine, volume.header), tmp_path / "edited.nii.gz")
    assert read_mark(tmp_path / "edited.nii.gz") is not None


def test_picture(tmp_path: Path) -> None:
    place = Workplace(tmp_path, dims=2)
    table = place.images(0)
    path = place.release / table["path"][2]
    assert table["path"][2] == "images/demo000002.png"
    with PilImage.open(path) as picture:
        assert picture.mode == "L" and picture.info["Description"].startswith("SYNTHETIC")
        pixels = np.asarray(picture)
    assert np.abs(pixels / 255 - place.values["demo000002"][0].astype(np.float64)).max() <= 0.5 / 255 + 1e-9
    assert read_mark(path) == {"synthetic": True, "sample_id": "demo000002", "study": "test"}


@pytest.mark.parametrize("dims", [3, 2])
def test_equal_input_gives_equal_bytes(tmp_path: Path, dims: int) -> None:
    first, second = (files(Workplace(tmp_path / name, dims).run()) for name in ("a", "b"))
    assert first == second and len(first) == 4 + (9 if dims == 3 else 8)
    again = Workplace(tmp_path / "a", dims)
    again.run()
    assert files(again.release) == first, "a rerun in place changes nothing"


@pytest.mark.parametrize(("value", "words"), [(np.nan, "nan"), (1.5, "1.5"), (-0.5, "-0.5")])
def test_values_out_of_range_are_refused(tmp_path: Path, value: float, words: str) -> None:
    place = Workplace(tmp_path)
    broken = place.values["demo000003"].copy()
    broken[0, 5, 5, 5] = value
    place.write_shard(1, {"demo000003": broken})
    with pytest.raises(UserError, match=rf"demo000003 holds values .*{words}"):
        place.images(1)
    assert not (tmp_path / "images-1.parquet").exists()


def test_wrong_shape_and_wrong_names_are_refused(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    place.write_shard(0, {"demo000000": np.zeros((1, 4, 4, 4))})
    with pytest.raises(UserError, match=r"shape \(1, 4, 4, 4\), expected \(1, 12, 16, 14\)"):
        place.images(0)
    place.write_shard(0, {"../demo": place.values["demo000000"]})
    with pytest.raises(UserError, match="letters and digits only"):
        place.images(0)


def test_empty_shard(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    with ShardWriter(
        tmp_path / "generated-0.arrow", {"sample_id": pa.string(), "image": TensorColumn("float16", (1, *SHAPE[3]))}
    ):
        pass
    assert len(place.images(0)) == 0


# -------------------------------------------------------------------------------------------------- dataset


@pytest.mark.parametrize("dims", [3, 2])
def test_what_is_released_is_read_as_a_cohort(tmp_path: Path, dims: int) -> None:
    """Levels as odd as a table can hold; volumes as a BIDS dataset, pictures as a table."""
    levels = ['rare, "odd"', '"x"', "a\tb", "it's 5\""]
    place = Workplace(tmp_path, dims)
    place.study["covariates"] = place.study["covariates"] | {"dx": {"levels": levels}}
    place.plan["dx"] = levels
    root = place.run()
    covariates = parse_study(place.study, "test").covariates
    if dims == 3:
        frame = read_bids(BidsSource.model_validate({"source": "bids", "root": str(root)}), covariates)
    else:
        source = {"source": "table", "table": str(root / "participants.tsv"), "path_column": "image"}
        frame = read_table(TableSource.model_validate(source | {"subject_column": "participant_id"}), covariates)
    manifest, card = build_manifest(
        frame, covariates, Splits(train=0.75, val=0, calibration=0, test=0.25), "u", source="bids"
    )
    assert manifest["dx"].tolist() == levels and manifest["sex"].tolist()[:2] == ["F", "M"] and not card["undecodable"]
    assert manifest["ventricles_ml"].tolist()[0] == pytest.approx(20.1235)
    for path in manifest["path"]:
        read_image(path)


def test_a_table_of_added_subjects_is_read(tmp_path: Path) -> None:
    levels = ['rare, "odd"', '"x"', "a\tb"]
    write_added(
        tmp_path / "added.tsv",
        [
            Added(f"syn{i}", f"images/syn{i}.png", 9, "a", "b", "c", {"dx": x, "age": 50.25})
            for i, x in enumerate(levels)
        ],
    )
    table = load_table(tmp_path / "added.tsv")
    assert table["dx"].tolist() == levels and table["age"].tolist() == ["50.25"] * 3


def test_dataset(tmp_path: Path) -> None:
    root = Workplace(tmp_path).run()
    with open(root / "participants.tsv", encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream, delimiter="\t"))
    assert rows[0] == ["participant_id", "age", "sex", "ventricles_ml", "split"]
    cells = [row[:-1] for row in rows]
    assert cells[1:3] == [["sub-demo000000", "92.5", "F", "20.1235"], ["sub-demo000001", "n/a", "M", "30"]]
    assert {row[-1] for row in rows[1:]} <= {"train", "val", "test"}
    assert rows[3][2] == "n/a" and len(rows) == 5
    dictionary = read_json(root / "participants.json")
    assert (
        dictionary["age"]["Units"] == "year"
        and "requested" in dictionary["age"]["Description"]
        and "Age at scan" in dictionary["age"]["Description"]
    )
    assert dictionary["sex"]["Levels"] == {"F": "F", "M": "M"}
    description = read_json(root / "dataset_description.json")
    assert (
        description["DatasetType"] == "derivative"
        and description["BIDSVersion"] == "1.10.0"
        and description["License"] == "CC0"
    )
    assert description["GeneratedBy"][0]["Name"] == "meddiff_steps" and "SYNTHETIC" in description["Description"]
    sidecar = read_json(root / "T1w.json")
    assert sidecar["SkullStripped"] is True and sidecar["Synthesis"]["Synthetic"] is True
    assert "GeneratedBy" not in sidecar, "reserved by BEP028 for references"
    readme = (root / "README.md").read_text()
    assert (
        "SYNTHETIC" in readme
        and "30 real images" in readme
        and "Thanks to all." in readme
        and "ventricles_ml: in mL" in readme
    )
    assert "creativecommons.org/publicdomain/zero/1.0" in (root / "LICENSE").read_text()


def test_the_card_holds_figures_and_blanks(tmp_path: Path) -> None:
    place = Workplace(tmp_path, release={"card": {"intended_use": "Teaching."}})
    figure = {"value": 0.93, "low": 0.9, "high": 0.95, "n": 4}
    place.metrics = {
        "covariates": {
            "age": {"kind": "continuous", "r": figure | {"ceiling": {"value": 0.99}}},
            "sex": {"kind": "categorical", "auc": figure},
        },
        "realism": {"random": {"classifier_auc": figure | {"floor": {"value": 0.5, "low": 0.4, "high": 0.6}}}},
        "spectrum": {"synthetic": {"above_half": figure}},
    }
    gate = {"name": "copies", "figure": {"value": 0.01, "low": 0, "high": 0.02}, "limit": 0.05, "outcome": "PASS"}
    place.privacy |= {"gates": [gate], "counts": {"planned": 5, "released": 4, "failed": 1}}
    readme = (place.run() / "README.md").read_text()
    assert "- autoencoder: 1,234 parameters, learnt from 20 images; SHA-256 of its weights abab" in readme
    assert "- drawing decoder: 1,234 parameters" in readme
    assert "| age, r(requested, measured) | 0.93 [0.9, 0.95] | 0.99 |" in readme
    assert "| sex, AUC of reading what was asked for | 0.93 [0.9, 0.95] |  |" in readme
    assert "| told from real by a classifier on random features, AUC | 0.93 [0.9, 0.95] | 0.5 [0.4, 0.6] |" in readme
    assert "| copies | 0.01 [0, 0.02] | 0.05 | PASS |" in readme and "5 planned; 4 released; 1 given up" in readme
    assert (
        "What the cohort is meant for: Teaching." in readme
        and "release.card.contact in the study]" in readme
        and readme.count("[NOT STATED") == 4
    )
    assert "verify.py" in readme and "first model" not in readme
    people = place.card["subjects"]
    assert f"knows what the training part of a cohort of {people} subjects shows" in readme, "others were held out"
    place.metrics, place.study["second_model"], place.drawing = {}, {"subjects": 50}, False
    place.complete()
    readme = (place.release / "README.md").read_text()
    assert "- autoencoder: " in readme and "drawing decoder" not in readme
    assert "Not measured." in readme and "50 were made" in readme


def test_simulated_source_is_named(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    place.card["simulated"] = True
    told = (place.run() / "README.md").read_text()
    assert "simulated images (no real person was ever imaged)" in told
    assert "unseen simulated subjects" in told and "unseen real subjects" not in told


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_source_dataset_is_named_if_it_has_an_address(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "source").mkdir()
    described = {
        "Name": "Source",
        "SourceDatasets": [{"URL": "https://example.org/data", "Version": "2"}, {"URL": "file:///private/data"}],
    }
    (tmp_path / "source" / "dataset_description.json").write_text(json.dumps(described), encoding)
    place = Workplace(tmp_path, cohort={"source": "bids", "root": str(tmp_path / "source")})
    place.run()
    assert read_json(place.release / "dataset_description.json")["SourceDatasets"] == [
        {"URL": "https://example.org/data", "Version": "2"}
    ]
    assert str(tmp_path) not in "".join(
        p.read_text() for p in place.release.iterdir() if p.is_file() and p.suffix != ".png"
    )


def test_pictures_make_no_claim_to_be_bids(tmp_path: Path) -> None:
    root = Workplace(tmp_path, dims=2).run()
    description = read_json(root / "dataset_description.json")
    assert "BIDSVersion" not in description and "DatasetType" not in description and description["Synthetic"] is True
    table = pd.read_csv(root / "participants.tsv", sep="\t")
    assert table["image"].tolist() == [f"images/demo{i:06d}.png" for i in range(4)]
    assert all((root / path).is_file() for path in table["image"])
    assert not (root / "T1w.json").exists()


def test_missing_and_surplus_images_are_named(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    place.images(0), place.images(1)
    with pytest.raises(UserError, match=r"1 planned sample\(s\) have no image: demo000003"):
        place.complete((0,))
    assert not (place.release / "dataset_description.json").exists()
    with pytest.raises(UserError, match=r"more than one image: demo000003"):
        place.complete((0, 1, 1))
    place.plan = place.plan.iloc[:2]
    with pytest.raises(UserError, match=r"2 image\(s\) are not in the plan: demo000002, demo000003"):
        place.complete()


def test_missing_or_changed_file_is_named(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    place.run()
    path = place.release / image_path("demo000002", 3)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match="missing or changed: sub-demo000002/anat"):
        place.complete()
    path.unlink()
    with pytest.raises(UserError, match="missing or changed: sub-demo000002/anat"):
        place.complete()


def test_images_of_an_earlier_plan_are_removed_and_strangers_are_not(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    place.write_shard(2, {"demo000009": place.values["demo000000"]})
    place.images(2)
    partial = place.release / "sub-demo000009/anat/.partial-1-sub-demo000009_T1w.nii.gz"
    partial.write_bytes(b"killed")
    place.run()
    assert not (place.release / "sub-demo000009").exists()
    assert len(list(place.release.glob("sub-*"))) == 4

    stranger = place.release / "sub-real01/anat/sub-real01_T1w.nii.gz"
    stranger.parent.mkdir(parents=True)
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), stranger)
    with pytest.raises(UserError, match="not made by study 'test': sub-real01/anat"):
        place.complete()
    assert stranger.exists()


def test_description_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that was interrupted while it was completed again does not look whole."""
    place = Workplace(tmp_path)
    place.run()

    def fail(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.licences, "text", fail)
    with pytest.raises(KeyboardInterrupt):
        place.complete()
    assert not (place.release / "dataset_description.json").exists()


# -------------------------------------------------------------------------------------------- the validator


@pytest.mark.parametrize("suffix", ["T1w", "FLAIR", "CT"])
def test_bids_validator(tmp_path: Path, suffix: str, bids_report) -> None:
    place = Workplace(tmp_path)
    place.study["release"] = {**place.study["release"], "suffix": suffix}
    root = place.run()
    (root / ".bidsignore").write_bytes(seal.IGNORED + unknown_to_bids(suffix))  # as the seal, which comes after, does
    report = bids_report(root)
    # CITATION.cff has the authors, so that the description must not (an error), which the validator then misses there;
    # the licence is in both, for programs that read the description alone.
    known = {"TOO_FEW_AUTHORS", "SINGLE_SOURCE_CITATION_FIELDS"}
    issues = report["issues"]["issues"]
    assert [(i["code"], i.get("location")) for i in issues if i["code"] not in known] == []
    assert report["returncode"] == 0
    assert sorted(report["summary"]["subjects"]) == ([] if suffix == "CT" else place.samples), "CT is passed over"
