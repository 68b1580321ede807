"""The space `structure`: known answers, and that it sees blur and matched noise in volumes and pictures."""

import logging

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from meddiff_steps.core.random_streams import philox
from meddiff_steps.instruments.feature_spaces import structure as s
from meddiff_steps.instruments.feature_spaces.base import Context

NAMES = [
    f"{name} {layer}"
    for layer in ("edge", "mid", "deep")
    for name in ("deviation", "kurtosis", "median", "coherence", "planarity")
]


def distance(shape: tuple[int, ...]) -> np.ndarray:
    grid = np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in shape], indexing="ij")
    return np.sqrt(sum(np.square(g) for g in grid))


def numbers(image: np.ndarray, by_level: bool = False) -> dict[str, float]:
    return dict(zip(NAMES, s.structure(image.astype(np.float32), by_level)[0], strict=True))


def test_layers_are_depths_below_the_surface_and_holes_are_inside() -> None:
    image = (distance((41, 41, 41)) < 18).astype(np.float32)
    image[18:23, 18:23, 18:23] = 0.0  # a ventricle
    layer = s.layers_by_depth(image)
    below = 18 - distance(image.shape)
    for number, (low, high) in enumerate(s.DEPTHS):
        inside = (below > low + 1) & (below < high - 1)
        assert (layer[inside] == number).all()
    assert (layer[below < 0] == -1).all()
    assert layer[20, 20, 20] == 2


def test_a_foreground_that_fills_the_grid_has_layers_below_its_border() -> None:
    layer = s.layers_by_depth(np.ones((20, 24)))
    assert [layer[10, column] for column in (0, 2, 5, 11)] == [-1, 0, 1, 2]


def test_levels_divide_an_image_without_background_into_thirds() -> None:
    image = np.linspace(0, 1, 60)[:, None] * np.ones(40)
    layer = s.layers_by_level(image)
    assert [layer[row, 20] for row in (5, 30, 55)] == [0, 1, 2]
    assert np.bincount(layer.ravel()) / layer.size == pytest.approx([1 / 3] * 3, abs=0.05)


def test_known_directions() -> None:
    """Waves along one axis are planes, along two are lines, noise is neither."""
    shape = (48, 48, 48)
    ball = distance(shape) < 23
    x, y, _ = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    planes = numbers(np.where(ball, 0.6 + 0.2 * np.sin(x), 0))
    lines = numbers(np.where(ball, 0.6 + 0.1 * np.sin(x) + 0.1 * np.sin(y), 0))
    noise = numbers(np.where(ball, 0.6 + 0.05 * philox("test", "structure").normal(size=shape), 0))
    assert planes["coherence deep"] > 0.95
    assert planes["planarity deep"] < 0.02
    assert lines["planarity deep"] > 0.3
    assert lines["coherence deep"] < 0.4
    assert noise["coherence deep"] < 0.35
    assert noise["kurtosis deep"] == pytest.approx(3.0, abs=0.1)  # a Gaussian
    assert noise["median deep"] == pytest.approx(0.6745, abs=0.01)
    # Deviation of white noise less its Gaussian of 1 voxel: 1 - 2 g(0) + sum g^2, per axis g(0) = 0.399, sum 0.282.
    assert noise["deviation deep"] == pytest.approx(0.05 * np.sqrt(1 - 2 * 0.399**3 + 0.282**3), rel=0.03)


def test_subsampled_directions_are_those_of_all_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.where(distance((40, 40, 40)) < 19, 0.5 + 0.1 * philox("test", "many").normal(size=(40, 40, 40)), 0)
    every = numbers(image)
    monkeypatch.setattr(s, "MOST_TENSORS", 1500)
    some = numbers(image)
    for name in NAMES:
        tolerance = 0.03 if name.startswith(("coherence", "planarity")) else 1e-12
        assert some[name] == pytest.approx(every[name], abs=tolerance)


@pytest.mark.parametrize("dims", [2, 3])
def test_thin_layers_and_empty_images_are_finite_and_say_so(dims: int, caplog: pytest.LogCaptureFixture) -> None:
    shape = (1, 1, *(20, 22, 18)[:dims])
    images = torch.zeros(3, *shape[1:])
    images[1, 0, 4:12, 4:12] = 0.7  # no deep layer
    images[2] = 0.5  # constant
    with caplog.at_level(logging.WARNING):
        found = s.structure_features(images)
    assert found.shape == (3, 15)
    assert torch.isfinite(found).all()
    assert (found[0] == 0).all()
    assert "of 3 images have a layer of fewer than 50 voxels" in caplog.text
    measured = s.structure(images[1, 0].numpy())[1]
    assert measured < 3
    assert found[1, 10:].tolist() == found[1, 5 * (measured - 1) : 5 * measured].tolist() if measured else True


def cortex(label: str, shape: tuple[int, ...], folds: float = 1.0, whole: bool = False) -> np.ndarray:
    """Sheets, in a ball or disc or all over: level sets of a smooth field."""
    field = gaussian_filter(philox("test", f"cortex {label}").normal(size=shape), folds)
    sheets = 1 / (1 + np.exp(-3 * np.sin(4 * field / field.std())))
    ball = np.clip(min(shape) / 2 - 2 - distance(shape), 0, 1)
    return ((1 if whole else ball) * (0.4 + 0.4 * sheets)).astype(np.float32)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("by_level", [False, True])
def test_blur_and_noise_move_it_in_ways_of_their_own(dims: int, by_level: bool) -> None:
    shape = (44, 44, 44)[:dims] if dims == 3 else (128, 128)
    rows = {"real": [], "blur": [], "noise": []}  # type: dict[str, list[np.ndarray]]
    for i in range(8):
        image = cortex(f"{i}", shape, 2.0, by_level)
        noise = 0.04 * philox("test", f"grain {i}").normal(size=shape)
        made = {
            "real": image,
            "blur": gaussian_filter(image, 0.6),
            "noise": np.where(image > 0.1, np.clip(image + noise, 0, 1), image),
        }
        for kind, picture in made.items():
            rows[kind].append(s.structure(picture.astype(np.float32), by_level)[0])
    mean = {kind: dict(zip(NAMES, np.mean(values, 0), strict=True)) for kind, values in rows.items()}
    assert mean["blur"]["deviation mid"] < mean["real"]["deviation mid"] < mean["noise"]["deviation mid"]
    assert mean["noise"]["coherence mid"] < mean["real"]["coherence mid"]
    spread = np.std(rows["real"], axis=0)
    for kind in ("blur", "noise"):
        shift = np.abs(np.mean(rows[kind], 0) - np.mean(rows["real"], 0)) / spread
        assert shift.max() > 3


def test_the_digest_says_how_layers_are_made() -> None:
    nonzero, every = s.build(Context(2)), s.build(Context(2, foreground="all"))
    assert nonzero.digest != every.digest
    assert "grey level" in every.description
    images = torch.from_numpy(cortex("digest", (32, 32)))[None, None]
    assert not torch.equal(nonzero.extract(images), every.extract(images))
    assert torch.equal(nonzero.extract(images), s.build(Context(2)).extract(images))
