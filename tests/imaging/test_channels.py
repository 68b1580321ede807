"""Channels of a scan: on its grid, each in its own way, listed by the shards themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image as PilImage
from scipy import ndimage
from test_preprocess import (
    DATA,
    SCANS,
    affine_of,
    config,
    config_2d,
    frozen,
    picture,
    rotation,
    save,
    scan,
    world,
)

from meddiff_steps.config import Channel, Preprocess, load_stage, without_paths
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.channels import absent_channels, channels_of
from meddiff_steps.imaging.preprocess import QC_COLUMNS, preprocess_image, preprocess_scan, preprocess_shard
from meddiff_steps.imaging.reading import ScanError
from meddiff_steps.imaging.resampling import majority
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.imaging.variants import Variant
from meddiff_steps.steps import quality as quality_step

CHANNELS = {
    "t2": {"path": "{subject_id}_t2.nii.gz"},
    "lesion": {"path": "{subject_id}_lesion.nii.gz", "kind": "mask", "required": False},
    "parts": {"path": "{subject_id}_parts.nii.gz", "kind": "labels"},
}


def study(folder: Path, **changes: Any) -> Preprocess:
    channels = {name: {**one, "path": str(folder / str(one["path"]))} for name, one in CHANNELS.items()}
    return config(**{"channels": channels, **changes})


def ball(affine: np.ndarray, shape: tuple[int, ...], radius: float, centre: tuple[float, ...] = (10, -20, 30)) -> Any:
    """Voxels within `radius` mm of a point; that in the middle of every scan of `affine_of` by default."""
    return np.linalg.norm(world(affine, shape) - np.array(centre), axis=-1) < radius


def cohort(folder: Path, count: int = 3) -> pd.DataFrame:
    """Scans with all channels but sub-1, who has no lesion mask."""
    rows = []
    for i in range(count):
        shape, affine = (26, 30, 28), affine_of("LAS", (4, 4, 4), (26, 30, 28), rotation(i, 0, 0))
        rng = np.random.default_rng(i)
        path = save(folder / f"sub-{i}.nii.gz", rng.integers(1, 900, shape).astype(np.float32), affine)
        save(folder / f"sub-{i}_t2.nii.gz", rng.integers(-50, 90, shape).astype(np.float32), affine)
        parts = np.where(ball(affine, shape, 30), 207, 4) * ball(affine, shape, 40)
        save(folder / f"sub-{i}_parts.nii.gz", parts.astype(np.int16), affine)
        if i != 1:
            save(folder / f"sub-{i}_lesion.nii.gz", ball(affine, shape, 20).astype(np.uint8) * 7, affine)
        rows.append({"scan_id": f"sub-{i}", "subject_id": f"sub-{i}", "session_id": None, "path": str(path)})
    return pd.DataFrame(rows)


# --------------------------------------------------------------------------------------------------- shards


def test_shards_hold_every_channel_and_say_what_it_is(tmp_path: Path) -> None:
    rows = cohort(tmp_path)
    table = preprocess_shard(rows, study(tmp_path), tmp_path / "s.arrow")
    shards = Shards([tmp_path / "s.arrow"])
    assert channels_of(shards) == {"t2": "contrast", "lesion": "mask", "parts": "labels"}
    stored = {name: shards.tensors(name, dtype=None) for name in channels_of(shards)}
    assert {name: str(values.dtype) for name, values in stored.items()} == {
        "t2": "float16",
        "lesion": "uint8",
        "parts": "int16",
    }
    assert all(values.shape == (3, 1, 24, 32, 28) for values in stored.values())
    assert stored["t2"].min() == 0 and stored["t2"].max() == 1
    assert set(np.unique(stored["lesion"])) == {0, 1} and set(np.unique(stored["parts"])) == {0, 4, 207}
    assert not stored["lesion"][1].any() and stored["lesion"][0].any()
    facts = [
        "channel_t2_present",
        "channel_t2_percentile_low",
        "channel_t2_percentile_high",
        "channel_lesion_present",
        "channel_lesion_on_head",
        "channel_parts_present",
        "channel_parts_on_head",
    ]
    assert list(table.columns) == [*QC_COLUMNS, *facts]
    assert table["channel_lesion_present"].tolist() == [True, False, True]
    assert table["channel_t2_percentile_low"].tolist() == pytest.approx([-50] * 3, abs=1)
    assert absent_channels(table) == "of 3 usable scans these channels are lacking, stored as 0: lesion for 1"
    assert absent_channels(table.drop(index=1)) is None


def test_a_study_without_channels_is_as_it_was(tmp_path: Path) -> None:
    rows = cohort(tmp_path)
    table = preprocess_shard(rows, config(), tmp_path / "without.arrow")
    preprocess_shard(rows, study(tmp_path), tmp_path / "with.arrow")
    without, beside = Shards([tmp_path / "without.arrow"]), Shards([tmp_path / "with.arrow"])
    assert list(table.columns) == list(QC_COLUMNS) and channels_of(without) == {} and absent_channels(table) is None
    assert without.schema.names == ["scan_id", "image"] and without.schema.metadata is None
    assert without.tensors("image").tobytes() == beside.tensors("image").tobytes()


def test_workers_change_no_byte_of_channels(tmp_path: Path) -> None:
    rows = cohort(tmp_path)
    serial = preprocess_shard(rows, study(tmp_path), tmp_path / "serial.arrow")
    parallel = preprocess_shard(rows, study(tmp_path), tmp_path / "parallel.arrow", threads=2)
    assert (tmp_path / "serial.arrow").read_bytes() == (tmp_path / "parallel.arrow").read_bytes()
    pd.testing.assert_frame_equal(serial, parallel)


def test_a_scan_without_a_required_channel_is_left_out(tmp_path: Path) -> None:
    rows = cohort(tmp_path)
    (tmp_path / "sub-0_t2.nii.gz").unlink()
    (tmp_path / "sub-2_lesion.nii.gz").write_bytes((tmp_path / "sub-2_lesion.nii.gz").read_bytes()[:-9])
    table = preprocess_shard(rows, study(tmp_path), tmp_path / "s.arrow")
    assert table["reason"].fillna("").tolist() == [
        "channel t2: missing file",
        "",
        "channel lesion: truncated file",
    ], "optional means that there may be no file, not that it may be broken"
    assert "preprocess.channels.t2.path, or set required: false" in table["message"][0]
    assert table["channel_t2_present"].isna().tolist() == [True, False, True]
    assert Shards([tmp_path / "s.arrow"]).column("scan_id") == ["sub-1"]

    for shard, part in enumerate((table[:1], table[1:])):
        part.to_parquet(tmp_path / f"{shard}.parquet", index=False)
    quality_step.run(
        frozen(tmp_path, "quality", max_failed_share=0.7),
        [tmp_path / "1.parquet", tmp_path / "0.parquet"],
        tmp_path / "qc.parquet",
    )
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "qc.parquet"), table)


def test_names_and_patterns_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"preprocess\.channels\.t2\.path: .*session_id.*'subject'"):
        frozen(tmp_path, "preprocess", channels={"t2": {"path": "{subject}.nii"}})
    rows = cohort(tmp_path, 1)
    for name in ("image", "scan_id"):
        with pytest.raises(
            UserError, match=rf"preprocess\.channels: .*'{name}'.* are columns that shards already have"
        ):
            frozen(tmp_path, "preprocess", channels={name: {"path": "x"}})
        unchecked = config().model_copy(update={"channels": {name: Channel(path="x")}})
        with pytest.raises(UserError, match=rf"preprocess\.channels\.{name}: shards have a column of this name"):
            preprocess_shard(rows, unchecked, tmp_path / "s.arrow")
    assert not [*tmp_path.glob("*.arrow"), *tmp_path.glob("*.json")]


def test_channels_are_frozen_and_their_paths_stay_private(tmp_path: Path) -> None:
    channels = {"t2": {"path": "/secret/{scan_id}.nii.gz"}}
    view = load_stage(frozen(tmp_path, "preprocess", channels=channels), "preprocess")
    assert view.preprocess.channels["t2"].required and view.preprocess.channels["t2"].kind == "contrast"
    published = without_paths({"preprocess": view.preprocess.model_dump(mode="json")})
    assert "secret" not in str(published) and published["preprocess"]["channels"]["t2"]["kind"] == "contrast"


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64", "float16", "float64"])
def test_every_type_comes_back_as_it_was_stored(tmp_path: Path, dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 200, (3, 1, 4, 5)).astype(dtype)
    with ShardWriter(tmp_path / "s.arrow", {"x": TensorColumn(dtype, (1, 4, 5), "labels")}) as shard:
        for value in values:
            shard.append(x=value)
    shards = Shards([tmp_path / "s.arrow"])
    found = shards.tensors("x", [2, 0], dtype=None)
    assert shards.dtype("x") == dtype and found.dtype == dtype and np.array_equal(found, values[[2, 0]])
    assert shards.tensors("x").dtype == np.float32


# ------------------------------------------------------------------------------------------------- contrasts


@pytest.mark.parametrize("name", SCANS)
def test_the_scan_as_its_own_channel_is_the_same(tmp_path: Path, name: str) -> None:
    codes, spacing, shape, turn = SCANS[name]
    affine = affine_of(codes, spacing, shape, turn)
    values = np.random.default_rng(0).normal(0, 30, shape).astype(np.float32)
    values[:6] = 0
    path = save(tmp_path / "scan.nii.gz", values, affine)
    mask = save(tmp_path / "mask.nii.gz", ball(affine, shape, 45).astype(np.uint8), affine)
    settings = config(percentiles=(1, 99), channels={"again": {"path": str(path)}})
    arrays, facts = preprocess_scan(path, settings, mask, channels={"again": path})
    assert np.array_equal(arrays["again"], arrays["image"].astype(np.float16)), "to the last bit"
    assert facts["channel_again_percentile_low"] == facts["percentile_low"]
    assert facts["channel_again_percentile_high"] == facts["percentile_high"]
    alone, plain = preprocess_image(path, settings, mask)
    assert np.array_equal(alone, arrays["image"]) and plain.items() <= facts.items()


def test_a_contrast_on_another_grid_comes_to_the_same_place(tmp_path: Path) -> None:
    """Another orientation, spacing, tilt and field of view, and a scale of its own: only the world is the same."""
    shape, affine = (24, 32, 28), affine_of("RAS", (4, 4, 4), (24, 32, 28))
    other_shape = (100, 40, 90)
    other = affine_of("PIL", (1.5, 5, 1.2), other_shape, rotation(20, -12, 8))
    spot = np.array([22.0, -41.0, 38.0])

    def blob(where: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        return np.exp(-0.5 * (np.linalg.norm(world(where, size) - spot, axis=-1) / 9) ** 2)

    path = save(tmp_path / "t1.nii.gz", (100 + 50 * blob(affine, shape)).astype(np.float32), affine)
    file = save(tmp_path / "t2.nii.gz", (9000 - 7000 * blob(other, other_shape)).astype(np.float32), other)
    settings = config(foreground="all", channels={"t2": {"path": str(file)}})
    arrays, facts = preprocess_scan(path, settings, channels={"t2": file})
    target = np.array(json.loads(facts["target_affine"])).reshape(4, 4)
    dark = np.where(world(target, shape)[..., 0] > 0, 1 - arrays["t2"][0].astype(float), 0)
    covered = arrays["t2"][0] > 0
    weight = np.where(covered, dark, 0) ** 3
    found = (weight[..., np.newaxis] * world(target, shape)).sum(axis=(0, 1, 2)) / weight.sum()
    assert np.linalg.norm(found - spot) < 2
    assert facts["channel_t2_percentile_high"] == pytest.approx(9000, rel=0.01)
    assert not covered.all(), "beyond the field of view of the contrast stands 0"


def test_the_brain_mask_applies_to_contrasts_only(tmp_path: Path) -> None:
    rows = cohort(tmp_path, 1)
    affine = nib.Nifti1Image.from_filename(rows["path"][0]).affine
    shape = (26, 30, 28)
    mask = save(tmp_path / "mask.nii.gz", ball(affine, shape, 25).astype(np.uint8), affine)
    files = {name: tmp_path / f"sub-0_{name}.nii.gz" for name in CHANNELS}
    masked, _ = preprocess_scan(Path(rows["path"][0]), study(tmp_path), mask, channels=files)
    plain, _ = preprocess_scan(Path(rows["path"][0]), study(tmp_path), channels=files)
    around = ndimage.binary_dilation(masked["image"] > 0, iterations=2)
    assert (plain["t2"] > 0).mean() > 0.5 and not masked["t2"][~around].any() and masked["t2"][around].any()
    assert np.array_equal(masked["parts"], plain["parts"]) and np.array_equal(masked["lesion"], plain["lesion"])


# ----------------------------------------------------------------------------------------- masks and label maps


def channel(tmp_path: Path, values: np.ndarray, affine: np.ndarray, kind: str, **changes: Any) -> np.ndarray:
    """A label map or mask on the grid of a scan of 4 mm."""
    shape = (24, 32, 28)
    path = save(tmp_path / "scan.nii.gz", scan(shape), affine_of("RAS", (4, 4, 4), shape))
    file = save(tmp_path / "channel.nii.gz", values, affine)
    settings = config(**changes, channels={"x": {"path": str(file), "kind": kind}})
    return preprocess_scan(path, settings, channels={"x": file})[0]["x"][0]


@pytest.mark.parametrize("spacing", [(1, 1, 1), (2, 2, 2), (1.3, 0.9, 3), (4, 4, 4), (6, 6, 6)])
@pytest.mark.parametrize("turn", [None, rotation(20, -12, 8)], ids=["aligned", "oblique"])
@pytest.mark.parametrize("codes", ["RAS", "PIL"])
def test_masks_keep_their_volume_and_place(
    tmp_path: Path, spacing: tuple[float, float, float], turn: np.ndarray | None, codes: str
) -> None:
    axes = [int(axis) for axis in nib.orientations.axcodes2ornt(codes)[:, 0]]
    shape = tuple(round((96, 128, 112)[axes[k]] / spacing[k]) for k in range(3))
    affine = affine_of(codes, spacing, shape, turn)
    inside = ball(affine, shape, 24)
    found = channel(tmp_path, inside.astype(np.float32) * 0.5, affine, "mask")
    assert found.dtype == np.uint8 and set(np.unique(found)) == {0, 1}
    assert found.sum() * 64 == pytest.approx(inside.sum() * np.prod(spacing), rel=0.04 if max(spacing) <= 4 else 0.1), (
        "mm3"
    )
    middle = np.argwhere(found).mean(axis=0) - (np.array(found.shape) - 1) / 2
    assert np.abs(middle).max() < 0.55, "half a voxel, where the surface lies between voxels"


def test_halving_does_not_shrink_what_ends_within_a_voxel(tmp_path: Path) -> None:
    """Surfaces through the middle of the grid's voxels, on all sides: "more than half" alone would lose both rims."""
    shape = (48, 64, 56)
    values = np.zeros(shape, np.uint8)
    values[11:31, 20:40, 20:40] = 1
    found = channel(tmp_path, values, affine_of("RAS", (2, 2, 2), shape), "mask")
    assert found.sum() == pytest.approx(10 * 10 * 10, rel=0.01)
    middle = np.argwhere(found).mean(axis=0)
    assert middle == pytest.approx((np.array([20.5, 29.5, 29.5]) - 0.5) / 2, abs=0.1), "no side is favoured"


def test_a_structure_stays_where_it_is_though_every_place_lies_between_two_voxels(tmp_path: Path) -> None:
    """An odd number of voxels at half of the grid's: the grid, centred on the scan, looks between voxels alone."""
    shape = (47, 63, 55)
    affine = affine_of("RAS", (2, 2, 2), shape)
    found = channel(tmp_path, ball(affine, shape, 24).astype(np.uint8), affine, "mask")
    assert np.argwhere(found).mean(axis=0) == pytest.approx((np.array(found.shape) - 1) / 2, abs=1e-6)


def test_labels_go_by_majority_not_by_chance(tmp_path: Path) -> None:
    """Stripes of 9 in a field of 4 that the centres of the grid's voxels fall on; the field is most of each voxel."""
    shape = (96, 128, 112)
    values = np.full(shape, 4, np.int16)
    values[2::4] = 9
    found = channel(tmp_path, values, affine_of("RAS", (1, 1, 1), shape), "labels")
    assert found.dtype == np.int16 and (found[1:-1, 1:-1, 1:-1] == 4).all()


def test_labels_of_the_same_voxels_are_copied(tmp_path: Path) -> None:
    shape = (30, 41, 37)
    affine = affine_of("LAS", (4, 4, 4), shape)
    values = scan(shape)
    path = save(tmp_path / "scan.nii.gz", values, affine)
    arrays, facts = preprocess_scan(
        path, config(channels={"x": {"path": str(path), "kind": "labels"}}), channels={"x": path}
    )
    low, high = facts["percentile_low"], facts["percentile_high"]
    assert np.allclose(np.clip((arrays["x"] - low) / (high - low), 0, 1), arrays["image"], atol=1e-6)


def test_majority_counts_and_breaks_ties_at_the_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    halved = np.array([[2, 0, 0.5], [0, 2, 0.5], [0, 0, 1.0]])
    labels = np.array([[1, 1, 3, 2, 7, 7], [1, 5, 2, 3, 8, 8]])
    assert majority(labels, halved, (1, 3)).tolist() == [[1, 3, 8]], "most; a draw goes to either"
    assert majority(labels, halved, (1, 4))[0, 3] == 0, "outside"
    many = np.random.default_rng(0).integers(0, 3, (39, 42, 45)).astype(np.int16)
    third = np.diag([3, 3, 3, 1.0])
    third[:3, 3] = 1
    whole = majority(many, third, (13, 14, 15))
    blocks = many.reshape(13, 3, 14, 3, 15, 3)
    counts = np.stack([(blocks == label).sum(axis=(1, 3, 5)) for label in range(3)])
    ordered = np.sort(counts, axis=0)
    clear = ordered[2] > ordered[1]
    assert whole.dtype == np.int16 and clear.mean() > 0.7
    assert np.array_equal(whole[clear], counts.argmax(axis=0)[clear])
    assert (np.take_along_axis(counts, whole[np.newaxis].astype(int), 0)[0] == ordered[2]).all()
    turned = third @ np.array([[0.9, 0.1, 0, 0], [-0.1, 0.9, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    oblique = majority(many, turned, (13, 14, 15))
    monkeypatch.setattr("meddiff_steps.imaging.resampling._PLACES", 1000)
    assert np.array_equal(majority(many, third, (13, 14, 15)), whole), "slabs change nothing"
    assert np.array_equal(majority(many, turned, (13, 14, 15)), oblique)


@pytest.mark.parametrize(
    ("values", "reason", "message"),
    [
        (np.array([0, 1.5]), "not whole numbers", "for example 1.5.*kind: contrast"),
        (np.array([0, -3.0]), "labels out of range", "from -3 to 0, expected 0.*32767.*Number them anew"),
        (np.array([0, 40000.0]), "labels out of range", "from 0 to 40000"),
    ],
)
def test_what_is_no_label_map_is_refused(tmp_path: Path, values: np.ndarray, reason: str, message: str) -> None:
    shape = (24, 32, 28)
    file = np.broadcast_to(values[:, np.newaxis, np.newaxis], (2, 32, 28)).repeat(12, axis=0).astype(np.float32)
    with pytest.raises(ScanError, match=rf"channel\.nii\.gz: \(channel x\) .*{message}") as caught:
        channel(tmp_path, file, affine_of("RAS", (4, 4, 4), shape), "labels")
    assert caught.value.reason == f"channel x: {reason}"


@pytest.mark.parametrize("kind", ["contrast", "mask", "labels"])
def test_a_channel_of_another_space_is_refused(tmp_path: Path, kind: str) -> None:
    affine = affine_of("RAS", (4, 4, 4), (24, 32, 28))
    affine[:3, 3] += 1000
    with pytest.raises(ScanError, match="no voxel of it lies in the scan's target grid") as caught:
        channel(tmp_path, scan((24, 32, 28)), affine, kind)
    assert caught.value.reason == "channel x: lies elsewhere"


def test_an_empty_mask_is_a_mask(tmp_path: Path) -> None:
    shape = (24, 32, 28)
    assert not channel(tmp_path, np.zeros(shape, np.uint8), affine_of("RAS", (4, 4, 4), shape), "mask").any()


# ------------------------------------------------------------------------------------------------- pictures


def pictures(tmp_path: Path, pixels: np.ndarray, file: Path, kind: str) -> np.ndarray:
    path = picture(tmp_path / "scan.png", pixels)
    settings = config_2d(channels={"x": {"path": str(file), "kind": kind}})
    return preprocess_scan(path, settings, channels={"x": file})[0]["x"]


@pytest.mark.parametrize("size", [(128, 96), (32, 45), (20, 26)])
def test_picture_channels_have_the_crop_and_scale_of_the_picture(tmp_path: Path, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, size)
    same = pictures(tmp_path, pixels, picture(tmp_path / "x.png", pixels), "contrast")
    image, _ = preprocess_image(tmp_path / "scan.png", config_2d())
    assert np.array_equal(same, image.astype(np.float16))
    rows, columns = np.indices(size)
    disc = (np.hypot(rows - size[0] * 0.4, columns - size[1] * 0.5) < min(size) / 4).astype(np.uint8)
    mask = pictures(tmp_path, 20 + 200 * disc, picture(tmp_path / "x.png", disc), "mask")
    shown, _ = preprocess_image(tmp_path / "scan.png", config_2d())
    assert mask.dtype == np.uint8 and ((shown > 0.5) == (mask == 1)).mean() > 0.97
    labels = pictures(tmp_path, pixels, picture(tmp_path / "x.png", disc * 9 + 3), "labels")
    assert np.array_equal(labels == 12, mask == 1) and set(np.unique(labels)) == {3, 12}


def test_label_pictures_give_indices_and_are_not_lossy(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32))
    numbers = np.random.default_rng(1).integers(0, 4, (32, 32)).astype(np.uint8)
    indexed = PilImage.fromarray(numbers, mode="P")
    indexed.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    indexed.save(tmp_path / "palette.png")
    assert np.array_equal(pictures(tmp_path, pixels, tmp_path / "palette.png", "labels")[0], numbers)
    PilImage.fromarray(np.stack([numbers] * 3, axis=-1)).save(tmp_path / "grey.png")
    assert np.array_equal(pictures(tmp_path, pixels, tmp_path / "grey.png", "mask")[0], numbers > 0)
    PilImage.fromarray(numbers > 1).save(tmp_path / "bits.png")
    assert np.array_equal(pictures(tmp_path, pixels, tmp_path / "bits.png", "mask")[0], numbers > 1)
    for name, reason in (("colour.png", "coloured labels"), ("lossy.jpg", "lossy labels")):
        indexed.convert("RGB").save(tmp_path / name)
        with pytest.raises(ScanError, match="expected") as caught:
            pictures(tmp_path, pixels, tmp_path / name, "labels")
        assert caught.value.reason == f"channel x: {reason}"


def test_a_picture_channel_of_another_size_is_refused(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32))
    with pytest.raises(ScanError, match="20x16 pixels, the scan has 40x32") as caught:
        pictures(tmp_path, pixels, picture(tmp_path / "x.png", pixels[::2, ::2]), "mask")
    assert caught.value.reason == "channel x: wrong size"
    volume = save(tmp_path / "x.nii", scan((8, 8, 8)), np.eye(4))
    with pytest.raises(ScanError, match="a 3D image of a 2D scan"):
        pictures(tmp_path, pixels, volume, "mask")


# ------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize("size", [(8, 10), (8, 10, 12)])
def test_a_variant_moves_every_channel_alike(size: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(1, 200, (1, *size))
    variant = Variant(flip=True, shift=(2, -1, 3)[: len(size)])
    moved = {dtype: variant(values.astype(dtype)) for dtype in ("float32", "float16", "uint8", "int16")}
    for dtype, found in moved.items():
        assert found.dtype == dtype and np.array_equal(found, moved["float32"])
    assert not moved["uint8"][:, :2].any() and not np.array_equal(moved["float32"], values)


# ------------------------------------------------------------------------------------------------ real data


def test_real_label_maps(tmp_path: Path) -> None:
    paths = sorted((DATA / "ixi").glob("sub-*/anat/*_T1w.nii.gz"))[:4]
    pattern = DATA / "ixi/derivatives/dlmuse/{subject_id}/anat/{subject_id}_dseg.nii.gz"
    if not paths or not pattern.parents[2].exists():
        pytest.skip(f"the IXI scans and label maps are not in {DATA} (set MEDDIFF_SHARED_DATA)")
    names = [p.name.split("_")[0] for p in paths]
    rows = pd.DataFrame({"scan_id": names, "subject_id": names, "path": [str(p) for p in paths]})
    channels = {"dlmuse": {"path": str(pattern), "kind": "labels"}, "brain": {"path": str(pattern), "kind": "mask"}}
    table = preprocess_shard(rows, config(shape=(40, 48, 40), channels=channels), tmp_path / "s.arrow")
    assert (table["status"] == "ok").all() and table["channel_dlmuse_present"].all()
    shards = Shards([tmp_path / "s.arrow"])
    labels, brain = (shards.tensors(name, dtype=None) for name in ("dlmuse", "brain"))
    image = shards.tensors("image")
    for i, name in enumerate(names):
        stored = np.asarray(nib.Nifti1Image.from_filename(str(pattern).format(subject_id=name)).dataobj)
        assert set(np.unique(labels[i])) <= set(np.unique(stored))
        assert brain[i].sum() * 64 == pytest.approx((stored > 0).sum() * 8, rel=0.02), "mm3"
        found, before = (np.bincount(one.ravel(), minlength=256) for one in (labels[i], stored))
        large = (before * 8 > 20_000) & (np.arange(256) > 1)  # 1 is the sheet of CSF around the brain, which thins out
        assert large.sum() > 5 and np.allclose(found[large] * 64, before[large] * 8, rtol=0.15)
        assert np.corrcoef(image[i].ravel() > 0.1, brain[i].ravel())[0, 1] > 0.7, "they lie on each other"
