"""Registration: a pose that is known is found, a scan is interpolated once, and the way back leads there."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial.transform import Rotation
from test_preprocess import DATA, frozen, manifest_of, save, world

from meddiff_steps.config import Preprocess, Registration, SimulatedSource, without_paths
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import sha256_file
from meddiff_steps.imaging.preprocess import preprocess_image, preprocess_scan, preprocess_shard
from meddiff_steps.imaging.reading import ScanError
from meddiff_steps.imaging.registration import REGISTRATION_COLUMNS, load_template, registered
from meddiff_steps.imaging.restoration import restore
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.simulation.brains import CENTRE_MNI, draw_pose, make_lattice, simulate_subject
from meddiff_steps.simulation.brains import load_template as atlas
from meddiff_steps.steps import preprocess as preprocess_step

SHAPE, SPACING = (32, 40, 32), 5.0


def config(registration: dict[str, Any] | None = None, **changes: Any) -> Preprocess:
    base = {"shape": SHAPE, "spacing_mm": SPACING, "registration": registration or {}}
    return Preprocess.model_validate(base | changes)


@cache
def brain(index: int) -> tuple[np.ndarray, np.ndarray]:
    """A simulated brain and its affine."""
    lattice = make_lattice(SHAPE, SPACING)
    subject = simulate_subject(SimulatedSource(), "registration", index, lattice, atlas(lattice.blur_mm))
    return subject.images["T1w"], lattice.affine


def moved(affine: np.ndarray, degrees: tuple[float, float, float], mm: tuple[float, float, float]) -> np.ndarray:
    """The affine after a turn about the world's origin and a shift."""
    motion = np.eye(4)
    motion[:3, :3], motion[:3, 3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix(), mm
    return motion @ affine


def matrix(facts: dict[str, Any], name: str = "registration_matrix") -> np.ndarray:
    return np.array(json.loads(facts[name])).reshape(4, 4)


def apart(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Two rigid transforms of the template's world: degrees, and mm in the middle of the brain."""
    angle = np.degrees(np.linalg.norm(Rotation.from_matrix(a[:3, :3].T @ b[:3, :3]).as_rotvec()))
    return float(angle), float(np.linalg.norm((a - b) @ [*CENTRE_MNI, 1]))


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return save(tmp_path / "scan.nii.gz", *brain(0))


# --------------------------------------------------------------------------------------------------- the pose


@pytest.mark.parametrize("degrees", [(0, 0, 0), (15, -4, 3), (-40, 0, 0), (4, 3, 25)])
def test_a_known_motion_is_found(tmp_path: Path, scan: Path, degrees: tuple[float, float, float]) -> None:
    """Of the same brain; in other voxels (interpolated, on a grid that lies as the world does), too."""
    values, affine = brain(0)
    upright = matrix(preprocess_image(scan, config())[1])
    turned = moved(affine, degrees, (7, -11, 5))
    free = config({"max_rotation_deg": 60})
    _, facts = preprocess_image(save(tmp_path / "turned.nii.gz", values, turned), free)
    expected = turned @ np.linalg.inv(affine) @ upright
    angle, mm = apart(matrix(facts), expected)
    assert angle < 0.5 and mm < 0.5

    grid = np.diag([4.0, 4.0, 4.0, 1.0])
    grid[:3, 3] = turned @ [*(np.array(SHAPE) - 1) / 2, 1] @ np.eye(4)[:, :3] - 4 * 24.5
    index = np.linalg.inv(turned) @ grid
    other = ndimage.affine_transform(values.astype(np.float32), index[:3, :3], index[:3, 3], (50, 50, 50), order=1)
    _, facts = preprocess_image(save(tmp_path / "other.nii.gz", other, grid), free)
    angle, mm = apart(matrix(facts), expected)
    assert angle < 1 and mm < 1


def test_simulated_heads_lose_their_pose(tmp_path: Path) -> None:
    """What is left is how a brain's own shape looks turned."""
    left, correlation = [], []
    for index in range(8):
        _, facts = preprocess_image(save(tmp_path / "scan.nii.gz", *brain(index)), config())
        pose, found = draw_pose("registration", index), matrix(facts)
        left.append(Rotation.from_matrix(pose.rotation.T @ found[:3, :3]).as_euler("xyz", degrees=True))
        correlation.append(facts["registration_correlation"])
        assert np.linalg.norm(found @ [*CENTRE_MNI, 1] - [*pose.shift, 1]) < 8
    drawn = [
        Rotation.from_matrix(draw_pose("registration", i).rotation).as_euler("xyz", degrees=True) for i in range(8)
    ]
    assert np.std(left, axis=0).max() < 3 < np.std(drawn, axis=0).max()
    assert min(correlation) > 0.9


def test_the_facts_fit_together(scan: Path) -> None:
    _, facts = preprocess_image(scan, config())
    template, found = load_template("mni152"), matrix(facts)
    assert np.allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3)) and np.linalg.det(found[:3, :3]) > 0
    assert facts["registration_template"] == "mni152" and facts["registration_template_sha256"] == template.sha256
    angle, _ = apart(found, np.eye(4))
    assert facts["registration_rotation_deg"] == pytest.approx(angle)
    away = found @ [*template.centre, 1] - [*template.centre, 1]
    assert facts["registration_translation_mm"] == pytest.approx(np.linalg.norm(away))
    assert 0.8 < facts["registration_scale"] < 1.1
    grid = np.diag([SPACING] * 3 + [1.0])
    grid[:3, 3] = template.centre - SPACING * (np.array(SHAPE) - 1) / 2
    assert np.allclose(matrix(facts, "target_affine"), found @ grid, atol=1e-6)
    assert set(REGISTRATION_COLUMNS) <= set(facts) and not [k for k in REGISTRATION_COLUMNS if facts[k] is None]
    plain = preprocess_image(scan, config().model_copy(update={"registration": None}))[1]
    assert {plain[name] for name in REGISTRATION_COLUMNS} == {None}


@pytest.mark.parametrize("transform", ["rigid", "affine"])
def test_rigid_keeps_volumes_and_affine_does_not(tmp_path: Path, transform: str) -> None:
    ratios, scales = [], []
    for index in range(4):
        values, affine = brain(index)
        file = save(tmp_path / "scan.nii.gz", values, affine)
        image, facts = preprocess_image(file, config({"transform": transform}))
        ratios.append((image > 0.3).sum() / (values > 0.3 * facts["percentile_high"]).sum())
        scales.append(np.linalg.det(matrix(facts)[:3, :3]))
    assert np.allclose(scales, 1) == (transform == "rigid")
    assert np.allclose(np.array(ratios) * scales, 1, atol=0.03)


# ------------------------------------------------------------------------------------------- one interpolation


@pytest.mark.parametrize(("spacing", "order"), [(5.0, 3), (2.5, 3), (8.0, 1)])
def test_a_scan_is_interpolated_once(scan: Path, spacing: float, order: int) -> None:
    """From the file's voxels to the grid by one map: linearly after a Gaussian where the grid is coarser, by cubic
    splines where it is not.
    """
    image, facts = preprocess_image(scan, config(spacing_mm=spacing))
    values, affine = brain(0)
    template = load_template("mni152")
    grid = np.diag([spacing] * 3 + [1.0])
    grid[:3, 3] = template.centre - spacing * (np.array(SHAPE) - 1) / 2
    index = np.linalg.inv(affine) @ matrix(facts) @ grid
    sigma = np.sqrt(max(0, (spacing / SPACING) ** 2 - 1) / (8 * np.log(2)))
    smooth = ndimage.gaussian_filter(values.astype(np.float32), sigma, mode="nearest")
    once = ndimage.affine_transform(smooth, index[:3, :3], index[:3, 3], SHAPE, order=order, mode="nearest")
    low, high = facts["percentile_low"], facts["percentile_high"]
    expected = np.clip((once - low) / (high - low), 0, 1)
    near = image[0] > 0
    assert near.mean() > 0.05 and np.abs(image[0] - expected)[near].max() < 1e-5
    assert low >= 0 and not image[0][once <= 0].any(), "what splines overshoot is neither darkest grey nor background"


def test_what_lies_as_the_template_does_is_hardly_blurred(tmp_path: Path) -> None:
    """Half of the finest detail would be lost by linear interpolation between voxels of the grid's own size."""
    values, affine = brain(1)

    def detail(image: np.ndarray) -> float:
        power = np.abs(np.fft.fftn(image)) ** 2
        radius = np.sqrt(sum(f**2 for f in np.meshgrid(*[2 * np.fft.fftfreq(n) for n in image.shape], indexing="ij")))
        return float(power[(radius > 0.5) & (radius < 1)].sum())

    image, facts = preprocess_image(save(tmp_path / "scan.nii.gz", values, affine), config())
    assert 0.7 < detail(image[0]) / detail(values / facts["percentile_high"]) < 1.1


# ---------------------------------------------------------------------------------------------- what follows it


def test_masks_labels_and_contrasts_follow(tmp_path: Path, scan: Path) -> None:
    """Also on voxels of their own."""
    values, affine = brain(0)
    labels = np.digitize(values, [1, 90, 140]).astype(np.int16)
    fine = affine @ np.diag([0.5, 0.5, 0.5, 1])
    fine[:3, 3] = affine[:3, 3] - 1.25
    files = {
        "parts": save(tmp_path / "parts.nii.gz", labels, affine),
        "finer": save(tmp_path / "finer.nii.gz", labels.repeat(2, 0).repeat(2, 1).repeat(2, 2), fine),
        "inside": save(tmp_path / "inside.nii.gz", (values > 0).astype(np.uint8), affine),
        "again": scan,
    }
    kinds = {"parts": "labels", "finer": "labels", "inside": "mask", "again": "contrast"}
    channels = {name: {"path": str(file), "kind": kinds[name]} for name, file in files.items()}
    arrays, facts = preprocess_scan(scan, config(channels=channels), channels=files)
    assert np.array_equal(arrays["again"], arrays["image"].astype(np.float16))
    white = arrays["image"][0][arrays["parts"][0] == 3].mean()
    grey = arrays["image"][0][arrays["parts"][0] == 2].mean()
    assert white > grey + 0.15, "labels lie on what they name"
    assert (arrays["finer"] == arrays["parts"]).mean() > 0.95
    bright = arrays["image"][0] > 0.3
    assert (arrays["inside"][0].astype(bool) | ~bright).mean() > 0.99
    assert np.bincount(arrays["parts"].ravel())[1:] == pytest.approx(np.bincount(labels.ravel())[1:], rel=0.05)

    back, found = restore(arrays["parts"], facts, kind="labels")
    assert found is not None and np.array_equal(found, affine) and back.shape == labels.shape
    for part in (2, 3):
        overlap = 2 * ((back == part) & (labels == part)).sum() / ((back == part).sum() + (labels == part).sum())
        assert overlap > 0.8, "Dice, after two nearest neighbours of 5 mm"


def test_the_way_back_leads_there(tmp_path: Path) -> None:
    values, affine = brain(2)
    turned = moved(affine, (12, -5, 4), (30, -20, 15))
    image, facts = preprocess_image(save(tmp_path / "scan.nii.gz", values, turned), config(percentiles=(0, 100)))
    restored, found = restore(image, facts, order=3)
    assert found is not None and np.allclose(found, turned, atol=1e-4) and restored.shape == values.shape
    inside = ndimage.binary_erosion(values > 0, iterations=2)
    assert np.corrcoef(restored[inside], values[inside])[0, 1] > 0.97
    assert np.abs(restored - values)[inside].mean() < 0.02 * np.ptp(values)
    # A marked point comes back to where it was.
    mark = np.zeros(SHAPE)
    mark[20, 25, 18] = 1
    back, _ = restore(ndimage.gaussian_filter(mark, 1.5), facts, order=3)
    back = back - facts["percentile_low"]
    centre = (back[..., np.newaxis] * world(turned, SHAPE)).sum(axis=(0, 1, 2)) / back.sum()
    assert np.linalg.norm(centre - (matrix(facts, "target_affine") @ [20, 25, 18, 1])[:3]) < 0.5


# ------------------------------------------------------------------------------------------------- determinism


def test_bits_do_not_depend_on_threads_or_on_who_shares_a_shard(tmp_path: Path) -> None:
    names = [f"sub-{i}" for i in range(3)]
    paths = [str(save(tmp_path / f"{name}.nii.gz", *brain(i))) for i, name in enumerate(names)]
    rows = pd.DataFrame({"scan_id": names, "subject_id": names, "path": paths})
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    tables, shards = [], []
    try:
        for threads, itk, chosen in ((1, 1, rows), (2, 8, rows), (1, 8, rows[1:2])):
            sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(itk)
            out = tmp_path / f"{len(tables)}.arrow"
            tables.append(preprocess_shard(chosen, config(shards=1), out, threads).set_index("scan_id"))
            shards.append(Shards([out]).tensors("image", range(len(chosen))))
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
    assert np.array_equal(shards[0], shards[1]) and np.array_equal(shards[0][1:2], shards[2])
    pd.testing.assert_frame_equal(tables[0], tables[1])
    pd.testing.assert_frame_equal(tables[0].loc[["sub-1"]], tables[2])
    told = registered(tables[0].reset_index())
    assert told is not None and told.startswith("3 scans registered to mni152")
    assert registered(tables[0].reset_index().assign(registration_rotation_deg=np.nan)) is None


# ---------------------------------------------------------------------------------------------------- failures


def test_what_is_no_head_is_left_out(tmp_path: Path) -> None:
    _, affine = brain(0)
    noise = np.random.default_rng(0).integers(1, 255, SHAPE).astype(np.uint8)
    file = save(tmp_path / "noise.nii.gz", noise, affine)
    with pytest.raises(
        ScanError, match=r"correlates with mni152 by 0\.\d\d.*min_correlation \(0\.8\).*Look at the scan"
    ):
        preprocess_image(file, config())
    rows = pd.DataFrame({"scan_id": ["a"], "subject_id": ["a"], "path": [str(file)]})
    table = preprocess_shard(rows, config(), tmp_path / "s.arrow")
    assert table["status"].tolist() == ["left out"] and table["reason"].tolist() == ["registration: low correlation"]


def test_a_head_that_lies_on_its_side_is_left_out(tmp_path: Path) -> None:
    values, affine = brain(0)
    file = save(tmp_path / "scan.nii.gz", values, moved(affine, (0, 0, 55), (0, 0, 0)))
    with pytest.raises(ScanError, match=r"turned by 5\d degrees.*max_rotation_deg \(45\)") as caught:
        preprocess_image(file, config())
    assert caught.value.reason == "registration: implausible rotation"


def test_pictures_are_refused_when_the_study_is_read() -> None:
    with pytest.raises(ValueError, match=r"3D shape.*\[64, 64\].*leave preprocess.registration out"):
        Preprocess.model_validate({"shape": [64, 64], "spacing_mm": None, "registration": {}})


def test_a_template_that_cannot_be_used_is_refused_before_any_scan(tmp_path: Path) -> None:
    (tmp_path / "text.nii").write_text("no image")
    save(tmp_path / "series.nii", np.ones((4, 4, 4, 3), np.float32), np.eye(4))
    save(tmp_path / "slice.nii", np.random.default_rng(0).random((9, 9, 1)).astype(np.float32), np.eye(4))
    for name, said in {
        "gone.nii": "no such file",
        "text.nii": "expected NIfTI",
        "series.nii": "one 3D volume",
        "slice.nii": "not a slice",
    }.items():
        path = tmp_path / name
        settings = frozen(tmp_path, "preprocess", registration={"template": str(path)})
        with pytest.raises(UserError, match=rf"preprocess\.registration\.template: .*{said}.*or mni152"):
            preprocess_step.run(
                settings, tmp_path / "none.parquet", 0, tmp_path / "s.arrow", tmp_path / "s.parquet", template=path
            )
    settings = frozen(tmp_path, "preprocess", registration={"template": "/data/head.nii"})
    with pytest.raises(UserError, match=r"--template None.*is /data/head.nii.*record"):
        preprocess_step.run(settings, tmp_path / "none.parquet", 0, tmp_path / "s.arrow", tmp_path / "s.parquet")


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    """Another brain, at another place and turned: scans come into its pose."""
    values, affine = brain(3)
    file = save(tmp_path / "own.nii.gz", values, moved(affine, (10, 0, 0), (40, 0, 0)))
    scan = save(tmp_path / "a.nii.gz", *brain(3))
    rows = pd.DataFrame({"scan_id": ["a"], "subject_id": ["a"], "session_id": [None], "path": [str(scan)]})
    settings = frozen(tmp_path, "preprocess", registration={"template": str(file)}, shards=1)
    manifest = manifest_of(rows, tmp_path / "manifest.parquet")
    preprocess_step.run(settings, manifest, 0, tmp_path / "s.arrow", tmp_path / "s.parquet", template=file)
    facts = pd.read_parquet(tmp_path / "s.parquet").iloc[0].to_dict()
    assert facts["registration_template"] == "own.nii.gz"
    assert facts["registration_template_sha256"] == sha256_file(file)
    assert facts["registration_rotation_deg"] == pytest.approx(10, abs=0.5)
    assert facts["registration_scale"] == pytest.approx(1, abs=0.01) and facts["registration_correlation"] > 0.99
    public = without_paths(json.loads(settings.read_text()))
    assert public["preprocess"]["registration"]["template"] == "(path)"
    shown = without_paths({"preprocess": {"registration": Registration().model_dump()}})
    assert shown["preprocess"]["registration"]["template"] == "mni152"


def test_the_template_is_what_the_docs_say() -> None:
    """A brain without skull; its digest is that of nilearn's wheel, whatever this machine is."""
    template = load_template("mni152")
    assert np.allclose(template.centre, CENTRE_MNI)
    assert (template.coarse.array == 0).mean() > 0.4, "no skull, and air around it"
    assert len(template.sha256) == hashlib.sha256().digest_size * 2


# ---------------------------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not (DATA / "ixi").is_dir(), reason=f"{DATA}/ixi is not there")
def test_real_heads_come_into_one_pose_and_keep_their_volume() -> None:
    scans = sorted((DATA / "ixi").glob("sub-*/anat/*_T1w.nii.gz"))[:6]
    grid = {"shape": (40, 48, 40), "spacing_mm": 4.0}
    before = [preprocess_image(scan, config(**grid).model_copy(update={"registration": None})) for scan in scans]
    after = [preprocess_image(scan, config(**grid)) for scan in scans]
    apart_before, apart_after = (np.var([image[0] for image, _ in found], axis=0).mean() for found in (before, after))
    assert apart_after < 0.75 * apart_before
    assert min(facts["registration_correlation"] for _, facts in after) > 0.85
    assert max(facts["cut_off_share"] for _, facts in after) < 0.01
    volumes = [[(image > 0.3).sum() for image, _ in found] for found in (before, after)]
    assert volumes[1] == pytest.approx(volumes[0], rel=0.02)
