"""Settings of preprocessing that are off by default: voxels of three sizes, interpolation, windows, bias field."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage
from scipy import ndimage
from test_preprocess import affine_of, config, rotation, save, scan, world

from meddiff_steps.config import Channel, Preprocess, SimulatedSource
from meddiff_steps.imaging import bias_field
from meddiff_steps.imaging.encoding import Grid
from meddiff_steps.imaging.preprocess import preprocess_image, preprocess_scan
from meddiff_steps.imaging.reading import ScanError
from meddiff_steps.imaging.restoration import restore
from meddiff_steps.simulation.brains import load_template, make_lattice, simulate_subject

SHAPE = (30, 41, 37)


def matrix(facts: dict[str, Any]) -> np.ndarray:
    return np.array(json.loads(facts["target_affine"])).reshape(4, 4)


# -------------------------------------------------------------------------------------------------- the grid


@pytest.mark.parametrize("extra", [{}, {"registration": {"min_correlation": 0.0, "max_rotation_deg": 180}}])
def test_three_equal_edges_are_one_number(tmp_path: Path, extra: dict[str, Any]) -> None:
    path = save(tmp_path / "scan.nii.gz", scan(SHAPE), affine_of("LAS", (4, 4, 4), SHAPE, rotation(3, 5, 2)))
    (one, facts), (three, other) = (
        preprocess_image(path, config(spacing_mm=spacing, **extra)) for spacing in (4.0, [4, 4, 4])
    )
    assert np.array_equal(one, three) and facts["target_affine"] == other["target_affine"]
    assert Grid(SHAPE, 4.0).affine is not None
    assert np.array_equal(Grid(SHAPE, 4.0).affine, Grid(SHAPE, (4.0, 4.0, 4.0)).affine)


@pytest.mark.parametrize("turn", [None, rotation(10, -5, 8)])
def test_thick_slices_stay_thick(tmp_path: Path, turn: np.ndarray | None) -> None:
    """A grid of 2 x 2 x 6 mm lies where its affine says, and comes back to the scan."""
    shape = (50, 60, 20)
    affine = affine_of("LPS", (2, 2, 6), shape, turn)
    distance = np.linalg.norm((world(affine, shape) - [14, -30, 36]) / [1, 1, 2], axis=-1)
    values = (1000 * np.exp(-0.5 * (distance / 8) ** 2)).astype(np.float32)
    path = save(tmp_path / "scan.nii.gz", values, affine)
    image, facts = preprocess_image(path, config(shape=(56, 64, 24), spacing_mm=[2, 2, 6], foreground="all"))
    target = matrix(facts)
    assert np.allclose(target[:3, :3], np.diag([2, 2, 6]))
    weight = image[0] / image[0].sum()
    found = (weight[..., np.newaxis] * world(target, image[0].shape)).sum(axis=(0, 1, 2))
    assert np.linalg.norm(found - [14, -30, 36]) < 0.5
    back, its_affine = restore(image, facts)
    assert np.allclose(its_affine, affine)
    assert np.abs(back - values).max() < (2 if turn is None else 80)


# --------------------------------------------------------------------------------------------- interpolation


def ball(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """A wave of 20 mm."""
    place = world(affine, shape)
    return (500 + 400 * np.sin(2 * np.pi * place / 20).prod(axis=-1)).astype(np.float32)


@pytest.mark.parametrize("turn", [None, rotation(10, -5, 8)])
def test_interpolation_is_chosen(tmp_path: Path, turn: np.ndarray | None) -> None:
    """Against the wave itself, between the voxels of a scan of 4 mm: cubic is nearest to it, then linear."""
    shape = (40, 45, 42)
    affine = affine_of("RAS", (4, 4, 4), shape, turn)
    path = save(tmp_path / "scan.nii.gz", ball(affine, shape), affine)
    error = {}
    for kind in ("auto", "linear", "cubic", "nearest"):
        image, facts = preprocess_image(path, config(spacing_mm=2.7, foreground="all", interpolation=kind))
        low, high = facts["percentile_low"], facts["percentile_high"]
        truth = (ball(matrix(facts), image[0].shape) - low) / (high - low)
        error[kind] = float(np.sqrt(np.mean((image[0] - truth)[4:-4, 4:-4, 4:-4] ** 2)))
        if kind == "nearest":
            assert set(np.unique(image[0] * np.float32(high - low) + np.float32(low)).round(1)) <= set(
                np.unique(ball(affine, shape)).round(1)
            )
    assert error["cubic"] < 0.6 * error["linear"] < 0.6 * error["nearest"] and error["auto"] == error["linear"]


@pytest.mark.parametrize("kind", ["linear", "cubic", "nearest"])
def test_what_is_copied_is_copied_by_any(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / "scan.nii.gz", scan(SHAPE), affine_of("PSR", (4, 4, 4), SHAPE))
    assert np.array_equal(preprocess_image(path, config())[0], preprocess_image(path, config(interpolation=kind))[0])


def test_pictures_are_interpolated_as_chosen(tmp_path: Path) -> None:
    values = np.random.default_rng(3).integers(0, 4, (60, 60), dtype=np.uint8) * 80
    PilImage.fromarray(values).save(tmp_path / "x.png")
    settings = {"shape": (24, 24), "spacing_mm": None, "foreground": "all", "percentiles": (0, 100)}
    images = [
        preprocess_image(tmp_path / "x.png", Preprocess.model_validate(settings | {"interpolation": kind}))[0]
        for kind in ("auto", "linear", "cubic", "nearest")
    ]
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[1], images[2])
    assert len(np.unique(images[3])) == 4, "nearest makes no new grey level"


# ---------------------------------------------------------------------------------------------------- window


def test_a_window_is_the_same_for_all_scans(tmp_path: Path) -> None:
    hu = np.full(SHAPE, -1000, np.int16)
    hu[5:25, 5:35, 5:30] = np.random.default_rng(0).integers(-50, 150, (20, 30, 25))
    hu[10:12] = 1500
    path = save(tmp_path / "ct.nii.gz", hu, affine_of("RAS", (4, 4, 4), SHAPE))
    bone = {"bone": {"path": str(path), "window": [100, 2000]}}
    arrays, facts = preprocess_scan(
        path, config(foreground="ct", window=[0, 80], channels=bone), channels={"bone": path}
    )
    assert (facts["percentile_low"], facts["percentile_high"]) == (0, 80)
    assert (facts["channel_bone_percentile_low"], facts["channel_bone_percentile_high"]) == (100, 2000)
    back, _ = restore(arrays["image"], facts)
    placed, _ = restore(np.ones(arrays["image"].shape, np.uint8), facts, kind="labels")
    assert np.allclose(back[placed > 0], np.clip(hu, 0, 80)[placed > 0], atol=1e-3)
    assert np.isclose(arrays["bone"][0].max(), 1400 / 1900, atol=1e-3), "1500 HU in the window of bone"
    with pytest.raises(ScanError, match="expected some in the window 5000 to 6000"):
        preprocess_image(path, config(foreground="ct", window=[5000, 6000]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"window": [80, 0]}, r"window must be \[low, high\]"),
        ({"bias_field": "n4", "foreground": "ct"}, "bias_field corrects the receiving coil of MR volumes"),
        ({"bias_field": "n4", "shape": (24, 24), "spacing_mm": None}, "bias_field corrects"),
        ({"spacing_mm": [1, 1]}, "spacing_mm"),
        ({"spacing_mm": [1, 1, 0]}, "spacing_mm"),
    ],
)
def test_contradicting_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(**settings)


def test_labels_have_no_window() -> None:
    with pytest.raises(ValueError, match="a window is of grey values"):
        Channel(path="x_{scan_id}.nii", kind="labels", window=(0, 1))


# ------------------------------------------------------------------------------------------------ bias field


@cache
def brain() -> tuple[np.ndarray, np.ndarray]:
    lattice = make_lattice((32, 40, 32), 5.0)
    subject = simulate_subject(SimulatedSource(), "bias", 3, lattice, load_template(lattice.blur_mm))
    return np.asarray(subject.images["T1w"]), lattice.affine


def test_a_known_field_is_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a simulated brain that a field of a factor 2 from left to right was laid over: nine tenths of it go."""
    monkeypatch.setattr(bias_field, "ITERATIONS", (50, 50))  # a straight field needs no finer control points
    values, affine = brain()
    values = values.astype(np.float32)
    field = np.exp(0.35 * np.linspace(-1, 1, 32))[:, np.newaxis, np.newaxis].astype(np.float32)
    files = [save(tmp_path / f"{n}.nii.gz", v, affine) for n, v in enumerate((values, values * field))]
    grid = config(shape=(32, 40, 32), spacing_mm=5.0)
    n4 = grid.model_copy(update={"bias_field": "n4"})
    clean, laid = (preprocess_image(file, n4) for file in files)
    shaded = preprocess_image(files[1], grid)
    tissue = ndimage.binary_erosion(clean[0][0] > 0.2, iterations=2)

    def slope(image: np.ndarray) -> float:
        """Of log grey value against the field's."""
        log, against = np.log(image[0][tissue]), np.broadcast_to(np.log(field), tissue.shape)[tissue]
        return float(np.polyfit(against, log, 1)[0])

    assert abs(slope(laid[0]) - slope(clean[0])) < 0.15 < 0.8 < slope(shaded[0]) - slope(clean[0])
    ratio = [facts["bias_field_high"] / facts["bias_field_low"] for _, facts in (clean, laid)]
    assert 1 < ratio[0] < 0.8 * ratio[1], "simulated brains have a field of their own"
    assert shaded[1]["bias_field_low"] is None


def test_what_has_no_field_is_left_out(tmp_path: Path) -> None:
    path = save(tmp_path / "z.nii.gz", scan(SHAPE).astype(np.float32) - 1000, affine_of("RAS", (4, 4, 4), SHAPE))
    with pytest.raises(ScanError, match="MR magnitudes of 0 and above") as error:
        preprocess_image(path, config(bias_field="n4"))
    assert error.value.reason == "no bias field: values below 0"
