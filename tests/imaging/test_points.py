"""Shapes as points: defects, the way back to a solid, and files that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging import points


def sphere(count: int, radius: float = 10.0, middle: float = 0.0) -> np.ndarray:
    """Evenly spread points on a sphere (Fibonacci)."""
    k = np.arange(count) + 0.5
    theta, z = np.pi * (1 + 5**0.5) * k, 1 - 2 * k / count
    ring = np.sqrt(1 - z**2)
    return (middle + radius * np.stack([ring * np.cos(theta), ring * np.sin(theta), z], 1)).astype(np.float32)


def written(path: Path, **changed: Any) -> Path:
    shape = sphere(40)
    arrays: dict[str, Any] = {
        "points_mm": np.stack([shape, 1.1 * shape]).astype(np.float16),
        "missing": np.stack([points.defect(shape, 3, 10), points.defect(shape, 30, 10)]),
        "ids": np.array(["a", "b"]),
    } | changed
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def test_a_defect_is_a_cap() -> None:
    shape = sphere(500)
    missing = points.defect(shape, 17, 100)
    heights = shape @ shape[17]
    assert missing.sum() == 100 and heights[missing].min() >= heights[~missing].max()


def test_shapes_are_read_as_they_are(tmp_path: Path) -> None:
    shapes = points.read_shapes(written(tmp_path / "s.npz"))
    assert len(shapes) == 2 and shapes.gap == 10 and shapes.ids == ["a", "b"]
    assert shapes.left(1).shape == (30, 3) and shapes.gone(1).shape == (10, 3)
    np.testing.assert_allclose(np.linalg.norm(shapes.gone(1), axis=1), 11, atol=0.02)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"missing": None}, r"has no array missing, only \['ids', 'points_mm'\]"),
        ({"points_mm": np.zeros((2, 40))}, r"points_mm \(2, 40\).*expected \(n, p, 3\)"),
        ({"missing": np.zeros((2, 40), bool)}, "neither none nor all"),
        ({"missing": np.eye(2, 40)}, "of type float64"),
        ({"ids": np.array(["a", "a"])}, "a is there twice among ids"),
        ({"points_mm": np.stack([sphere(40), sphere(40) * np.nan])}, "points_mm of b has values that are not finite"),
        ({"points_mm": np.stack([sphere(40), sphere(40)]) / 1000}, r"the largest shape is 0\.0\d+ long, expected mm"),
    ],
)
def test_files_that_are_no_shapes_are_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        points.read_shapes(written(tmp_path / "s.npz", **changed))


def test_a_file_that_is_not_readable_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_bytes(b"text")
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "array.npy", np.zeros(3))
    whole = written(tmp_path / "s.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-100])
    for name in ("text.npz", "empty.npz", "array.npy", "cut.npz", "none.npz"):
        with pytest.raises(UserError, match=f"{name}: not readable as .npz"):
            points.read_shapes(tmp_path / name)


def test_a_sphere_becomes_a_ball_and_a_hole_in_it_does_not() -> None:
    surface = sphere(1500)
    origin, shape = points.grid_around(surface, 1.0, 6.0)
    ball = points.mask_of(surface, origin, shape, 1.0, 2.0)
    assert ball.sum() == pytest.approx(4 / 3 * np.pi * 10**3, rel=0.06)
    middle = np.argwhere(ball).mean(0) + origin
    np.testing.assert_allclose(middle, 0, atol=0.3)
    open_ball = surface[~points.defect(surface, 700, 300)]
    assert points.mask_of(open_ball, origin, shape, 1.0, 2.0).sum() < 0.2 * ball.sum()


def test_the_nearest_shape_has_the_patch_that_is_missing() -> None:
    library = np.stack([sphere(400, radius) for radius in (6.0, 10.2, 14.0)])
    whole = sphere(399)
    missing = points.defect(whole, 200, 80)
    number, patch = points.patch_like(library, whole[~missing], 80)
    assert number == 1 and patch.shape == (80, 3)
    towards = whole[missing].mean(0)
    cosine = patch.mean(0) @ towards / np.linalg.norm(patch.mean(0)) / np.linalg.norm(towards)
    assert cosine > 0.98
