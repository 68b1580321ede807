"""Segmentation and translation in a world where the target given the source is known: normal about a multiple of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from meddiff_steps import config
from meddiff_steps.applications import segmentation, translation
from meddiff_steps.applications.image_to_image import Drawer
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.evaluation.segmentation import overlap
from meddiff_steps.imaging.pairs import Pairs
from meddiff_steps.models.image_to_image import ImageToImage

SPATIAL = (16, 8)
#: Targets are N(SLOPE * source, STD^2) at each voxel, sources in [-1, 1].
SLOPE, STD = 0.6, 0.2


class Known(ImageToImage):
    """What the best of all networks would say."""

    def predict(self, told: Tensor, x: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = (a.float().reshape(-1, 1, 1, 1) for a in self.process.alpha_sigma(timesteps))
        mean, power = SLOPE * told, (alpha * STD) ** 2 + sigma**2
        clean = mean + alpha * STD**2 / power * (x - alpha * mean)
        return self.process.target(clean, (x - alpha * clean) / sigma, timesteps)

    def guess(self, sources: Tensor) -> Tensor:
        return SLOPE * (sources * 2.0 - 1.0)


class Scans:
    """Stands for shards: two scans, from left to right brighter."""

    def __init__(self) -> None:
        ramp = np.broadcast_to(np.linspace(0, 1, SPATIAL[1], dtype=np.float32), (1, *SPATIAL))
        self.images = {"image": np.stack([ramp, ramp[..., ::-1]])}
        self.images["post"] = (1 + SLOPE * (2 * self.images["image"] - 1)) / 2
        self.images["mask"] = (self.images["image"] > 0.7).astype(np.int16)

    def tensors(self, name: str, rows: Any, dtype: str | None = "float32") -> np.ndarray:
        return self.images[name][np.asarray(rows)]

    def shape(self, name: str) -> tuple[int, ...]:
        return (1, *SPATIAL)


@pytest.fixture(scope="module")
def fabric() -> Any:
    return make_fabric(config.Compute(device="cpu", precision="32-true"), threads=1)


def drawer(fabric: Any, target: str, samples: int = 4, **changes: Any) -> Drawer:
    section = config.Translation if target == "post" else config.SegmentationEnsemble
    settings = section(
        target=[target], block=4, channels=[8], num_res_blocks=1, samples=samples, num_inference_steps=30, **changes
    )
    model = Known(settings, SPATIAL, 1, 1).eval()
    kind: Any = "contrast" if target == "post" else "mask"
    shards: Any = Scans()
    pairs = Pairs(shards, ("image",), (target,), kind, () if kind == "contrast" else (0, 1))
    return Drawer(model, model, pairs, settings, "x", fabric, {})


def test_draws_have_the_known_mean_and_spread(fabric: Any) -> None:
    found = drawer(fabric, "post", samples=200)
    drawn = found.draws(0, "a")
    assert drawn.shape == (200, 1, *SPATIAL)
    truth = SLOPE * (2 * found.pairs.sources([0]) - 1)
    assert np.abs(drawn.mean(0) - truth).max() < 5 * STD / 200**0.5
    assert drawn.std(0).mean() == pytest.approx(STD, rel=0.06)


def test_a_draw_depends_on_its_key_alone(fabric: Any) -> None:
    few, many = drawer(fabric, "post", samples=2), drawer(fabric, "post", samples=5)
    first = few.draws(0, "a")
    assert np.array_equal(first, few.draws(0, "a"))
    np.testing.assert_allclose(many.draws(0, "a")[:2], first, atol=1e-5)  # not of how many others there are
    assert np.abs(few.draws(0, "b") - first).max() > 0.1 and np.abs(first[0] - first[1]).max() > 0.1


def test_a_start_from_a_guess_ends_where_a_full_run_does(fabric: Any) -> None:
    """From a guess with little noise on it most of the guess stays; from half of the levels the source decides."""
    found = drawer(fabric, "post", samples=50)
    wrong = np.full((1, *SPATIAL), 3.0, np.float32)
    truth = SLOPE * (2 * found.pairs.sources([0])[0] - 1)
    far, near = (np.abs(found.draws(0, "a", wrong, start).mean(0) - truth).mean() for start in (0.9, 0.05))
    assert far < 0.1 < 0.3 < near


def test_translation_beside_what_needs_no_network(fabric: Any) -> None:
    found = drawer(fabric, "post", samples=8)
    simple = translation.PatchRegression.of(found.pairs, [0, 1], np.random.default_rng(0))
    ways = translation.translated(found, 0, "a") | translation.without_a_network(
        found.pairs, np.array([True]), simple, 0
    )
    shapes = {name: image.shape[:2] for name, image in ways.items()}
    assert shapes == {
        "regression": (1, 1),
        "draws": (8, 1),
        "mean_of_draws": (1, 1),
        "copy_of_image": (1, 1),
        "patches": (1, 1),
    }
    truth, inside = found.pairs.truths([0]), found.pairs.sources([0])[0, 0] > 0
    np.testing.assert_allclose(ways["regression"], truth, atol=1e-6)
    # The target is linear in the source, so that patches find it, but for what lies beyond the edge
    assert np.abs(ways["patches"] - truth)[0, 0][inside].max() < 0.03
    assert (ways["patches"][0, 0][~inside] == 0).all()
    assert np.square(ways["mean_of_draws"] - truth).mean() < np.square(ways["draws"] - truth).mean() / 4


def test_an_ensemble_says_where_it_is_unsure(fabric: Any) -> None:
    found = segmentation.marked_by(drawer(fabric, "mask", samples=40, start=0.5), 0, "a")
    assert list(found) == ["regression", "regression_levels", "ensemble", "started"]
    # A voxel is marked where N(SLOPE * source, STD^2) > 0
    source = np.linspace(-1, 1, SPATIAL[1])
    expected = 0.5 * (1 + torch.erf(torch.from_numpy(SLOPE * source / STD / 2**0.5))).numpy()
    assert np.abs(found["ensemble"].shares.mean(0) - expected).max() < 0.07
    # What is begun at the mask leans to it: is as right, and surer than it should be
    unsure, leaning = (np.abs(found[way].shares.mean(0) - 0.5).mean() for way in ("ensemble", "started"))
    assert unsure < leaning
    for way in ("ensemble", "started"):
        assert np.array_equal(found[way].mask, (found[way].shares > 0.5))
    assert found["ensemble"].draws.shape == (40, *SPATIAL)
    levels = found["regression_levels"].draws.sum((1, 2))
    assert len(levels) == 40 and (np.diff(levels) <= 0).all() and levels[0] > levels[-1]


def test_simple_ways_to_mark(fabric: Any) -> None:
    pairs = drawer(fabric, "mask").pairs
    average = segmentation.mean_label(pairs, [0])
    assert np.array_equal(average.mask, pairs.truths([0])[0, 0])
    both = segmentation.mean_label(pairs, [0, 1])
    assert both.shares.max() == 0.5 and not both.mask.any()


def test_the_majority_of_readers_is_at_least_half_of_them() -> None:
    readers = np.array([[[1, 1, 1, 0]], [[1, 1, 0, 0]], [[1, 0, 0, 0]], [[1, 0, 0, 0]]])
    assert segmentation.majority(readers).tolist() == [[1, 1, 0, 0]]
    assert segmentation.majority(7 * readers[:1]).tolist() == [[7, 7, 7, 0]]
    assert not segmentation.majority(0 * readers).any()


def test_the_majority_of_readers_keeps_their_labels() -> None:
    readers = np.array([[[1, 2, 2, 0]], [[1, 2, 3, 3]], [[0, 1, 2, 0]]], np.int16)
    assert segmentation.majority(readers).tolist() == [[1, 2, 2, 0]]
    alike = np.array([[[0, 1, 2]]] * 2, np.int16)
    assert overlap(segmentation.majority(alike), alike[0], (1.0, 1.0))["dice_scan"] == 1


def test_what_is_bright_in_a_head_is_found_and_its_rim_is_not() -> None:
    places = np.indices((32, 32)) - 15.5
    depth = np.hypot(*places)
    image = np.where(depth < 14, 0.4 + 0.02 * np.random.default_rng(0).standard_normal((32, 32)), 0)
    image[(depth > 12.5) & (depth < 14)] = 1.0  # a bright scalp
    truth = np.hypot(places[0] - 3, places[1]) < 4
    image[truth] = 0.9
    pairs: Any = SimpleNamespace(
        sources=lambda rows: np.repeat(np.stack([np.zeros_like(image) + 0.1, image])[None], len(rows), 0),
        truths=lambda rows: np.repeat(truth[None, None], len(rows), 0),
    )
    rule = segmentation.Brightness.of(pairs, [0, 1, 2])
    assert (rule.channel, rule.sign) == (1, 1)
    found = rule(pairs.sources([0])[0]).mask > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.85
