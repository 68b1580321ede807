"""PSNR, L1 and (MS-)SSIM with known answers."""

import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation.image_quality import MAX_PSNR, MS_SSIM_WEIGHTS, SsimSettings, reconstruction_quality
from meddiff_steps.evaluation.reconstructions import write_reconstructions
from meddiff_steps.imaging.shards import Shards


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    rng = philox("test", "quality")
    coarse = rng.random((6, 1, 5, 5, 5)).repeat(8, 2).repeat(8, 3).repeat(8, 4)
    return (0.2 + 0.6 * coarse).astype(np.float32)


def test_psnr_and_l1_of_known_errors(images: np.ndarray) -> None:
    rng = philox("test", "noise")
    noisy = images + rng.normal(0, 0.05, images.shape).astype(np.float32)
    quality = reconstruction_quality(images, noisy, resamples=200)
    assert quality["psnr"]["value"] == pytest.approx(-20 * np.log10(0.05), abs=0.05)  # 26.02 dB
    assert quality["l1"]["value"] == pytest.approx(0.05 * np.sqrt(2 / np.pi), rel=0.01)
    assert quality["psnr"]["n"] == 6
    shifted = reconstruction_quality(images, images + 0.1, resamples=200)
    assert shifted["psnr"]["value"] == pytest.approx(20.0, abs=1e-3)
    assert shifted["l1"]["value"] == pytest.approx(0.1, abs=1e-5)


def test_psnr_is_averaged_over_images_not_errors(images: np.ndarray) -> None:
    errors = np.array([0.1, 0.01, 0.1, 0.01, 0.1, 0.01], dtype=np.float32).reshape(-1, 1, 1, 1, 1)
    assert reconstruction_quality(images, images + errors, resamples=200)["psnr"]["value"] == pytest.approx(
        30.0, abs=0.01
    )


def test_identical_images(images: np.ndarray) -> None:
    quality = reconstruction_quality(images, images, resamples=200)
    assert quality["psnr"]["value"] == MAX_PSNR
    assert quality["ms_ssim"]["value"] == pytest.approx(1.0, abs=1e-6)
    assert quality["l1"]["value"] == 0.0


def test_ms_ssim_falls_with_noise(images: np.ndarray) -> None:
    rng = philox("test", "more noise")
    noise = rng.normal(0, 1, images.shape).astype(np.float32)
    values = [
        reconstruction_quality(images, images + s * noise, resamples=200)["ms_ssim"]["value"] for s in (0.02, 0.1, 0.3)
    ]
    assert values[0] > values[1] > values[2]


@pytest.mark.parametrize(
    ("shape", "name", "kernel", "scales"),
    [
        ((160, 224, 160), "ms_ssim", 7, 5),
        ((96, 96, 96), "ms_ssim", 5, 5),
        ((64, 64, 64), "ms_ssim", 7, 4),
        ((40, 48, 40), "ms_ssim", 7, 3),
        ((32, 40, 32), "ms_ssim", 7, 3),
        ((16, 16, 16), "ms_ssim", 7, 2),
        ((8, 8, 8), "ms_ssim", 3, 2),
        ((5, 9, 9), "ssim", 5, 1),
        ((512, 512), "ms_ssim", 11, 5),
        ((64, 64), "ms_ssim", 7, 4),
    ],
)
def test_settings_fit_the_image(shape: tuple[int, ...], name: str, kernel: int, scales: int) -> None:
    settings = SsimSettings.for_shape(shape)
    assert (settings.name, settings.kernel_size, len(settings.weights)) == (name, kernel, scales)
    assert sum(settings.weights) == pytest.approx(1.0)
    if scales == 5:
        np.testing.assert_allclose(settings.weights, np.array(MS_SSIM_WEIGHTS) / sum(MS_SSIM_WEIGHTS))


@pytest.mark.parametrize("side", [4, 5, 6, 7, 8, 9, 12, 15, 16, 20, 24, 31, 32, 48, 63, 64, 80])
@pytest.mark.parametrize("dims", [2, 3])
def test_monai_accepts_the_settings_of_every_size(side: int, dims: int) -> None:
    image = philox("test", f"{side}").random((1, 1, *(side,) * dims)).astype(np.float32)
    if image.size > 2**17:
        pytest.skip("large volumes are slow and follow the same rule")
    settings = SsimSettings.for_shape(image.shape[2:])
    assert reconstruction_quality(image, image, resamples=100)[settings.name]["value"] == pytest.approx(1.0, abs=1e-4)


def test_batches_do_not_change_figures(images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    other = images * 0.9
    whole = reconstruction_quality(images, other, resamples=200)
    monkeypatch.setattr("meddiff_steps.evaluation.image_quality.BATCH_VOXELS", images[0].size)
    assert reconstruction_quality(images, other, resamples=200) == whole


def test_a_subset_is_compared_by_ssim_when_there_are_many(images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meddiff_steps.evaluation.image_quality.MAX_SSIM_IMAGES", 3)
    quality = reconstruction_quality(images, images * 0.9, resamples=200)
    assert (quality["psnr"]["n"], quality["ms_ssim"]["n"]) == (6, 3)


def test_bad_input_is_refused(images: np.ndarray) -> None:
    with pytest.raises(UserError, match="shape"):
        reconstruction_quality(images, images[..., :-1])
    with pytest.raises(UserError, match="no images"):
        reconstruction_quality(images[:0], images[:0])
    broken = images.copy()
    broken[2, 0, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match="not finite"):
        reconstruction_quality(images, broken)


def test_reconstructions_are_measured_as_they_are_made(images: np.ndarray, tmp_path: Path) -> None:
    made: list[weakref.ref[np.ndarray]] = []

    def reconstruct(row: int) -> tuple[np.ndarray, np.ndarray]:
        pair = images[row].copy(), images[row] * (1 - 0.02 * row)
        made.extend(weakref.ref(one) for one in pair)
        assert sum(one() is not None for one in made) <= 4, "those of earlier rows are still held"
        return pair

    ids = [f"s{row}" for row in range(6)]
    scans = pd.DataFrame({"scan_id": ids, "subject_id": list("aabbcc")})
    rows = {"test": [4, 1, 2, 5], "val": [3, 0]}
    found = write_reconstructions(tmp_path / "x.arrow", scans, ids, (1, 40, 40, 40), rows, reconstruct)
    assert Shards([tmp_path / "x.arrow"]).column("scan_id") == ["s4", "s1", "s2", "s5", "s3", "s0"]
    factors = 1 - 0.02 * np.arange(6, dtype=np.float32).reshape(-1, 1, 1, 1, 1)
    for split, chosen in rows.items():
        subjects = [scans["subject_id"][row] for row in chosen]
        real = images[chosen]
        assert found[split] == reconstruction_quality(real, real * factors[chosen], subjects=subjects)
