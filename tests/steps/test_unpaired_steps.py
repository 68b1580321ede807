"""Translation without pairs and harmonisation, by the steps themselves: cohort to derivative."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from meddiff_steps import config
from meddiff_steps.core.errors import UserError
from meddiff_steps.provenance.record import recorded

SIDE, PEOPLE = 16, 48
NETWORK: dict[str, Any] = {"block": 4, "channels": [8], "num_res_blocks": 1}
OPTIMISER = {"steps": 3, "batch_size": 4, "warmup_steps": 1}
STUDY: dict[str, Any] = {
    "study": "sites",
    "covariates": {"age": {"unit": "year", "range": [0, 100]}, "site": {"levels": ["A", "B", "C"]}},
    "splits": {"train": 0.5, "val": 0.1, "calibration": 0.0, "test": 0.4},
    "preprocess": {"shape": [SIDE, SIDE], "spacing_mm": None, "shards": 1},
    "plan": [{"name": "none", "subjects": 1}],
    "evaluate": {"bootstrap": 100},
    "compute": {"device": "cpu", "precision": "32-true"},
    "translation": {
        "source": ["image"],
        "target": ["other"],
        "samples": 2,
        "num_inference_steps": 2,
        "optimiser": OPTIMISER,
        "unpaired": {**NETWORK, "num_inference_steps": 2, "critic_channels": 8, "optimiser": OPTIMISER},
        **NETWORK,
    },
    "harmonisation": {
        "covariate": "site",
        "to": "A",
        "samples": 2,
        "most_images": 2,
        "unpaired": {**NETWORK, "num_inference_steps": 2, "critic_channels": 8, "optimiser": OPTIMISER},
    },
}


def write_cohort(folder: Path) -> Path:
    """Heads with a hole that grows with age; sites B and C are brighter; `other` is the negative of a head."""
    for name in ("image", "other"):
        (folder / name).mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    y, x = np.indices((SIDE, SIDE)) - SIDE / 2 + 0.5
    for i in range(PEOPLE):
        age, site = float(rng.uniform(20, 80)), "ABAC"[i % 4]
        head = np.hypot(x, y) < 7
        image = np.where(head, 120 + 40 * (site != "A") + rng.normal(0, 5, x.shape), 0)
        image[np.hypot(x, y) < 1 + age / 20] = 50
        for name, picture in (("image", image), ("other", np.where(head, 230 - image, 0))):
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / name / f"s{i}.png")
        rows.append({"subject_id": f"p{i}", "path": f"image/s{i}.png", "age": age, "site": site})
    pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)
    return folder / "cohort.csv"


class Place:
    def __init__(self, folder: Path) -> None:
        table = write_cohort(folder / "data")
        content = STUDY | {"cohort": {"source": "table", "table": str(table)}}
        channel = {"path": f"{folder}/data/other/{{scan_id}}.png"}
        content["preprocess"] = STUDY["preprocess"] | {"channels": {"other": channel}}
        self.root, self.study = folder / "results", config.parse_study(content, "sites")
        self.manifest, self.qc = self.root / "manifest.parquet", self.root / "qc.parquet"
        self.images = [self.root / "shard-0000.arrow"]

    def step(self, name: str, **files: Any) -> None:
        """Run a step with its record, as its rule does."""
        run = import_module(f"meddiff_steps.steps.{name}").run
        recorded(name, run)(config=config.freeze(self.study, name, self.root / "config"), **files)

    def preprocess(self) -> None:
        self.step("cohort", out=self.manifest, card=self.root / "card.json")
        table = self.root / "qc-0.parquet"
        self.step("preprocess", manifest=self.manifest, shard=0, out=self.images[0], qc=table)
        self.step("quality", qc=[table], out=self.qc)

    def train(self, name: str) -> Path:
        given = {"manifest": self.manifest, "images": self.images, "state": self.root / "state" / name}
        self.step(name, **given, out=self.root / name)
        return self.root / name

    def apply(self, name: str, **folders: Path) -> dict[str, Any]:
        given = {"manifest": self.manifest, "qc": self.qc, "images": self.images, "out": self.root / name}
        self.step(name, **given, **folders)
        found: dict[str, Any] = json.loads((self.root / name / "figures.json").read_text())
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = Place(tmp_path_factory.mktemp("sites"))
    made.preprocess()
    return made


def test_translation_without_pairs_stands_beside_that_with_pairs(place: Place) -> None:
    unpaired = place.train("translation_unpaired")
    card = json.loads((unpaired / "card.json").read_text())
    assert {side: each["columns"] for side, each in card["groups"].items()} == {"a": ["image"], "b": ["other"]}
    manifest = pd.read_parquet(place.manifest)
    counts = {side: scans["train"] for side, scans in card["scans"].items()}
    assert sum(counts.values()) == (manifest["split"] == "train").sum() and abs(counts["a"] - counts["b"]) <= 1
    found = place.apply("translation", model=place.train("translation_model"), unpaired=unpaired)
    methods = {entry["method"]: entry for entry in found["methods"]}
    assert {"copy_of_image", "patches", "regression", "draws"} < set(methods)
    for way in ("unpaired_guess", "unpaired_mean", "unpaired_draws"):
        assert methods[way]["psnr"]["low"] <= methods[way]["psnr"]["value"] <= methods[way]["psnr"]["high"]
        assert methods[way]["gain"]["beyond"] in ("patches", "copy_of_image")
    assert found["model"]["unpaired"] == card["weights_sha256"]
    assert (place.root / "translation/contact-sheet.png").is_file()


def test_harmonisation_writes_images_and_figures(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    model = place.train("harmonisation_model")
    card = json.loads((model / "card.json").read_text())
    manifest = pd.read_parquet(place.manifest).set_index("scan_id")
    train = manifest[manifest["split"] == "train"]
    assert card["scans"]["b"]["train"] == (train["site"] == "A").sum()
    assert card["scans"]["a"]["train"] == (train["site"] != "A").sum()
    step, held = import_module("meddiff_steps.steps.harmonisation"), list[int]()
    made = step._ways

    def counted(*args: Any) -> dict[str, np.ndarray]:
        ways: dict[str, np.ndarray] = made(*args)
        held.append(len(ways))
        return ways

    monkeypatch.setattr(step, "_ways", counted)
    found = place.apply("harmonisation", model=model)
    assert max(held) == 2, "one way at a time, but for those that come of the same draws"
    methods = {entry["method"]: entry for entry in found["methods"]}
    assert list(methods) == ["none", "z_score", "histogram", "guess", "draw", "mean_of_draws"]
    assert methods["none"]["site_auc"]["value"] > 0.9
    assert methods["none"]["anatomy"] == {} and methods["histogram"]["anatomy"]["correlation"]["value"] > 0.9
    assert methods["histogram"]["covariates"]["age"]["r"]["value"] > 0.5
    assert set(found["features"]) == {"none", "combat"}
    written = sorted((place.root / "harmonisation").glob("sub-*/anat/*desc-harmonised*.png"))
    assert len(written) == 2
    for path in written:
        assert np.asarray(Image.open(path)).shape == (SIDE, SIDE)
    rows = pd.read_parquet(place.root / "harmonisation/measurements.parquet")
    assert (manifest.loc[rows["scan_id"], "site"] != "A").all()


def test_a_study_without_unpaired_trains_nothing(place: Place) -> None:
    translation = place.study.translation.model_copy(update={"unpaired": None})
    other = place.study.model_copy(update={"translation": translation})
    frozen = config.freeze(other, "translation_unpaired", place.root / "config")
    run = import_module("meddiff_steps.steps.translation_unpaired").run
    with pytest.raises(UserError, match="translation.unpaired: not set"):
        run(frozen, place.manifest, place.images, place.root / "x", place.root / "state")
