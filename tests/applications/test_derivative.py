"""Edited scans as a BIDS derivative."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from meddiff_steps.applications.derivative import EDITED, Source, complete, label, write_image


@pytest.mark.parametrize(
    ("scan_id", "place"),
    [
        ("sub-01_T1w", "sub-01/anat/sub-01_desc-x_T1w.nii.gz"),
        ("sub-01_ses-2_acq-mprage_T1w", "sub-01/ses-2/anat/sub-01_ses-2_acq-mprage_desc-x_T1w.nii.gz"),
        ("sub-01_desc-brain_T1w", "sub-01/anat/sub-01_desc-x_T1w.nii.gz"),
        ("patient 7/left", "sub-patient7left9bc068/anat/sub-patient7left9bc068_desc-x_FLAIR.nii.gz"),
        ("patient_7", "sub-patient7dd26db/anat/sub-patient7dd26db_desc-x_FLAIR.nii.gz"),
        ("patient7", "sub-patient7/anat/sub-patient7_desc-x_FLAIR.nii.gz"),
        ("sub-01", "sub-01/anat/sub-01_desc-x_FLAIR.nii.gz"),
    ],
)
def test_names(scan_id: str, place: str) -> None:
    assert str(Source(scan_id, "anywhere", "FLAIR").name("x", ".nii.gz")) == place


@pytest.mark.parametrize(
    ("one", "other"),
    [("case1_11", "case11_1"), ("Müller", "Möller"), ("p-1", "p1"), ("sub-Müller_T1w", "sub-Möller_T1w"), ("男", "女")],
)
def test_no_two_ids_or_levels_share_a_name(one: str, other: str) -> None:
    assert Source(one, "x").name("x", ".png") != Source(other, "x").name("x", ".png")
    assert label("grade", one) != label("grade", other) and label("grade", one).isascii()


def test_labels_of_values_are_letters_and_digits() -> None:
    assert label("ventricles_ml", 60.5) == "ventriclesml60p5"
    assert label("change", -2) == "changeminus2" and label("sex", "F") == "sexF"


def test_a_volume_keeps_its_grid_and_its_values(tmp_path: Path) -> None:
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    values = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32) * 1000
    place = write_image(tmp_path, Source("sub-01_T1w", "x"), "returned", values, affine, {"Covariate": "age"})
    image = nib.load(tmp_path / place)
    np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), values)
    np.testing.assert_array_equal(image.affine, affine)
    assert image.header["descrip"].tobytes().startswith(b"EDITED")
    sidecar = json.loads((tmp_path / place.replace(".nii.gz", ".json")).read_text())
    assert sidecar["Description"] == EDITED and sidecar["Covariate"] == "age"
    assert sidecar["Sources"] == ["bids:raw:sub-01_T1w"]


def test_a_picture_says_how_its_greys_are_to_be_read(tmp_path: Path) -> None:
    values = np.array([[-50.0, 0.0], [100.0, 300.0]], np.float32)
    place = write_image(tmp_path, Source("xray1", "x"), "sexFDifference", values, None, {})
    facts = json.loads((tmp_path / place.replace(".png", ".json")).read_text())
    low, high = facts["GreyValueOf0"], facts["GreyValueOf255"]
    read = low + np.asarray(Image.open(tmp_path / place), float) / 255 * (high - low)
    np.testing.assert_allclose(read, values, atol=(high - low) / 510 + 1e-6)


@pytest.mark.skipif(
    not Path(sys.executable).with_name("bids-validator-deno").exists(), reason="bids-validator-deno is not installed"
)
def test_the_bids_validator_takes_it(tmp_path: Path) -> None:
    facts = {"Covariate": "age", "SkullStripped": True}
    for name in ("returned", label("age", 70), label("age", 70) + "Difference"):
        write_image(tmp_path, Source("sub-01_T1w", "x"), name, np.ones((8, 8, 8)), np.eye(4), facts)
    complete(tmp_path, "Counterfactuals", "# Counterfactuals\n\nSome.\n", {"autoencoder": "0", "diffusion": "1"})
    command = [str(Path(sys.executable).with_name("bids-validator-deno")), "--json", str(tmp_path)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    errors = [issue for issue in found["issues"]["issues"] if issue["severity"] == "error"]
    assert errors == []
