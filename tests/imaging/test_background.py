"""Background by meaning: grey values move, are offset, padded or inverted, and what counts stays what it was."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image as PilImage

from meddiff_steps.config import Preprocess
from meddiff_steps.imaging.background import background_of, head_of, surrounding_value, uncertain
from meddiff_steps.imaging.preprocess import preprocess_image, preprocess_scan
from meddiff_steps.imaging.reading import Image, ScanError, read_image

AFFINE = np.array([[4.0, 0, 0, -46], [0, 4, 0, -62], [0, 0, 4, -54], [0, 0, 0, 1]])
SHAPE = (24, 32, 28)
INSIDE = sum(((g - (n - 1) / 2) / (0.35 * n)) ** 2 for g, n in zip(np.indices(SHAPE), SHAPE, strict=True)) < 1


def config(**changes: Any) -> Preprocess:
    return Preprocess.model_validate({"shape": SHAPE, "spacing_mm": 4.0, **changes})


def head(seed: int = 0) -> np.ndarray:
    """Tissue of 60 to 300 in zeros."""
    return np.where(INSIDE, np.random.default_rng(seed).integers(60, 300, SHAPE), 0).astype(np.float32)


def ct(seed: int = 0, noise: float = 0.0) -> np.ndarray:
    """Hounsfield units: tissue around 0 within air."""
    rng = np.random.default_rng(seed)
    values = np.where(INSIDE, np.rint(rng.normal(0, 6, SHAPE)), np.rint(rng.normal(-1000, noise, SHAPE)))
    values[10:13, 14:17, 12:15] = 800
    return values.astype(np.float32)


def processed(folder: Path, values: np.ndarray, mask: Path | None = None, **changes: Any) -> tuple[np.ndarray, Any]:
    nib.save(nib.Nifti1Image(values.astype(np.float32), AFFINE), folder / "scan.nii.gz")
    image, facts = preprocess_image(folder / "scan.nii.gz", config(**changes), mask)
    return image[0], facts


@pytest.mark.parametrize("setting", [{}, {"shape": (14, 18, 16), "spacing_mm": 7.0}, {"center": "foreground"}])
@pytest.mark.parametrize(("scale", "offset"), [(1, -20), (1, 100), (0.01, -0.8), (-1, 0), (-2, 500)])
def test_an_affine_change_of_grey_values_changes_nothing(
    tmp_path: Path, setting: dict[str, Any], scale: float, offset: float
) -> None:
    """Brighter stays brighter; of inverted values the background is dark all the same."""
    plain, facts = processed(tmp_path, head() if scale > 0 else np.where(INSIDE, 400 - head(), 0), **setting)
    image, other = processed(tmp_path, scale * head() + offset, **setting)
    assert other["background"] == "surroundings" and other["background_value"] == pytest.approx(offset)
    assert other["foreground_share"] == facts["foreground_share"] and not image[0].any()
    if scale > 0:
        assert np.abs(image - plain).max() < 1e-4
    elif not setting:
        assert np.abs(image - plain)[INSIDE].max() < 0.02


@pytest.mark.parametrize("value", [0, -20, 100])
def test_the_intercept_of_the_header_is_an_offset_like_any_other(tmp_path: Path, value: int) -> None:
    content = bytearray(nib.Nifti1Image(head().astype(np.int16), AFFINE).to_bytes())
    content[112:120] = np.array([0.5, value], "<f4").tobytes()  # scl_slope, scl_inter
    (tmp_path / "offset.nii.gz").write_bytes(gzip.compress(bytes(content)))
    plain, _ = processed(tmp_path, head())
    assert np.array_equal(read_image(tmp_path / "offset.nii.gz").array, 0.5 * head() + value)
    assert np.abs(preprocess_image(tmp_path / "offset.nii.gz", config())[0][0] - plain).max() < 1e-4


def test_a_voxel_of_0_HU_is_tissue(tmp_path: Path) -> None:
    values = ct()
    for changes in ({}, {"foreground": "ct"}, {"foreground": "all"}):
        image, facts = processed(tmp_path, values, percentiles=(1, 99), **changes)
        at = {hu: image[INSIDE & (values == hu)].mean() for hu in (-1, 0, 1)}
        assert at[-1] < at[0] < at[1], changes
        assert image[~INSIDE].max() < 1e-3
    assert facts["background"] is None and facts["foreground_share"] == 1


@pytest.mark.parametrize("foreground", ["nonzero", "ct"])
def test_a_voxel_of_0_HU_is_tissue_where_0_is_the_padding(tmp_path: Path, foreground: str) -> None:
    """As resampling writes it: 0 outside of the field of view, air within."""
    values = ct(noise=12)
    outside = sum((g - (n - 1) / 2) ** 2 for g, n in zip(np.indices(SHAPE)[:2], SHAPE, strict=False)) > 13**2
    values[outside] = 0
    image, _ = processed(tmp_path, values, foreground=foreground, percentiles=(1, 99))
    assert not image[outside].any() and image[INSIDE & (values == 0)].min() > 0.3
    assert image[INSIDE & (values == 0)].mean() == pytest.approx(image[INSIDE & (values == 1)].mean(), abs=0.05)


@pytest.mark.parametrize("padding", [-1000, -2000, -3024])
def test_padding_and_noise_of_air_move_no_grey_value_of_ct(tmp_path: Path, padding: int) -> None:
    values = ct(noise=12)
    plain, facts = processed(tmp_path, values, foreground="ct", percentiles=(1, 99))
    corners = np.indices(SHAPE)[0] < 4
    values[corners] = padding
    image, other = processed(tmp_path, values, foreground="ct", percentiles=(1, 99))
    assert np.array_equal(image, plain) and facts["percentile_low"] == other["percentile_low"] > -50
    assert other["background"] == "air" and other["foreground_share"] == pytest.approx(INSIDE.mean(), abs=0.01)


def test_noise_of_air_is_told_where_it_cannot_be_told_from_tissue(tmp_path: Path) -> None:
    values = ct(noise=12)
    image, facts = processed(tmp_path, values)
    assert facts["background"] == "unknown" and facts["foreground_share"] == 1
    assert image[INSIDE & (values == 0)].mean() == pytest.approx(image[INSIDE & (values == 1)].mean(), abs=0.01)
    assert "1 scans, sub-1 first" in (uncertain(pd.DataFrame([{"scan_id": "sub-1", **facts}])) or "")
    assert "preprocess.foreground: ct" in (uncertain(pd.DataFrame([{"scan_id": "sub-1", **facts}])) or "")
    _, facts = processed(tmp_path, head())
    assert uncertain(pd.DataFrame([{"scan_id": "sub-1", **facts}])) is None


def test_ct_is_asked_of_hounsfield_units(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match="darkest value is 0, expected air of about -1000 HU") as caught:
        processed(tmp_path, ct() + 1000, foreground="ct")
    assert caught.value.reason == "no Hounsfield units"


@pytest.mark.parametrize("foreground", ["nonzero", "all", "ct"])
def test_a_mask_says_what_counts_whatever_stands_outside(tmp_path: Path, foreground: str) -> None:
    core = INSIDE & (np.indices(SHAPE)[2] < 14)
    nib.save(nib.Nifti1Image(core.astype(np.uint8), AFFINE), tmp_path / "mask.nii.gz")
    found = []
    for outside in (-1000, -900.5, -3000):
        values = np.where(INSIDE, ct(), outside)
        image, facts = processed(tmp_path, values, tmp_path / "mask.nii.gz", foreground=foreground)
        assert facts["background"] == "mask" and facts["foreground_share"] == core.mean()
        assert not image[~core].any() and image[core & (values == 0)].all()
        found.append(image)
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


@pytest.mark.parametrize(
    ("modality", "outside", "settings"),
    [("ct", -1000, {"foreground": "ct", "window": [0, 80]}), ("mr", -5000, {}), ("mr", -5000, {"foreground": "all"})],
)
def test_nothing_from_outside_a_mask_is_interpolated_into_the_brain(
    tmp_path: Path, modality: str, outside: float, settings: dict[str, Any]
) -> None:
    """Half of the voxels at the surface of a brain of 40 units on a coarser grid are partly outside."""
    nib.save(nib.Nifti1Image(INSIDE.astype(np.uint8), AFFINE), tmp_path / "mask.nii.gz")
    values = np.where(INSIDE, 40.0, outside)
    values[10:13, 14:17, 12:15] = 0 if modality == "mr" else 60
    path = tmp_path / "channel.nii.gz"
    nib.save(nib.Nifti1Image(values.astype(np.float32), AFFINE), path)
    coarse = {"shape": (12, 16, 14), "spacing_mm": 8.0, **settings}
    image, facts = processed(tmp_path, values, tmp_path / "mask.nii.gz", **coarse)
    channel = {"channels": {"again": {"path": str(path), "window": settings.get("window")}}}
    arrays, _ = preprocess_scan(path, config(**coarse, **channel), tmp_path / "mask.nii.gz", channels={"again": path})
    visible = facts["percentile_low"] + image * (facts["percentile_high"] - facts["percentile_low"]) > 20
    assert visible.sum() * 8 == pytest.approx(INSIDE.sum(), rel=0.08)
    assert np.allclose(arrays["again"][0], image, atol=1e-3)


def test_masked_ct_needs_a_window() -> None:
    with pytest.raises(ValueError, match=r"set preprocess\.window, e\.g\. \[0, 80\] for brains"):
        config(foreground="ct", brain_mask="{scan_id}.nii.gz")
    assert config(foreground="ct", brain_mask="{scan_id}.nii.gz", window=[0, 80]).window == (0, 80)


def test_noise_around_a_head_and_a_tight_box_are_as_they_were(tmp_path: Path) -> None:
    """No one value around the head: what is not 0 counts, as ever; a brain that touches its box has a background."""
    rng = np.random.default_rng(1)
    noisy = head() + np.rint(np.abs(rng.normal(0, 3, SHAPE)))
    _, facts = processed(tmp_path, noisy)
    assert facts["background"] == "zero" and facts["foreground_share"] == (noisy != 0).mean()
    tight = np.argwhere(INSIDE)
    box = tuple(slice(a, b + 1) for a, b in zip(tight.min(axis=0), tight.max(axis=0), strict=True))
    assert surrounding_value((head() - 30)[box]) == -30


def test_white_tissue_within_a_white_margin_stays(tmp_path: Path) -> None:
    pixels = np.full((40, 40), 255, np.uint8)
    pixels[8:32, 8:32] = 90
    pixels[15:18, 15:18] = 255
    PilImage.fromarray(pixels).save(tmp_path / "a.png")
    background = background_of(tmp_path, read_image(tmp_path / "a.png"), "nonzero")
    assert background.foreground.sum() == 24 * 24 and background.value == 255 and background.fill == 90


def test_all_background_is_refused(tmp_path: Path) -> None:
    image = Image(np.where(INSIDE, 1, 0).astype(np.float32), AFFINE)
    with pytest.raises(ScanError, match=r"inside the mask\. Check that the mask belongs") as caught:
        background_of(tmp_path, image, "nonzero", ~INSIDE)
    assert caught.value.reason == "no foreground"


def test_a_head_is_found_in_silence_and_in_noise() -> None:
    noise = np.abs(np.random.default_rng(2).normal(0, 5, SHAPE))
    for values in (head(), head() - 50, ct(), head() + noise, ct(noise=12)):
        found = head_of(Image(values.astype(np.float32), AFFINE), "nonzero")
        assert found is not None and (found.array == INSIDE).mean() > 0.98
    assert head_of(Image(head()[0], None), "all") is None


# ------------------------------------------------------------------------------------------------- pictures


def config_2d(**changes: Any) -> Preprocess:
    return Preprocess.model_validate({"shape": (32, 32), "spacing_mm": None, "foreground": "all", **changes})


def transparent(kind: str, grey: np.ndarray, seen: np.ndarray, hidden: int) -> PilImage.Image:
    """A picture whose pixels are transparent where they are not seen, with a colour that is hidden there."""
    pixels = np.where(seen, grey, hidden).astype(np.uint8)
    alpha = (seen * 255).astype(np.uint8)
    if kind == "LA":
        return PilImage.merge("LA", [PilImage.fromarray(pixels), PilImage.fromarray(alpha)])
    if kind == "RGBA":
        return PilImage.fromarray(np.dstack([pixels] * 3 + [alpha]))
    if kind == "I;16":
        return PilImage.fromarray(pixels.astype(np.uint16))
    return PilImage.fromarray(pixels) if kind == "L" else PilImage.fromarray(pixels).convert("P")


@pytest.mark.parametrize("foreground", ["all", "nonzero"])
@pytest.mark.parametrize("hidden", [0, 255])
@pytest.mark.parametrize("kind", ["LA", "RGBA", "L", "P", "I;16"])
def test_what_is_transparent_is_black_whatever_it_hides(
    tmp_path: Path, kind: str, hidden: int, foreground: str
) -> None:
    grey = np.random.default_rng(0).integers(60, 200, (32, 32))
    seen = np.zeros((32, 32), bool)
    seen[6:30, 5:29] = True
    options = {"transparency": hidden} if kind in ("L", "P", "I;16") else {}
    transparent(kind, grey, seen, hidden).save(tmp_path / "a.png", **options)
    (tmp_path / "b").mkdir()
    PilImage.fromarray(grey[6:30, 5:29].astype(np.uint8)).save(tmp_path / "b/a.png")
    image, facts = preprocess_image(tmp_path / "a.png", config_2d(foreground=foreground))
    alone, expected = preprocess_image(tmp_path / "b/a.png", config_2d(shape=(24, 24)))
    assert not image[0][~seen].any() and facts["foreground_share"] == seen.mean()
    assert (facts["percentile_low"], facts["percentile_high"]) == (
        expected["percentile_low"],
        expected["percentile_high"],
    ), "the margin moves no grey value"
    assert np.array_equal(image[0][6:30, 5:29], alone[0])


def test_half_transparent_is_half_as_bright_and_wholly_is_nothing(tmp_path: Path) -> None:
    pixels = np.tile(np.arange(32, dtype=np.uint8) * 7, (32, 1))
    alpha = np.full((32, 32), 255, np.uint8)
    alpha[0] = 51
    PilImage.merge("LA", [PilImage.fromarray(pixels), PilImage.fromarray(alpha)]).save(tmp_path / "a.png")
    assert np.allclose(read_image(tmp_path / "a.png").array[0], pixels[0] / 5)
    PilImage.merge("LA", [PilImage.fromarray(pixels), PilImage.fromarray(alpha * 0)]).save(tmp_path / "b.png")
    with pytest.raises(ScanError, match="transparent or padding") as caught:
        read_image(tmp_path / "b.png")
    assert caught.value.reason == "nothing visible"


def test_a_transparent_margin_of_a_channel_is_black_too(tmp_path: Path) -> None:
    seen = np.indices((32, 32))[0] > 8
    grey = np.random.default_rng(0).integers(60, 200, (32, 32))
    PilImage.fromarray(grey.astype(np.uint8)).save(tmp_path / "a.png")
    transparent("RGBA", grey, seen, 255).save(tmp_path / "x.png")
    settings = config_2d(channels={"x": {"path": "x"}})
    arrays, _ = preprocess_scan(tmp_path / "a.png", settings, channels={"x": tmp_path / "x.png"})
    assert not arrays["x"][0][~seen].any() and arrays["x"][0][seen].mean() > 0.3
