"""Image and mask pairs through plan, filter, release, audit and regeneration, by the steps themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from pairs_study import LEFT, RIGHT, PairsStudy, study_of, write_cohort

from meddiff_steps.audit.request import Request
from meddiff_steps.audit.run import audit
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.shards import Shards, ShardWriter
from meddiff_steps.models.masks import MaskModel
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.release.regeneration import regenerate
from meddiff_steps.release.sealed import open_release
from meddiff_steps.steps.filter import columns
from meddiff_steps.synthesis.generate import CohortGenerator


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> PairsStudy:
    folder = tmp_path_factory.mktemp("pairs")
    made = PairsStudy(folder / "results/pairs", study_of(write_cohort(folder / "data")))
    made.run()
    return made


@pytest.fixture(scope="module")
def findings(place: PairsStudy) -> dict[str, str]:
    report = audit(Request(place.root / "release", models=place.root, results=place.root, seed="audit"))
    assert [(check.name, check.text, check.examples) for check in report.checks if check.outcome == "finding"] == []
    return {check.name: f"{check.outcome}: {check.text}" for check in report.checks if check.level < 7}


def test_a_release_of_pairs_passes_its_audit_and_both_are_made_again_bit_by_bit(place, findings):
    count = len(list((place.root / "release").glob("sub-*")))
    assert count > 0
    assert findings["images"].startswith(f"pass: of {count} images made again")
    assert f"{count} are the same bit by bit" in findings["images"]
    assert findings["label-maps"].startswith(f"pass: {count} label maps that images were drawn from come out again")
    assert findings["weights"].startswith("pass") and findings["labels"].startswith("pass")


def test_an_audit_compares_label_maps_with_those_of_the_scans_again(place):
    request = Request(place.root / "release", results=place.root, seed="audit")
    checks = {check.name: check.text for check in audit(request).checks if check.level == 7}
    assert "is nearer to a training scan than 4 detectors allow" in checks["images"]


def test_the_lookup_table_names_the_structures_in_alphabetical_order(place):
    release = place.root / "release"
    table = pd.read_csv(release / "dseg.tsv", sep="\t")
    assert table.to_dict("list") == {"index": [1, 2], "name": ["left", "right"]}
    assert "drawn from" in json.loads((release / "dseg.json").read_text())["Description"]


def test_a_released_label_map_is_the_one_that_the_image_was_drawn_from(place):
    released = pd.read_parquet(place.root / "privacy/released.parquet")["sample_id"].tolist()
    table = pd.concat([pd.read_parquet(path) for path in place.each("images/shard-{}.parquet", place.planned)])
    for shard in place.each("filtered/shard-{}.arrow", place.planned):
        kept = Shards([shard])
        for row, name in enumerate(kept.column("sample_id")):
            if name not in released:
                continue
            written = nib.load(place.root / f"release/sub-{name}/anat/sub-{name}_dseg.nii.gz").get_fdata()
            labels = kept.tensor("labels", row)
            assert np.array_equal(written, labels)
            measured = table.set_index("sample_id").loc[name]
            assert measured["left_segmented"] == pytest.approx((labels == 1).sum() / 1000)
            assert measured["right_segmented"] == pytest.approx((labels == 2).sum() / 1000)


def test_recipes_name_the_weights_of_the_label_maps_too(place):
    rows = [json.loads(line) for line in (place.root / "release/provenance/ledger.jsonl").read_text().splitlines()]
    for kind in ("autoencoder", "diffusion"):
        card = json.loads((place.root / "masks" / kind / "card.json").read_text())
        assert {row["recipe"][f"mask_{kind}"] for row in rows} == {card["weights_sha256"]}
        assert rows[0]["recipe"][kind] != card["weights_sha256"]


def test_one_subject_is_made_again_alone_with_its_label_map(place, tmp_path):
    release = open_release(place.root / "release")
    row = next(iter(release.released()))
    (found,) = regenerate(release, [row], place.root, tmp_path, 1)
    assert (found.verdict, found.labels) == ("bitwise", "same")
    for part in ("image", "labels"):
        path = row[part]["path"]
        assert (tmp_path / path).read_bytes() == (place.root / "release" / path).read_bytes()


def test_other_weights_of_label_maps_are_told(place, tmp_path):
    for name in ("autoencoder", "decoder", "diffusion", "masks"):
        shutil.copytree(place.root / name, tmp_path / name)
    shutil.copy(place.root / "diffusion/model.safetensors", tmp_path / "masks/diffusion/model.safetensors")
    release = open_release(place.root / "release")
    with pytest.raises(UserError, match="no mask_diffusion with weights"):
        regenerate(release, list(release.released())[:1], tmp_path, tmp_path / "out", 1)


def test_the_image_follows_its_label_map(place):
    """Another label map, all else equal, gives another image; the same one the same."""
    fabric = make_fabric(place.study.compute, 1)
    model = TrainedModel.load(*(place.root / name for name in ("autoencoder", "diffusion")), fabric, toned=False)
    masks = MaskModel.load(place.root / "masks", fabric)
    maps = Shards(place.label_maps)
    given = maps.tensors("labels", [0, 1], None)
    assert not np.array_equal(given[0], given[1])
    plan = pd.read_parquet(place.plan).iloc[[0, 0]]
    generator = CohortGenerator(model, place.study.generate, masks)
    noise = np.repeat(np.random.default_rng(0).standard_normal((1, *model.latent_shape), np.float32), 2, 0)
    subjects = [("root", 0, 0)] * 2
    drawn = []
    for labels in (given, given[[0, 0]]):
        drawn.append(generator.latents(noise, model.condition(plan, masks.maps(labels)), subjects).numpy())
    assert not np.allclose(drawn[0][0], drawn[0][1], atol=1e-4)
    assert np.array_equal(drawn[1][0], drawn[1][1]) and np.array_equal(drawn[0][0], drawn[1][0])
    with pytest.raises(UserError, match=r"condition.maps: found channels \{\}"):
        generator.latents(noise, model.condition(plan), subjects)


def test_a_mask_that_is_a_copy_is_rejected_though_its_image_is_none(place, tmp_path):
    """A training scan's label map with a synthetic image: the detector of label maps alone fires, and both are drawn
    again."""
    scans = pd.read_parquet(place.manifest).set_index("scan_id")["split"]
    maps, shard = Shards(place.label_maps), place.planned[0]
    copied = next(row for row, scan in enumerate(maps.column("scan_id")) if scans[scan] == "train")
    drawn = Shards(place.each("generated/shard-{}.arrow", [shard]))
    changed = tmp_path / "generated.arrow"
    kinds = {name: column for name, column in columns(drawn.shape("image"), True).items() if name in drawn.schema.names}
    with ShardWriter(changed, kinds) as writer:
        for row, name in enumerate(drawn.column("sample_id")):
            labels = np.roll(maps.tensor("labels", copied), 1, 0) if row == 0 else drawn.tensor("labels", row)
            writer.append(sample_id=name, image=drawn.tensor("image", row), labels=labels)
    other = PairsStudy(tmp_path / "results", place.study)
    for name in ("autoencoder", "decoder", "diffusion", "masks", "instruments", "privacy", "latents", "plan.parquet"):
        source = place.root / name
        (shutil.copytree if source.is_dir() else shutil.copy)(
            source, other.root / name if source.is_dir() else other.root
        )
    other.filter(shard, changed)
    before, after = (
        pd.read_parquet(root / f"privacy/decisions/shard-{shard}.parquet") for root in (place.root, other.root)
    )
    first = drawn.column("sample_id")[0]
    was, now = (table[(table["sample_id"] == first) & (table["attempt"] == 0)].iloc[0] for table in (before, after))
    assert "labels" not in was["reason"]
    assert now["decision"] == "rejected" and "labels" in now["reason"].split(", ")
    assert now["similarity_labels"] == pytest.approx(1, abs=1e-5)
    again = after[(after["sample_id"] == first) & (after["attempt"] == 1)]
    assert len(again) == 1 and again["similarity_labels"].iloc[0] < now["similarity_labels"]


def test_controls_say_how_well_copies_of_label_maps_are_found(place):
    card = json.loads(place.calibration.read_text())
    assert card["status"] == "CALIBRATED" and card["structures"] == 2 and "labels" in card["thresholds"]
    positive = card["controls"]["positive"]
    kinds = [kind for kind in positive if kind.startswith("label map")]
    assert len(kinds) == 3 and positive["label map"]["value"] == 1 == positive["label map, shifted"]["value"]
    gates = {gate["name"]: gate for gate in json.loads((place.root / "privacy/report.json").read_text())["gates"]}
    assert gates["planted copies are found"]["figure"]["value"] == min(kind["value"] for kind in positive.values())


def test_the_study_of_segmenters_compares_all_arms(place):
    found = json.loads(place.compare_segmenters().read_text())
    assert found["primary"]["contrast"]["arm"] == "both_50" and found["verdict"] in ("helps", "no evidence", "harms")
    names = ["real_50", "both_50", "real_100", "both_100", "synthetic", "commonest_label"]
    assert [arm["name"] for arm in found["arms"]] == names
    pairs = {arm["name"]: arm["pairs"] for arm in found["arms"]}
    assert pairs["real_50"]["synthetic"] == 0 < pairs["both_50"]["synthetic"] and pairs["synthetic"]["real"] == 0
    assert pairs["both_50"]["real"] == pairs["real_50"]["real"] < pairs["real_100"]["real"]
    assert set(found["volumes_ml"]) == {"left", "right"}
    cases = pd.read_parquet(place.root / "segmentation_study/cases.parquet")
    test = pd.read_parquet(place.manifest).query("split == 'test'")["scan_id"]
    assert set(cases["scan_id"]) == set(test)


# ----------------------------------------------------------------------------------------------- bad input


def told(folder: Path, **pairs: object) -> PairsStudy:
    cohort = write_cohort(folder / "data", 20)
    content = {"channel": "seg", "structures": {"left": [LEFT], "right": [RIGHT]}} | pairs
    return PairsStudy(folder / "results/pairs", study_of(cohort, pairs=content))


def test_a_label_that_no_structure_has_is_refused_by_name(tmp_path):
    place = told(tmp_path, structures={"left": [LEFT]})
    with pytest.raises(UserError, match=rf"label {RIGHT} in \d+ voxels, which no structure of pairs.structures has"):
        place.preprocess()
    told(tmp_path / "other", structures={"left": [LEFT]}, outside=[RIGHT]).preprocess()
    maps = Shards(told(tmp_path / "other", structures={"left": [LEFT]}, outside=[RIGHT]).label_maps)
    assert maps.shape("image")[0] == 1 and maps.tensors("labels").max() == 1


def test_an_empty_label_map_is_refused_unless_it_is_allowed(tmp_path):
    place = told(tmp_path)
    empty = tmp_path / "data/seg/s03.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((16, 16, 16), np.uint8), np.eye(4)), empty)
    with pytest.raises(UserError, match=r"1 of \d+ scans show no structure of pairs.structures, s03 first"):
        place.preprocess()
    content = {"channel": "seg", "structures": {"left": [LEFT], "right": [RIGHT]}, "empty_share": 0.5}
    PairsStudy(tmp_path / "results/allowed", study_of(tmp_path / "data/cohort.csv", pairs=content)).preprocess()


def test_a_label_map_of_another_place_leaves_its_scan_out_and_says_why(tmp_path):
    place = told(tmp_path)
    scan = tmp_path / "data/seg/s03.nii.gz"
    moved = np.eye(4)
    moved[:3, 3] = 500
    nib.save(nib.Nifti1Image(nib.load(scan).get_fdata().astype(np.uint8), moved), scan)
    place.preprocess()
    row = pd.read_parquet(place.root / "preprocessed/qc.parquet").set_index("scan_id").loc["s03"]
    assert row["status"] == "left out" and row["reason"] == "channel seg: lies elsewhere"
    assert "s03" not in Shards(place.label_maps).column("scan_id")
