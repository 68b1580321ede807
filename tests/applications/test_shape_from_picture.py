"""Bodies from pictures: discs become balls, and pictures become volumes that lie as the bodies do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from meddiff_steps import config
from meddiff_steps.applications import shape_from_picture
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.evaluation.segmentation import overlap, surface_area
from meddiff_steps.imaging.pairs import Pairs
from meddiff_steps.imaging.preprocess import preprocess_scan
from meddiff_steps.imaging.reading import ScanError
from meddiff_steps.training.loop import fit
from meddiff_steps.training.tasks.image_to_image import ImageToImageTask

N = 16


def ball(radius: float, row: float, column: float, n: int = N) -> np.ndarray:
    """A ball in the middle of the depth, bool (n, n, n)."""
    z, y, x = np.indices((n, n, n))
    return np.asarray((z - (n - 1) / 2) ** 2 + (y - row) ** 2 + (x - column) ** 2 < radius**2)


def bodies(count: int, generator: np.random.Generator) -> np.ndarray:
    radius, places = generator.uniform(3, 5, count), generator.uniform(5.5, 9.5, (count, 2))
    return np.stack([ball(r, *place) for r, place in zip(radius, places, strict=True)])


class Cells:
    """Stands for shards: balls, and their outlines repeated along depth."""

    def __init__(self, volumes: np.ndarray) -> None:
        outlines = np.repeat(volumes.any(1, keepdims=True), N, axis=1)
        self.columns = {"outline": outlines[:, None], "volume": volumes[:, None]}
        self.schema = [SimpleNamespace(name=name, metadata={b"kind": b"mask"}) for name in self.columns]

    def tensors(self, name: str, rows: Any, dtype: str | None = "float32") -> np.ndarray:
        return self.columns[name][np.asarray(rows)].astype(dtype or "uint8")

    def shape(self, name: str) -> tuple[int, ...]:
        return (1, N, N, N)


def test_an_inflated_disc_is_a_ball() -> None:
    truth = ball(20, 31.5, 31.5, 64)
    half = shape_from_picture.height(truth.any(0))
    made = shape_from_picture.thick(half, 31.5, 64)
    assert shape_from_picture.iou(made[None], truth[None])[0] > 0.93


def test_what_needs_no_network_is_fitted_to_training_bodies() -> None:
    volumes = bodies(8, np.random.default_rng(0))
    shards: Any = Cells(volumes)
    pairs = Pairs(shards, ("outline",), ("volume",), "mask", (0, 1))
    found = shape_from_picture.Shapes.of(pairs, range(7))
    assert found is not None and found.middle == pytest.approx((N - 1) / 2) and 0.85 < found.factor < 1.25
    ways = found(pairs.sources([7])[0])
    scores = {name: shape_from_picture.iou(one.mask[None] > 0, volumes[7:])[0] for name, one in ways.items()}
    assert scores["inflated"] > 0.85 > 0.8 > scores["extruded"] > 0.5
    again = found(pairs.sources([3])[0])["nearest"].mask
    assert np.array_equal(again > 0, volumes[3])  # a training body is its own nearest
    without = Pairs(SimpleNamespace(schema=[]), ("image",), ("volume",), "mask")  # type: ignore[arg-type]
    assert shape_from_picture.Shapes.of(without, [0]) is None


def test_of_many_bodies_some_from_all_of_them_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_from_picture, "MOST_BODIES", 3)
    volumes = bodies(9, np.random.default_rng(0))
    shards: Any = Cells(volumes)
    found = shape_from_picture.Shapes.of(Pairs(shards, ("outline",), ("volume",), "mask", (0, 1)), range(9))
    assert found is not None
    np.testing.assert_array_equal(found.volumes, volumes[[0, 4, 8]])


def test_that_discs_are_balls_is_learnt(tmp_path: Path) -> None:
    generator, fabric = np.random.default_rng(1), make_fabric(config.Compute(device="cpu", precision="32-true"), 1)
    shards: Any = Cells(bodies(40, generator))
    pairs = Pairs(shards, ("outline",), ("volume",), "mask", (0, 1))
    optimiser = {"steps": 250, "batch_size": 8, "warmup_steps": 5, "validate_every": 250}
    settings = config.SegmentationEnsemble(
        source=["outline"], target=["volume"], block=4, channels=[32], num_res_blocks=2, optimiser=optimiser
    )
    variants = config.Variants(flip=True)
    task = ImageToImageTask("diffusion", settings, variants, pairs, range(32), range(32, 40), "x", fabric)
    fit(task, settings.optimiser, fabric, tmp_path, "x")
    model: Any = task.modules["average"]
    noise = torch.from_numpy(generator.standard_normal((8, 1, N, N, N), dtype=np.float32))
    with torch.no_grad():
        drawn = model.draw(torch.from_numpy(pairs.sources(range(32, 40))), noise, 10).numpy()
    scores = shape_from_picture.iou(pairs.decoded(drawn)[:, 0] > 0, pairs.truths(range(32, 40))[:, 0] > 0)
    extruded = pairs.sources(range(32, 40))[:, 0] > 0
    assert scores.mean() > 0.7 > 0.4 > shape_from_picture.iou(extruded, pairs.truths(range(32, 40))[:, 0] > 0).mean()


def test_errors_of_shapes_are_those_of_balls() -> None:
    small, large = ball(10, 31.5, 31.5, 64), ball(20, 31.5, 31.5, 64)
    assert surface_area(large, (1, 1, 1)) == pytest.approx(4 * np.pi * 400, rel=0.02)
    assert surface_area(large, (2, 2, 2)) == pytest.approx(4 * np.pi * 1600, rel=0.02)
    found = overlap(large, small, (1, 1, 1))
    assert found["iou"] == pytest.approx(1 / 8, rel=0.03) and found["volume_error"] == pytest.approx(7 / 8, rel=0.01)
    assert found["area_error"] == pytest.approx(3 / 4, rel=0.02)
    nothing = overlap(np.zeros_like(large), small, (1, 1, 1))
    assert all(np.isnan(nothing[name]) for name in ("iou", "volume_error", "area_error"))


def study(folder: Path, **changes: Any) -> config.Preprocess:
    channels = {"volume": {"path": str(folder / "volume.nii.gz"), "kind": "mask"}}
    settings = {"shape": (8, 8, 8), "spacing_mm": 2, "depth": N, "foreground": "all", "percentiles": (0, 100)}
    return config.Preprocess.model_validate({**settings, "channels": channels, **changes})


def test_a_picture_is_repeated_where_its_body_lies(tmp_path: Path) -> None:
    coarse = np.roll(ball(3, 2.5, 4.5, 8), -1, 0)
    truth = np.kron(coarse, np.ones((2, 2, 2))) > 0
    picture = truth.any(0)
    PilImage.fromarray((picture * 200).astype(np.uint8)).save(tmp_path / "picture.png")
    nib.save(nib.Nifti1Image(truth.astype(np.uint8), np.diag([-1, -1, 1, 1])), tmp_path / "volume.nii.gz")
    wanted, paths = study(tmp_path), {"volume": tmp_path / "volume.nii.gz"}
    arrays, facts = preprocess_scan(tmp_path / "picture.png", wanted, channels=paths)
    image, volume = arrays["image"][0], arrays["volume"][0] > 0
    assert image.shape == (8, 8, 8) and (image == image[0]).all()
    assert np.array_equal(volume, coarse)
    assert np.array_equal(image[0] > 0.5, coarse.any(0))
    assert facts["channel_volume_on_head"] is None and "skull_valley" in facts and facts["skull_valley"] is None


def test_a_volume_of_another_depth_or_size_is_refused(tmp_path: Path) -> None:
    PilImage.fromarray(np.eye(N, dtype=np.uint8) * 200).save(tmp_path / "picture.png")
    for shape, said in (((8, N, N), "8 voxels along the first axis, expected the 16"), ((N, 8, 8), "wrong size")):
        nib.save(nib.Nifti1Image(np.ones(shape, np.uint8), np.eye(4)), tmp_path / "volume.nii.gz")
        with pytest.raises(ScanError) as caught:
            preprocess_scan(tmp_path / "picture.png", study(tmp_path), channels={"volume": tmp_path / "volume.nii.gz"})
        assert said in f"{caught.value} {caught.value.reason}"


def test_depth_is_of_pictures_in_a_3d_study(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"depth repeats pictures in a 3D study, found the 2D shape"):
        config.Preprocess(shape=(8, 8), spacing_mm=None, depth=8)
    with pytest.raises(ValueError, match="found bias_field, which is of volumes"):
        study(tmp_path, bias_field="n4")
